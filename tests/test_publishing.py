"""Many inputs at once: each accepted once or refused by name, whatever the server does meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import pytest

from mesh.broker import Broker, NoResponders, StoreError, Unanswered, submitting
from mesh.exception import ConnectionError, NotFoundError, RequestSizeError, ResourceExhaustedError
from mesh.protocol import Address, Input, Result, State, new_call_id
from mesh.server import NatsServer
from tests.support import Mesh, new_mesh

MANY = 5_000  # more than are under way at once


@pytest.fixture(params=["2m", "always"])
def sync(request: pytest.FixtureRequest) -> str:
    """When the server writes to disk: at times, or before it confirms, which is when group commits are used."""
    return str(request.param)


@pytest.fixture
def stored(own_server: Callable[..., NatsServer], sync: str, tmp_path: Path) -> Iterator[Mesh]:
    """An environment on a server of its own, which is at `tmp_path / "store"`."""
    with new_mesh(own_server(store=tmp_path / "store", sync=sync), tmp_path, calls_size="16M") as mesh:
        mesh.ask(knowing)
        yield mesh


@pytest.fixture
def grouped(own_server: Callable[..., NatsServer], tmp_path: Path) -> Iterator[Mesh]:
    """The same, where group commits are used."""
    with new_mesh(own_server(store=tmp_path / "store", sync="always"), tmp_path, submit_timeout=20) as mesh:
        mesh.ask(knowing)
        yield mesh


async def knowing(broker: Broker) -> None:
    """Until the connection knows how the server writes."""
    await broker.connection.request("$SYS.REQ.USER.INFO")


def restart(mesh: Mesh, own_server: Callable[..., NatsServer], sync: str) -> None:
    """Kill the server, and start it again beside everything else."""
    mesh.server.kill()
    store, port = mesh.directory / "store", mesh.server.port
    asyncio.get_running_loop().run_in_executor(None, lambda: own_server(store=store, port=port, sync=sync))


async def batched(broker: Broker, stream: str) -> set[str]:
    """The atomic batches that messages of a stream came in."""
    found = await broker.connection.get_range(stream, 1, MANY)
    return {batch for message in found if (batch := message.headers.get("Nats-Batch-Id"))}


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
    subjects = await broker.connection.subjects(broker.topology.calls, broker.topology.call_filter(call=call))
    return {int(subject.rpartition(".")[2]) for subject in subjects}


def test_many_inputs_are_stored_each_once(stored: Mesh, sync: str) -> None:
    async def submit(broker: Broker) -> None:
        call, told = new_call_id(broker.token), Told()
        assert await broker.calls.submit_many(inputs(call, MANY), told) == MANY
        assert await queued(broker, call) == told.accepted == set(range(MANY))
        assert bool(await batched(broker, broker.topology.calls)) == (sync == "always")

        assert await broker.calls.submit_many(inputs(call, 10)) == 10, "they are queued already, which is as good"
        assert len(await queued(broker, call)) == MANY

    stored.ask(submit)


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
        large = Input(address=Address("many", "f", "_", call, 99), body=bytes(2 << 20))
        assert await broker.calls.submit_many([*inputs(call, 10), large, *inputs(call, 10, 10)], told) == 20
        assert isinstance(told.of[99], RequestSizeError)
        assert await queued(broker, call) == set(range(20))
        with pytest.raises(RequestSizeError, match=r"many\.f take 2,097,152 bytes"):
            await broker.calls.submit_many([large, *inputs(call, 10, 30)])

    own_mesh(payload_limit=1 << 20).ask(submit)


def test_a_full_queue_ends_it_and_says_which_inputs_are_in(stored: Mesh) -> None:
    async def submit(broker: Broker) -> None:
        call, told = new_call_id(broker.token), Told()
        with pytest.raises(ResourceExhaustedError, match=r"the queue, MESH.*is .* full"):
            await broker.calls.submit_many(inputs(call, 10_000, body=bytes(20_000)), told)
        assert 0 < len(told.accepted) < len(told.of) < 10_000
        assert await queued(broker, call) == told.accepted
        assert all(isinstance(error, ResourceExhaustedError) for error in told.of.values() if error is not None)

    stored.ask(submit)


def test_without_an_environment_it_is_said(server: NatsServer, own_mesh: Callable[..., Mesh]) -> None:
    async def submit(broker: Broker) -> None:
        other = broker.of_environment("nobody-made-it")
        with pytest.raises(NotFoundError, match="mesh init"):
            await other.calls.submit_many(inputs(new_call_id(broker.token), 100))

    own_mesh().ask(submit)


def test_a_server_killed_meanwhile_loses_and_doubles_nothing(
    stored: Mesh, sync: str, own_server: Callable[..., NatsServer]
) -> None:
    async def submit(broker: Broker) -> None:
        call, told = new_call_id(broker.token), Told()

        async def disturbed() -> AsyncIterator[Input]:
            for input in inputs(call, MANY):
                if input.address.index == MANY // 2:
                    restart(stored, own_server, sync)
                yield input

        assert await broker.calls.submit_many(disturbed(), told) == MANY
        assert await queued(broker, call) == told.accepted == set(range(MANY))
        messages = (await broker.connection.api(f"STREAM.INFO.{broker.topology.calls}"))["state"]["messages"]
        assert messages == MANY

    stored.ask(submit)


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


# --- group commits ---------------------------------------------------------------------------------------------------


async def create(broker: Broker, call: str, numbers: Iterable[int], text: bytes = b"1") -> list[bool]:
    """Store results, all at once."""
    result = Result(state=State.SUCCEEDED, body=text)
    return await asyncio.gather(*(broker.results.create(f"{call}.{number}", result) for number in numbers))


async def values(broker: Broker, call: str, count: int) -> dict[int, bytes]:
    found = await broker.results.get_many([f"{call}.{number}" for number in range(count)])
    return {int(key.rpartition(".")[2]): result.body for key, result in found.items()}


def test_results_that_come_together_are_one_commit_and_one_alone_waits_for_nobody(grouped: Mesh) -> None:
    async def commit(broker: Broker) -> None:
        call, stream = new_call_id(broker.token), broker.topology.bucket_stream("results")
        assert await create(broker, call, [0]) == [True]
        assert not await batched(broker, stream)
        assert all(await create(broker, call, range(1, 301)))
        assert len(await batched(broker, stream)) == 1, "the first goes at once, the others while it is under way"
        assert len(await values(broker, call, 301)) == 301

    grouped.ask(commit)


def test_a_refused_member_of_a_batch_takes_no_other_with_it(grouped: Mesh) -> None:
    async def commit(broker: Broker) -> None:
        call = new_call_id(broker.token)
        assert await create(broker, call, [40, 50], b"first") == [True, True]
        created = await create(broker, call, range(100), b"second")
        assert [number for number, one in enumerate(created) if not one] == [40, 50]
        found = await values(broker, call, 100)
        assert {number for number, body in found.items() if body == b"first"} == {40, 50}
        assert len(found) == 100

    grouped.ask(commit)


def test_two_of_one_result_in_a_batch_are_one(grouped: Mesh) -> None:
    async def commit(broker: Broker) -> None:
        call = new_call_id(broker.token)
        created = await create(broker, call, [*range(60), 30, *range(60)])
        assert sum(created) == 60
        assert len(await values(broker, call, 60)) == 60

    grouped.ask(commit)


def test_calls_that_were_accepted_before_are_accepted_again_in_a_batch(grouped: Mesh) -> None:
    async def submit(broker: Broker) -> None:
        call = new_call_id(broker.token)
        assert await broker.calls.submit_many(inputs(call, 10, 30)) == 10
        await asyncio.gather(*(broker.calls.submit(input) for input in inputs(call, 100)))
        assert await queued(broker, call) == set(range(100))

    grouped.ask(submit)


def test_a_server_that_falls_silent_over_a_batch_is_asked_again(grouped: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_ONE_OF_MANY", 1.0)

    async def submit(broker: Broker) -> None:
        call, told = new_call_id(broker.token), Told()

        async def disturbed() -> AsyncIterator[Input]:
            for input in inputs(call, MANY):
                if input.address.index == MANY // 2:
                    os.kill(grouped.server.pid, signal.SIGSTOP)
                    asyncio.get_running_loop().call_later(3, os.kill, grouped.server.pid, signal.SIGCONT)
                yield input

        assert await broker.calls.submit_many(disturbed(), told) == MANY
        assert await queued(broker, call) == set(range(MANY))
        found = await broker.connection.get_range(broker.topology.calls, 1, 2 * MANY)
        assert len(found) == MANY

    grouped.ask(submit)


def test_results_under_way_when_the_server_is_killed_are_stored_once(
    grouped: Mesh, own_server: Callable[..., NatsServer]
) -> None:
    async def commit(broker: Broker) -> None:
        call = new_call_id(broker.token)
        result = Result(state=State.SUCCEEDED, body=b"1")

        async def insist(number: int) -> None:
            while True:
                try:
                    await broker.results.create(f"{call}.{number}", result)
                    return
                except (Unanswered, NoResponders, StoreError):
                    await asyncio.sleep(0.05)

        under_way = [asyncio.create_task(insist(number)) for number in range(2_000)]
        await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        restart(grouped, own_server, "always")
        await asyncio.gather(*under_way)
        assert len(await values(broker, call, 2_000)) == 2_000

    grouped.ask(commit)
