"""The time a try has: never cut short, always kept, whatever the code does with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mesh import FunctionCall, client
from mesh.exception import FunctionTimeoutError
from mesh.server import NatsServer
from tests.support import Mesh, alive, new_mesh, until

GRACE = 2.0  # seconds; short, for what ends only by being killed

LATE = """
    import asyncio, ctypes, mesh, os, re, subprocess, sys, threading, time
    app = mesh.App("late")

    def note(path, text):
        with open(path, "a") as file:
            file.write(f"{text} {time.monotonic()} {os.getpid()}\\n")

    def forever():
        while True:
            pass

    def swallows():
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass

    def backtracks():
        re.match(r"(a+)+$", "a" * 60 + "b")

    def sums():
        sum(range(10**12))

    def holds_the_lock():
        library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)

    def ignores_signals():
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        time.sleep(600)

    def waits_for_a_lock():
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    def waits_for_a_child():
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])

    def system():
        os.system(f"{sys.executable} -c 'import time; time.sleep(600)'")

    @app.function(timeout=1)
    def late(path, how):
        note(path, "begin")
        try:
            globals()[how]()
        finally:
            note(path, "finally")

    @app.function(timeout=1)
    async def late_async(path, how):
        note(path, "begin")
        try:
            if how == "awaits":
                await asyncio.sleep(600)
            elif how == "blocks":
                time.sleep(600)
            elif how == "spins":
                forever()
            else:
                while True:
                    try:
                        await asyncio.sleep(600)
                    except asyncio.CancelledError:
                        pass
        finally:
            note(path, "finally")

    @app.function(timeout=1)
    def cleans_up(path, seconds):
        note(path, "begin")
        try:
            time.sleep(600)
        finally:
            note(path, "finally")
            time.sleep(seconds)
            note(path, "clean")

    @app.function(timeout=1)
    def returns_late(path):
        try:
            time.sleep(600)
        except BaseException:
            return "late, but here"

    @app.function(timeout=2)
    def nearly(seconds):
        time.sleep(seconds)
        return seconds

    @app.function(timeout=2)
    async def nearly_async(seconds):
        await asyncio.sleep(seconds)
        return seconds

    @app.function(timeout=1.5, retries=mesh.Retries(max_retries=2, initial_delay=0, min_delay=0))
    def each_try(path):
        note(path, "begin")
        time.sleep(1 if mesh.current_attempt() == 3 else 600)
        return mesh.current_attempt(), mesh.last_error()
"""


@pytest.fixture(scope="module")
def patient(server: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh whose worker gives late calls little grace."""
    with new_mesh(server, tmp_path_factory.mktemp("late")) as mesh:
        mesh.start_worker("--containers", "24", MESH_CANCEL_GRACE=str(GRACE))
        yield mesh


@pytest.fixture(scope="module")
def late(patient: Mesh) -> Any:
    client.use_settings(patient.settings)
    return patient.deploy(LATE)


@pytest.fixture(autouse=True)
def _here(patient: Mesh) -> None:
    client.use_settings(patient.settings)


UNWINDS = ["forever", "backtracks", "waits_for_a_lock", "waits_for_a_child"]
KILLED = ["swallows", "sums", "holds_the_lock", "ignores_signals", "system"]
UNWINDS_ASYNC, KILLED_ASYNC = ["awaits", "blocks", "spins"], ["refuses"]


@pytest.fixture(scope="module")
def calls(patient: Mesh, late: Any) -> dict[str, FunctionCall[None]]:
    """One call of each kind, all of them at once."""
    client.use_settings(patient.settings)
    sync = {how: late.late.spawn(str(patient.ledger(how).path), how) for how in (*UNWINDS, *KILLED)}
    other = {how: late.late_async.spawn(str(patient.ledger(how).path), how) for how in (*UNWINDS_ASYNC, *KILLED_ASYNC)}
    return sync | other


