"""Waiting for a result: nothing is missed, whenever it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mesh._sync import bridge
from mesh.broker import Broker
from mesh.protocol import Result, State, new_call_id
from tests.support import Mesh


def test_a_result_that_comes_between_two_waits(own_mesh: Callable[..., Mesh]) -> None:
    """Who waits long looks around now and then: what is pushed meanwhile is there when it waits again."""

    async def wait_twice(broker: Broker) -> Result | None:
        key = f"{new_call_id(broker.token)}.0"
        waiter = await broker.results.expect(key)
        try:
            assert await waiter.wait(0) is None
            await broker.results.create(key, Result(state=State.SUCCEEDED, body=b"1"))
            await broker.connection.flush()  # the push came before the answer to this
            async with asyncio.timeout(10):  # less than it takes until everything is read again
                return await waiter.wait(600)
        finally:
            waiter.close()

    found = own_mesh().ask(wait_twice)
    assert found is not None
    assert found.body == b"1"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_exits_on_meshs_thread_exits_for_who_waits_and_no_more(kind: type[BaseException]) -> None:
    async def leaves() -> None:
        raise kind(3)

    async def stays() -> str:
        return "here"

    with pytest.raises(kind):
        bridge().run(leaves())
    assert bridge().run(stays()) == "here"
