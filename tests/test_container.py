"""The worker's side of a container, where its end comes before its beginning."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mesh import serialization
from mesh.config import Settings
from mesh.container import Container, Exit, environment
from mesh.frames import Outcome, Start, Work
from mesh.memory import MemoryWatch
from mesh.nursery import Nursery
from mesh.protocol import Failure
from mesh.records import Code
from mesh.runs import Assignment, Run
from mesh.worker import Worker


class Listener:
    """Notes what a container says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_ready(self, container: Container) -> None:
        self.said.append("ready")

    def on_start_failed(self, container: Container, failure: Failure, *, for_good: bool) -> None:
        self.said.append(f"start failed: {failure.summary}")

    def on_outcome(self, container: Container, assignment: Assignment, outcome: Outcome) -> None:
        self.said.append("outcome")

    def on_dropped(self, container: Container, assignment: Assignment) -> None:
        self.said.append("dropped")

    def on_output(self, container: Container, assignment: Assignment | None, stream: int, text: str) -> None:
        self.said.append(text)

    def on_waiting(self, container: Container) -> None:
        self.said.append("waiting")

    def on_timeout(self, container: Container, run: Run) -> None:
        self.said.append("timeout")

    def on_given_up(self, container: Container, assignment: Assignment) -> None:
        self.said.append("given up")

    def on_exit(self, container: Container, lost: Sequence[Assignment], exit: Exit) -> None:
        self.said.append(exit.text)


def start_frame(function: Callable[..., object] = len) -> Start:
    code = Code(pickled=serialization.dumps(function))
    return Start(
        app="a",
        function="f",
        version="1",
        environment="main",
        worker="w",
        container="c",
        code=code.to_json(),
        construction={},
        bundle="",
        result_limit=1 << 20,
        max_inputs=1,
    )


def assignment(seq: int, argument: object) -> Assignment:
    format, body = serialization.encode_arguments((argument,), {})
    return Assignment(Work(seq, "fc-1", 0, 1, "", format, body, True, "", False), None, 60.0)


async def test_a_container_is_stopped_and_killed_before_it_is_started(nursery: Nursery) -> None:
    """Its code is still being fetched, and room is wanted: its pool sees that it is stopping, and drops it."""
    listener = Listener()
    container = Container("c", listener, 30, MemoryWatch(), nursery)
    container.stop()
    assert container.stopping
    container.kill("no more room")
    assert listener.said == []


@pytest.mark.parametrize("turns", range(5))
async def test_a_container_that_is_stopped_while_it_is_started_ends_well(turns: int, nursery: Nursery) -> None:
    """Whenever it is: before the conversation begins, or before the container was told what to be."""
    listener = Listener()
    container = Container("c", listener, 30, MemoryWatch(), nursery)
    starting = asyncio.create_task(container.start(start_frame(), environment({}, {}), 30, None))
    for _ in range(1 + turns):
        await asyncio.sleep(0)
    container.stop()
    await starting
    began = time.monotonic()
    await container.ended()
    assert listener.said == ["ready", "exited with status 0"]
    assert time.monotonic() - began < 20  # not by being killed after its grace of 30 s


async def test_a_duty_that_fails_is_done_again() -> None:
    worker = Worker(Settings())
    times = 0

    def duty() -> None:
        nonlocal times
        times += 1
        raise AttributeError("a fault of ours")

    doing = asyncio.create_task(worker._regularly(0.001, duty))
    async with asyncio.timeout(10):
        while times < 3:
            await asyncio.sleep(0.001)
    doing.cancel()


async def test_an_input_that_has_run_is_not_given_back(nursery: Nursery) -> None:
    """Its outcome is under way when it is asked for back: given back, it would run twice."""
    listener = Listener()
    container = Container("c", listener, 30, MemoryWatch(), nursery)
    await container.start(start_frame(), environment({}, {}), 60, None)
    async with asyncio.timeout(60):
        while "ready" not in listener.said:
            await asyncio.sleep(0.01)
    for seq in (1, 2):
        container.run(assignment(seq, ["one"]))
    await asyncio.sleep(0)
    time.sleep(1.0)
    container.take_back()
    async with asyncio.timeout(60):
        while container.load:
            await asyncio.sleep(0.01)
    assert listener.said == ["ready", "outcome", "outcome"]
    container.kill("the test is over")
    await container.ended()


async def test_an_interrupt_that_was_not_seen_is_sent_again(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPython sees a signal that comes just before code blocks in C, in `time.sleep`, only with the next one."""

    def misses_one(begun: str) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        Path(begun).touch()
        signal.sigwait([signal.SIGUSR1])  # takes it away, as if it had come a moment too early
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        time.sleep(600)

    monkeypatch.setattr("mesh.container.FORCE_AFTER", 1000.0)
    listener = Listener()
    container = Container("c", listener, 10_000, MemoryWatch(), nursery)  # whose grace nobody waits for
    await container.start(start_frame(misses_one), environment({}, {}), 60, None)
    begun = tmp_path / "begun"
    given = assignment(1, str(begun))
    container.run(given)
    async with asyncio.timeout(60):
        while not begun.exists():
            await asyncio.sleep(0.01)
        container.cancel(given, "the test")
        while container.load:
            await asyncio.sleep(0.01)
    assert listener.said == ["ready", "outcome"]
    container.kill("the test is over")
    await container.ended()