@pytest.mark.parametrize("how", [*UNWINDS, *KILLED, *UNWINDS_ASYNC, *KILLED_ASYNC])
def test_no_code_outlives_its_time_and_none_is_cut_short(
    patient: Mesh, calls: dict[str, FunctionCall[None]], how: str
) -> None:
    with pytest.raises(FunctionTimeoutError, match=r"function 'late(_async)?' ran longer than its timeout of 1 s"):
        calls[how].get(timeout=60)
    status = calls[how].status()
    assert status.state == "timed_out"
    assert status.finished is not None
    assert status.started is not None
    assert 1.0 <= status.finished - status.started < 1 + GRACE + 10
    lines = [line.split() for line in patient.ledger(how).lines()]
    unwound = how in (*UNWINDS, *UNWINDS_ASYNC)
    assert [line[0] for line in lines] == (["begin", "finally"] if unwound else ["begin"])
    if not unwound:
        assert status.finished - status.started >= 1.0 + GRACE
        assert not alive(int(lines[0][2]))


def test_finally_has_its_grace_and_no_more(patient: Mesh, late: Any) -> None:
    short, long = patient.ledger("short"), patient.ledger("long")
    ends, does_not = late.cleans_up.spawn(str(short.path), GRACE / 4), late.cleans_up.spawn(str(long.path), 600)
    for call in (ends, does_not):
        with pytest.raises(FunctionTimeoutError):
            call.get(timeout=60)
    assert [line.split()[0] for line in short.lines()] == ["begin", "finally", "clean"]
    assert [line.split()[0] for line in long.lines()] == ["begin", "finally"]
    until(lambda: not alive(int(long.lines()[0].split()[2])), what="it is killed")


def test_what_is_returned_too_late_does_not_count(patient: Mesh, late: Any) -> None:
    with pytest.raises(FunctionTimeoutError):
        late.returns_late.remote(str(patient.ledger().path))


@pytest.mark.parametrize("name", ["nearly", "nearly_async"])
def test_what_ends_in_time_is_never_cut_short(late: Any, name: str) -> None:
    function = getattr(late, name)
    assert FunctionCall.gather(*(function.spawn(1.7) for _ in range(4))) == [1.7] * 4


def test_each_try_has_the_whole_time(patient: Mesh, late: Any) -> None:
    ledger = patient.ledger("tries")
    call = late.each_try.spawn(str(ledger.path))
    attempt, error = call.get(timeout=60)
    assert attempt == 3
    assert error.endswith("FunctionTimeoutError: function 'each_try' ran longer than its timeout of 1.5 s")
    first, second, third = (float(line.split()[1]) for line in ledger.lines())
    assert second - first >= 1.5
    assert third - second >= 1.5


def test_a_container_that_begins_late_costs_the_call_no_time(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(LATE)
    worker = mesh.start_worker("--containers", "1")
    assert module.nearly.remote(0) == 0
    (container,) = worker.containers()
    os.kill(container, signal.SIGSTOP)
    call = module.nearly.spawn(1.5)
    time.sleep(3)  # more than its timeout, from when it was sent there
    os.kill(container, signal.SIGCONT)
    assert call.get(timeout=30) == 1.5


def test_a_container_that_never_begins_is_killed(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(LATE)
    worker = mesh.start_worker("--containers", "1", MESH_CANCEL_GRACE="1")
    assert module.nearly.remote(0) == 0
    (container,) = worker.containers()
    os.kill(container, signal.SIGSTOP)
    with pytest.raises(FunctionTimeoutError):
        module.nearly.remote(0)
    until(lambda: not alive(container))


def test_waiting_for_a_container_takes_no_time_of_the_calls(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(LATE)
    mesh.start_worker("--containers", "1")
    assert FunctionCall.gather(*(module.nearly.spawn(0.8) for _ in range(4))) == [0.8] * 4  # the last waits 2.4 s
