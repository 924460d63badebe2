"""Memory: what is counted, who is killed for it, and what is said of that."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cloudpickle
import pytest

from mesh import memory
from mesh.container import Container, Exit, environment
from mesh.exception import InternalFailure, OutOfMemoryError
from mesh.frames import Start, Work
from mesh.memory import MIB, MemoryWatch
from mesh.nursery import Nursery
from mesh.records import Code
from mesh.runs import Assignment
from tests.support import Mesh, until

# --- what is counted -------------------------------------------------------------------------------------------------

HOLDS = """
import mmap, os, sys, time
kind, size = sys.argv[1], int(sys.argv[2]) << 20

def own():
    return bytearray(os.urandom(4096) * (size >> 12))

def forks(fill):
    told, tell = os.pipe()
    for _ in range(4):
        if os.fork() == 0:
            held = fill()
            os.write(tell, b"x")
            time.sleep(600)
    for _ in range(4):
        os.read(told, 1)

def write_to(shared):
    for at in range(0, size, 4096):
        shared[at] = 1

if kind == "own":
    held = own()
elif kind == "forks":
    held = own()
    forks(lambda: sum(held[at] for at in range(0, size, 4096)))
elif kind == "each":
    forks(own)
elif kind == "shared":
    held = mmap.mmap(-1, size)
    forks(lambda: write_to(held))
elif kind == "file":
    with open(sys.argv[3], "wb+") as file:
        for _ in range(size >> 20):
            file.write(b"x" * (1 << 20))
        file.flush()
        held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(held[at] for at in range(0, size, 4096))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a session whose processes hold memory in some way; returns its id."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, size: int) -> int:
        arguments = [sys.executable, "-c", HOLDS, kind, str(size), str(tmp_path / "file")]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process.pid

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def exceeds(session: int, limit: int, seconds: float) -> bool:
    """Whether a session is found above a limit, in MiB, within so many seconds."""
    found = asyncio.Event()
    watch = MemoryWatch()
    watch.enter(session, limit * MIB, found.set)
    try:
        async with asyncio.timeout(seconds):
            await found.wait()
    except TimeoutError:
        return False
    finally:
        watch.leave(session)
    return True


@pytest.mark.parametrize(
    ("kind", "size", "above", "below"),
    [
        ("own", 200, 180, 300),
        ("each", 100, 350, 550),  # four processes with 100 MiB each
        ("forks", 200, 180, 300),  # one process's memory, which four others see too
        ("shared", 200, 180, 300),
        ("file", 300, None, 150),  # what was only read the system takes back when it needs to
    ],
)
async def test_memory_that_several_see_counts_once(
    hold: Callable[..., int], kind: str, size: int, above: int | None, below: int
) -> None:
    session = hold(kind, size)
    if above is not None:
        assert await exceeds(session, above, 20)
    assert not await exceeds(session, below, 1)


async def test_nothing_is_looked_at_once_the_containers_are_gone() -> None:
    watch = MemoryWatch()
    watch.enter(os.getpid(), None, lambda: None)
    watch.enter(os.getppid(), 1 << 40, lambda: None)
    timer = watch._timer
    assert timer is not None
    watch.leave(os.getppid())
    assert not timer.cancelled()
    watch.leave(os.getpid())
    assert watch._timer is None


# A handmade /proc: what cannot be made to happen here, in files of the kernel's own form.


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_PROC", str(tmp_path))
    return tmp_path


def test_a_kernel_that_tells_no_more_than_what_is_resident(proc: Path) -> None:
    (proc / "7").mkdir()
    assert memory._exact(7, 5 * MIB) == 5 * MIB  # no smaps_rollup, or it is not for us to read
    (proc / "7/smaps_rollup").write_text("0-1 ---p 0 00:00 0   [rollup]\nRss:   9 kB\nPss:   9 kB\n")
    assert memory._exact(7, 5 * MIB) == 5 * MIB  # Linux before 5.4


def test_a_process_that_has_ended_holds_nothing(proc: Path) -> None:
    assert memory._exact(7, 5 * MIB) == 0
    (proc / "7").mkdir()
    (proc / "7/smaps_rollup").write_text("")
    assert memory._exact(7, 5 * MIB) == 0


def test_the_systems_own_kills_are_counted(proc: Path) -> None:
    assert memory.oom_kills() == 0
    (proc / "vmstat").write_text("pgfault 12\noom_kill 3\nnuma_hit 7\n")
    assert memory.oom_kills() == 3


