"""Many inputs at once: each accepted once or refused by name, whatever the server does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from mesh.broker import Broker
from mesh.exception import ConnectionError, NotFoundError, RequestSizeError, ResourceExhaustedError
from mesh.protocol import Address, Input, new_call_id
from mesh.server import NatsServer
from tests.support import Mesh, new_mesh

MANY = 5_000  # more than are under way at once


def inputs(call: str, count: int, start: int = 0, body: bytes = b"{}") -> Iterator[Input]:
    for index in range(start, start + count):
        yield Input(address=Address("many", "f", "_", call, index), body=body)


class Told:
    """What was told of each input."""

    def __init__(self) -> None:
        self.of: dict[int, Exception | None] = {}

    def __call__(self, input: Input, error: Exception | None) -> None:
        assert input.address.index not in self.of, "told twice"
        self.of[input.address.index] = error

    @property
    def accepted(self) -> set[int]:
        return {index for index, error in self.of.items() if error is None}


async def queued(broker: Broker, call: str) -> set[int]:
    return {address.index for address in await broker.calls.of_call(call)}


def test_many_inputs_are_stored_each_once(own_mesh: Callable[..., Mesh]) -> None:
    async def submit(broker: Broker) -> None:
        call, told = new_call_id(broker.token), Told()
        assert await broker.calls.submit_many(inputs(call, MANY), told) == MANY
        assert await queued(broker, call) == told.accepted == set(range(MANY))

        assert await broker.calls.submit_many(inputs(call, 10)) == 10, "they are queued already, which is as good"
        assert len(await queued(broker, call)) == MANY

    own_mesh().ask(submit)


def test_an_endless_iterator_is_read_as_there_is_room(own_mesh: Callable[..., Mesh]) -> None:
    async def submit(broker: Broker) -> None:
        call, told, read = new_call_id(broker.token), Told(), 0

        async def slow() -> AsyncIterator[Input]:
            nonlocal read
            for input in inputs(call, 1_000_000):
                read += 1
                assert read - len(told.of) < 3_000, "read far ahead of what was accepted"
                if len(told.of) > MANY:
                    raise ValueError("enough")
                yield input

        with pytest.raises(ValueError, match="enough"):
            await broker.calls.submit_many(slow(), told)
        assert len(told.accepted) == read - 1, "what was read before is accepted, and told"
        assert await queued(broker, call) == told.accepted

    own_mesh().ask(submit)


def test_an_input_that_is_too_large_is_told_alone(own_mesh: Callable[..., Mesh]) -> None:
    async def submit(broker: Broker) -> None:
        call, told = new_call_id(broker.token), Told()
        large = Input(address=Address("many", "f", "_", call, 99), body=bytes(1 << 20))
        assert await broker.calls.submit_many([*inputs(call, 10), large, *inputs(call, 10, 10)], told) == 20
        assert isinstance(told.of[99], RequestSizeError)
        assert await queued(broker, call) == set(range(20))
        with pytest.raises(RequestSizeError, match=r"many\.f take 1,048,576 bytes"):
            await broker.calls.submit_many([large, *inputs(call, 10, 30)])

    own_mesh().ask(submit)


def test_a_full_queue_ends_it_and_says_which_inputs_are_in(own_mesh: Callable[..., Mesh]) -> None:
    async def submit(broker: Broker) -> None:
        call, told = new_call_id(broker.token), Told()
        with pytest.raises(ResourceExhaustedError, match=r"the queue, MESH.*is .* full"):
            await broker.calls.submit_many(inputs(call, 10_000, body=bytes(20_000)), told)
        assert 0 < len(told.accepted) < len(told.of) < 10_000
        assert await queued(broker, call) == told.accepted
        assert all(isinstance(error, ResourceExhaustedError) for error in told.of.values() if error is not None)

    own_mesh(calls_size="16M").ask(submit)


def test_without_an_environment_it_is_said(server: NatsServer, own_mesh: Callable[..., Mesh]) -> None:
    async def submit(broker: Broker) -> None:
        other = broker.of_environment("nobody-made-it")
        with pytest.raises(NotFoundError, match="mesh init"):
            await other.calls.submit_many(inputs(new_call_id(broker.token), 100))

    own_mesh().ask(submit)


def test_a_server_killed_meanwhile_loses_and_doubles_nothing(
    own_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path) as mesh:

        async def submit(broker: Broker) -> None:
            call, told = new_call_id(broker.token), Told()

            async def disturbed() -> AsyncIterator[Input]:
                for input in inputs(call, MANY):
                    if input.address.index == MANY // 2:
                        server.kill()
                        asyncio.get_running_loop().run_in_executor(
                            None, lambda: own_server(store=tmp_path / "store", port=server.port)
                        )
                    yield input

            assert await broker.calls.submit_many(disturbed(), told) == MANY
            found = await queued(broker, call)
            assert found == told.accepted == set(range(MANY))
            messages = (await broker.connection.api(f"STREAM.INFO.{broker.topology.calls}"))["state"]["messages"]
            assert messages == MANY

        mesh.ask(submit)


def test_a_server_that_stays_away_is_said_of_each(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server()
    with new_mesh(server, tmp_path, submit_timeout=1) as mesh:

        async def submit(broker: Broker) -> None:
            call, told = new_call_id(broker.token), Told()

            async def disturbed() -> AsyncIterator[Input]:
                for input in inputs(call, 1_000):
                    if input.address.index == 500:
                        server.kill()
                    yield input

            with pytest.raises(ConnectionError, match="it may have been accepted"):
                await broker.calls.submit_many(disturbed(), told)
            assert len(told.accepted) < 1_000
            assert all(isinstance(error, ConnectionError) for error in told.of.values() if error is not None)

        mesh.ask(submit)