async def test_a_kill_of_the_system_is_recent_for_two_seconds(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_RECENT", 0.3)
    (proc / "vmstat").write_text("oom_kill 3\n")
    watch = MemoryWatch()
    assert not watch.system_killed()
    watch.enter(1, None, lambda: None)
    assert not watch.system_killed()
    (proc / "vmstat").write_text("oom_kill 4\n")
    assert watch.system_killed()
    while watch.system_killed():
        await asyncio.sleep(0.05)
    watch.leave(1)


# --- what a container's end is called --------------------------------------------------------------------------------


class Ends:
    """Listens to one container, and gives it something to do."""

    def __init__(self) -> None:
        self.exit: Exit | None = None
        self.running = asyncio.Event()

    def on_ready(self, container: Container) -> None:
        body = b'{"args": [], "kwargs": {}}'
        work = Work(1, "fc-" + "0" * 26, 0, 1, "", "json", body, True, "", False)
        container.run(Assignment(work, None, 60))
        self.running.set()

    def on_exit(self, container: Container, lost: Sequence[Assignment], exit: Exit) -> None:
        assert len(lost) == 1
        self.exit = exit

    def ignore(self, *_: object) -> None: ...

    on_start_failed = on_outcome = on_dropped = on_output = on_waiting = on_timeout = on_given_up = ignore


@pytest.mark.parametrize(
    ("kills", "limit", "text"),
    [
        (1, None, r"out of memory: killed by the system's out-of-memory killer, no limit of its own, peak \d+ MiB"),
        (1, 4096, r"out of memory: killed by the system's out-of-memory killer, limit 4,096 MiB, peak \d+ MiB"),
        (0, None, r"killed by signal 9 \(SIGKILL\)"),
    ],
)
async def test_a_sigkill_while_the_system_kills_for_memory(
    proc: Path, nursery: Nursery, kills: int, limit: int | None, text: str
) -> None:
    (proc / "vmstat").write_text("oom_kill 3\n")
    code = Code(pickled=cloudpickle.dumps(lambda: time.sleep(600)), name="sleeps", python="3")
    start = Start("a", "sleeps", "v", "main", "w", "c", code.to_json(), {}, "", 1 << 20, 1)
    ends = Ends()
    container = Container("c", ends, 30, MemoryWatch(), nursery)
    await container.start(start, environment({}, {}), 60, limit)
    await ends.running.wait()
    (proc / "vmstat").write_text(f"oom_kill {3 + kills}\n")
    os.kill(container.pid, signal.SIGKILL)
    await container.ended()
    assert ends.exit is not None
    assert re.fullmatch(text, ends.exit.text)


# --- what becomes of a call ------------------------------------------------------------------------------------------

HUNGRY = """
    import mesh, os, subprocess, sys, time
    app = mesh.App({name!r})

    def note(path):
        with open(path, "a") as file:
            file.write("begin\\n")

    @app.function(memory=150)
    def grow(path, children=False):
        note(path)
        if children:
            subprocess.run([sys.executable, "-c", "held = b'x' * (1 << 28); import time; time.sleep(60)"])
        held = []
        while True:
            held.append(os.urandom(1 << 20))

    @app.function(memory=(64, 150))
    def fits(size):
        return len(os.urandom(size << 20))

    @app.function(memory=150)
    def refuses():
        return bytearray(1 << 62)

    @app.function(memory=150, retries=mesh.Retries(max_retries=1, initial_delay=0, min_delay=0))
    def learns(path):
        note(path)
        if "out of memory" in mesh.last_error():
            return mesh.last_error(), mesh.current_attempt()
        held = b"x" * (1 << 28)
        time.sleep(60)

    @app.function()
    def score():
        with open("/proc/self/oom_score_adj") as file, open(f"/proc/{{os.getppid()}}/oom_score_adj") as worker:
            return int(file.read()), int(worker.read())
"""


@pytest.fixture
def hungry(mesh: Mesh, request: pytest.FixtureRequest) -> object:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    module = mesh.deploy(HUNGRY.format(name=name[:64]))
    yield module
    assert module.fits.remote(1) == 1 << 20  # the worker is well


@pytest.mark.parametrize("children", [False, True])
def test_a_container_above_its_limit_is_killed_and_the_error_says_so(
    mesh: Mesh, hungry: object, children: bool
) -> None:
    ledger = mesh.ledger(f"grow-{children}")
    call = hungry.grow.spawn(str(ledger.path), children)
    told = r"'grow' crashed 3 times: container out of memory: killed by its worker, limit 150 MiB, peak \d{3,5} MiB on "
    with pytest.raises(OutOfMemoryError, match=told) as caught:
        call.get(timeout=60)
    assert str(caught.value).count("limit 150 MiB") == 3
    assert isinstance(caught.value, InternalFailure)
    assert ledger.count() == 3
    assert (call.status().state, call.status().attempts) == ("failed", 1)


def test_a_container_within_its_limit_is_left_alone(hungry: object) -> None:
    assert hungry.fits.remote(80) == 80 << 20


def test_the_function_sees_that_it_was_out_of_memory(mesh: Mesh, hungry: object) -> None:
    ledger = mesh.ledger("learns")
    error, attempt = hungry.learns.remote(str(ledger.path))
    assert "limit 150 MiB" in error
    assert attempt == 1  # a crash is no try
    assert ledger.count() == 2


def test_a_memory_error_of_the_users_stays_the_users(hungry: object) -> None:
    with pytest.raises(MemoryError):
        hungry.refuses.remote()


def test_the_system_takes_containers_before_their_worker(hungry: object) -> None:
    container, worker = hungry.score.remote()
    assert container == max(800, worker)


def test_too_little_memory_for_its_imports(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    source = """
        import mesh, time
        app = mesh.App("starving")
        if not mesh.is_local():
            held = b"x" * (1 << 28)
            time.sleep({pause})

        @app.function(memory={memory})
        def f():
            return len(held)
    """
    module = mesh.deploy(source.format(memory=100, pause=60))
    call = module.f.spawn()
    told = "its container out of memory: killed by its worker, limit 100 MiB, peak "
    until(lambda: told in call.status().waiting_for, what="the worker says why")
    assert call.status().state == "queued"
    assert told in call.status().last_error
    mesh.redeploy(module, source.format(memory=400, pause=0))
    assert call.get(timeout=30) == 1 << 28
