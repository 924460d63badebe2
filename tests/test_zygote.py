"""Where containers come from: quick, alike, nobody's secrets in them, and nothing left of them whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from mesh import nursery as nurseries
from mesh import processes, serialization
from mesh.container import Container, Exit, environment
from mesh.frames import Outcome, Start, Work
from mesh.memory import MemoryWatch
from mesh.nursery import Nursery
from mesh.protocol import Format
from mesh.records import Code
from mesh.runs import Assignment
from tests.support import ROOT, Mesh, alive, children_of, until


class One:
    """A container with a function of ours, and what it says."""

    def __init__(
        self, nursery: Nursery, function: Callable[..., Any], env: Mapping[str, str] | None = None, bundle: str = ""
    ) -> None:
        code = Code(pickled=cloudpickle.dumps(function))
        self._start = Start("a", "f", "v", "main", "w", "c", code.to_json(), {}, bundle, 1 << 20, 1)
        self._variables = environment(env or {}, {})
        self._seq = 0
        self._ready = asyncio.Event()
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.exit: Exit | None = None
        self.lost = 0
        self.output = ""
        self.container = Container("ta-test-1", self, 30, MemoryWatch(), nursery)

    async def begin(self) -> One:
        await self.container.start(self._start, self._variables, 60, None)
        async with asyncio.timeout(60):
            await self._ready.wait()
        assert self.exit is None, self.output
        return self

    def give(self, *args: Any) -> None:
        self._seq += 1
        format, body = serialization.encode_arguments(args, {})
        work = Work(self._seq, "fc-1", 0, 1, "", format, body, True, "")
        self.container.run(Assignment(work, None, 60.0))

    async def call(self, *args: Any) -> Any:
        self.give(*args)
        async with asyncio.timeout(60):
            outcome = await self._outcomes.get()
        assert outcome.state == "succeeded", outcome.body
        return serialization.decode(Format(outcome.format), outcome.body)

    async def end(self) -> Exit:
        self.container.stop()
        await self.container.ended()
        assert self.exit is not None
        return self.exit

    # --- as its pool ---

    def on_ready(self, container: Container) -> None:
        self._ready.set()

    def on_outcome(self, container: Container, assignment: Assignment, outcome: Outcome) -> None:
        self._outcomes.put_nowait(outcome)

    def on_output(self, container: Container, assignment: Assignment | None, stream: int, text: str) -> None:
        self.output += text

    def on_exit(self, container: Container, lost: Sequence[Assignment], exit: Exit) -> None:
        self.exit, self.lost = exit, len(lost)
        self._ready.set()

    def ignore(self, *_: object) -> None: ...

    on_start_failed = on_dropped = on_waiting = on_timeout = ignore


async def one(nursery: Nursery, function: Callable[..., Any], **env: str) -> One:
    return await One(nursery, function, env).begin()


async def eventually(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


def zygotes(nursery: Nursery) -> list[int]:
    return sorted(zygote.pid for zygote in nursery._all)


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


# --- what a container finds itself in --------------------------------------------------------------------------------


async def test_a_container_is_named_and_stands_by_itself(nursery: Nursery) -> None:
    def look() -> dict[str, Any]:
        import os
        import signal
        import sys
        import threading
        from pathlib import Path

        def opened(fd: int) -> str:
            try:
                return str(Path(f"/proc/self/fd/{fd}").readlink()).split(":")[0]
            except OSError:
                return ""  # the list itself

        signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP)}
        return {
            "leads": os.getpid() == os.getsid(0) == os.getpgid(0),
            "signals": [str(handler) for handler in signals.values()],
            "interrupts": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "wakeup": signal.set_wakeup_fd(-1),
            "argv": sys.argv,
            "threads": threading.active_count(),
            "files": [
                opened(fd) for fd in sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) if opened(fd)
            ],
            "cwd": str(Path.cwd()),
            "variables": dict(os.environ),
        }

    it = await one(nursery, look, OWN="mine")
    found = await it.call()
    assert found.pop("leads")
    assert found.pop("signals") == ["0", "0", "1", "0"]  # as in any Python program: default, but for SIGPIPE
    assert found.pop("interrupts")
    assert found.pop("blocked") == []
    assert found.pop("wakeup") == -1
    assert found.pop("argv") == ["f"]
    assert found.pop("threads") == 1
    kinds = found.pop("files")
    assert kinds[:3] == ["/dev/null", "pipe", "pipe"]
    assert sorted(kinds[3:]) == ["/memfd", "socket", "socket"]  # its page, and its two sockets: none of the zygote's
    assert Path(found.pop("cwd")).name.startswith("ta-test-1-")
    variables = found.pop("variables")
    assert variables.pop("MESH_TASK_ID") == "ta-test-1"
    assert variables == {**environment({"OWN": "mine"}, {}), **nursery.mark}
    (zygote,) = zygotes(nursery)
    (command,) = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children_of(zygote)]
    assert command.rstrip("\0") == "mesh container ta-test-1 a.f"
    assert Path(f"/proc/{it.container.pid}/comm").read_text() == "ta-test-1\n"
    assert (await it.end()).text == "exited with status 0"


async def test_a_zygote_knows_no_secret(nursery: Nursery) -> None:
    def tell() -> str:
        import os

        return os.environ["PASSWORD"]

    secret = "a-word-" + os.urandom(8).hex()
    it = await one(nursery, tell, PASSWORD=secret)
    assert await it.call() == secret
    (zygote,) = zygotes(nursery)
    assert secret.encode() not in memory_of(zygote)
    assert b"MESH_NURSERY" in memory_of(zygote)  # it would have been found
    assert secret.encode() not in Path(f"/proc/{zygote}/environ").read_bytes()
    await it.end()


def memory_of(pid: int) -> bytes:
    """Everything a process may write to."""
    found = bytearray()
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps:
            if " rw" in line:
                start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
                with contextlib.suppress(OSError):  # it has given that back meanwhile
                    memory.seek(start)
                    found += memory.read(end - start)
    return bytes(found)


async def test_containers_draw_different_numbers(nursery: Nursery) -> None:
    def draw() -> list[str]:
        import random
        import secrets
        import tempfile
        import uuid

        return [str(random.random()), secrets.token_hex(8), str(uuid.uuid4()), tempfile.mktemp()]

    draws = []
    for _ in range(3):
        it = await one(nursery, draw)
        draws += await it.call()
        await it.end()
    assert len(set(draws)) == len(draws)


async def test_what_a_site_loads_is_seeded_anew_too(nursery: Nursery, tmp_path: Path) -> None:
    """numpy.random keeps its state over a fork. Nobody loads it but a .pth file, or a sitecustomize as this one."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").touch()
    (tmp_path / "numpy/random.py").write_text("seeded = 0\ndef seed():\n    global seeded\n    seeded += 1\n")
    (tmp_path / "sitecustomize.py").write_text("import numpy.random\n")

    def look() -> int:
        import sys

        return int(sys.modules["numpy.random"].seeded)

    it = await one(nursery, look, PYTHONPATH=str(tmp_path))
    assert await it.call() == 1
    await it.end()


async def test_variables_that_python_reads_as_it_starts_have_a_zygote_of_their_own(nursery: Nursery) -> None:
    def look() -> tuple[int, str, str, bool]:
        import os
        import sys
        import time

        return (
            os.getppid(),
            str(hash("text")),
            time.strftime("%Z", time.gmtime(0)) and time.tzname[0],
            sys.flags.dev_mode,
        )

    plain = await one(nursery, look)
    zoned = await one(nursery, look, TZ="XYZ-3", ANY="thing")
    seeded = await one(nursery, look, PYTHONHASHSEED="7")
    again = await one(nursery, look, PYTHONHASHSEED="7")
    developed = await one(nursery, look, PYTHONHASHSEED="7", PYTHONDEVMODE="1")
    answers = [await it.call() for it in (plain, zoned, seeded, again, developed)]
    parents = [parent for parent, _, _, _ in answers]
    assert parents[0] == parents[1] != parents[2] == parents[3] != parents[4]
    assert sorted(set(parents)) == zygotes(nursery)
    assert answers[1][2] == "XYZ"
    assert answers[2][1] == answers[3][1] == answers[4][1] != answers[0][1]
    assert [dev for _, _, _, dev in answers] == [False, False, False, False, True]
    for it in (plain, zoned, seeded, again, developed):
        await it.end()


async def test_a_zygote_without_containers_ends_after_a_while(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nurseries, "_IDLE_LIMIT", 0.2)
    nursery.warm(environment({}, {}))
    (kept,) = zygotes(nursery)
    it = await one(nursery, len, PYTHONHASHSEED="7")
    await (await one(nursery, len)).end()
    await asyncio.sleep(0.5)  # longer than an idle one has
    assert len(zygotes(nursery)) == 2
    await it.end()
    await eventually(lambda: zygotes(nursery) == [kept], "the other one is gone")
    await asyncio.sleep(0.5)
    assert await (await one(nursery, len)).call("four") == 4
    assert zygotes(nursery) == [kept]


# --- user code that starts processes ---------------------------------------------------------------------------------

STARTING = """
    import mesh, multiprocessing, os, signal, subprocess, sys, threading, time
    import asyncio
    app = mesh.App("starting-processes")

    def square(x):
        return x * x

    @app.function()
    def pool(method):
        with multiprocessing.get_context(method).Pool(2) as pool:
            return pool.map(square, range(5))

    @app.function()
    def program():
        return subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True, text=True).stdout

    @app.function()
    async def async_program():
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(7)")
        return await child.wait()

    @app.function()
    def children_seen():
        seen = []
        signal.signal(signal.SIGCHLD, lambda *_: seen.append(os.waitpid(-1, 0)))
        child = os.fork()
        if child == 0:
            os._exit(3)
        while not seen:
            time.sleep(0.01)
        return seen[0][0] == child and os.waitstatus_to_exitcode(seen[0][1])

    @app.function()
    def threads():
        done = []
        some = [threading.Thread(target=done.append, args=(n,)) for n in range(3)]
        for thread in some: thread.start()
        for thread in some: thread.join()
        return sorted(done)

    @app.function()
    def closes():
        os.closerange(3, 100)
        return "closed"

    @app.function()
    def kill_the_zygote(path):
        with open(path, "a") as file:
            file.write(f"{os.getppid()}\\n")
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    @app.function()
    def daemon(path):
        '''A process that has left its parent, its group and its session, and names no variable of ours.'''
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                with open(path, "a") as file:
                    file.write(f"{os.getpid()}\\n")
                os.execve("/bin/sleep", ["sleep", "600"], dict(os.environ))
            os._exit(0)
        os.waitpid(child, 0)
        while not (os.path.exists(path) and open(path).read().endswith("\\n")):
            time.sleep(0.01)
        return os.getpid()
"""


@pytest.fixture(scope="module")
def module(_shared: Mesh) -> Any:
    from mesh import client

    client.use_settings(_shared.settings)
    return _shared.deploy(STARTING)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_function_uses_a_pool_of_processes(mesh: Mesh, module: Any, method: str) -> None:
    assert module.pool.remote(method) == [0, 1, 4, 9, 16]


def test_a_function_starts_programs_and_threads(mesh: Mesh, module: Any) -> None:
    assert module.program.remote() == "5\n"
    assert module.async_program.remote() == 7
    assert module.children_seen.remote() == 3
    assert module.threads.remote() == [0, 1, 2]
    assert module.closes.remote() == "closed"
    assert module.closes.remote() == "closed"


async def test_a_module_of_the_users_goes_before_one_that_is_loaded(nursery: Nursery, tmp_path: Path) -> None:
    """A zygote has loaded some that few programs use: a name that is free elsewhere is not taken here."""
    (tmp_path / "quopri.py").write_text("def own(): return 'own'")

    def use() -> str:
        import quopri

        return quopri.own()  # type: ignore[attr-defined,no-any-return]

    nursery.warm(environment({}, {}))
    (zygote,) = zygotes(nursery)
    await eventually(lambda: b"/quopri.py" in memory_of(zygote), "it is loaded")
    it = One(nursery, use, bundle=str(tmp_path))
    await it.begin()
    assert await it.call() == "own"
    await it.end()


# --- ends ------------------------------------------------------------------------------------------------------------


def daemon_of(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text(), what="the daemon has started"))


def test_a_daemon_ends_with_its_container(own_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    mesh = own_mesh()
    module = mesh.deploy(STARTING)
    worker = mesh.start_worker()
    container = module.daemon.remote(str(tmp_path / "daemon"))
    daemon = daemon_of(tmp_path / "daemon")
    assert alive(daemon)  # as long as its container
    assert children_of(container) == [daemon]
    assert worker.containers() == [container]
    os.kill(container, signal.SIGTERM)
    until(lambda: not alive(container) and not alive(daemon))
    (zygote,) = worker.zygotes()
    until(lambda: not children_of(zygote), what="and is waited for")


@pytest.mark.parametrize("who", ["worker", "zygote", "container", "group"])
def test_a_daemon_ends_whoever_is_killed(own_mesh: Callable[..., Mesh], tmp_path: Path, who: str) -> None:
    mesh = own_mesh()
    module = mesh.deploy(STARTING)
    worker = mesh.start_worker()
    container = module.daemon.remote(str(tmp_path / "daemon"))
    daemon = daemon_of(tmp_path / "daemon")
    (zygote,) = worker.zygotes()
    match who:
        case "worker":
            worker.kill()
        case "zygote":
            os.kill(zygote, signal.SIGKILL)
        case "container":
            os.kill(container, signal.SIGKILL)
        case _:
            os.killpg(container, signal.SIGKILL)
    until(lambda: not alive(container) and not alive(daemon))
    if who == "worker":
        until(lambda: not alive(zygote))
        return
    if who == "zygote":
        until(lambda: not children_of(worker.pid), what="the worker has waited for all of them")
    assert module.program.remote() == "5\n"
    assert (worker.zygotes() == [zygote]) == (who != "zygote")


def test_an_input_that_kills_its_zygote_comes_to_an_end(own_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    mesh = own_mesh()
    module = mesh.deploy(STARTING)
    worker = mesh.start_worker()
    three = r"(container killed by signal 9 \(SIGKILL\) on \S+(; )?){3}$"
    with pytest.raises(Exception, match=f"'kill_the_zygote' crashed 3 times: {three}"):
        module.kill_the_zygote.remote(str(tmp_path / "zygotes"))
    assert len(set((tmp_path / "zygotes").read_text().split())) == 3
    assert module.program.remote() == "5\n"
    assert worker.log.count("its containers with it") == 3


def test_nothing_is_left_of_a_worker_that_stops(own_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    mesh = own_mesh()
    module = mesh.deploy(STARTING)
    worker = mesh.start_worker()
    module.daemon.remote(str(tmp_path / "daemon"))
    left = [daemon_of(tmp_path / "daemon"), *worker.zygotes(), *worker.containers()]
    assert len(left) == 3
    assert worker.stop() == 0
    assert not [pid for pid in left if alive(pid)]


async def test_a_zygote_that_is_killed_is_replaced_at_the_next_need(nursery: Nursery) -> None:
    others = set(processes.children())
    it = await one(nursery, time.sleep)
    it.give(600)
    first = zygotes(nursery)
    os.kill(first[0], signal.SIGKILL)
    await it.container.ended()
    assert it.exit is not None
    assert (it.exit.text, it.exit.lapsed, it.lost) == ("killed by signal 9 (SIGKILL)", False, 1)
    assert it.exit.peak > 10 << 20  # the worker has waited for it
    assert await (await one(nursery, len)).call("four") == 4
    assert zygotes(nursery) != first
    await eventually(
        lambda: {*processes.children()} - others == {*zygotes(nursery)}, "nothing else is left to wait for"
    )


async def test_a_zygote_that_does_not_answer_is_killed(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    await (await one(nursery, len)).end()
    (hung,) = zygotes(nursery)
    os.kill(hung, signal.SIGSTOP)
    fork = nurseries._Zygote.fork

    async def impatient(self: Any, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(nurseries, "_FORK_LIMIT", 0.2 if self.pid == hung else 60.0)
            return await fork(self, *arguments)

    monkeypatch.setattr(nurseries._Zygote, "fork", impatient)
    it = await one(nursery, len)
    assert await it.call("four") == 4
    assert hung not in zygotes(nursery)
    await it.end()


async def test_a_python_that_does_not_start(nursery: Nursery) -> None:
    before = open_files(os.getpid())
    it = One(nursery, len, {"PYTHONHOME": "/nowhere"})
    with pytest.raises(OSError, match="no process for a container: 3 zygotes ended instead; it ended with status 1"):
        await it.begin()
    assert open_files(os.getpid()) == before


async def test_a_container_that_is_killed_before_it_is_forked(nursery: Nursery) -> None:
    it = One(nursery, len)
    starting = asyncio.create_task(it.begin())
    await asyncio.sleep(0)
    it.container.kill("no more room")
    with pytest.raises(AssertionError):
        await starting
    await it.container.ended()
    assert it.exit is not None
    assert it.exit.text == "killed: no more room"


async def test_many_starts_leave_nothing_open(nursery: Nursery) -> None:
    async def use(count: int) -> None:
        for _ in range(count):
            it = await one(nursery, len)
            assert await it.call("four") == 4
            await it.end()

    await use(2)
    (zygote,) = zygotes(nursery)
    before = open_files(os.getpid()), open_files(zygote)
    await asyncio.gather(*(use(25) for _ in range(8)))
    assert (open_files(os.getpid()), open_files(zygote)) == before
    assert children_of(zygote) == []
    assert zygotes(nursery) == [zygote]


# --- a moment to live until ------------------------------------------------------------------------------------------


async def test_a_container_ends_at_its_moment(nursery: Nursery) -> None:
    it = One(nursery, time.sleep)
    moment = time.monotonic() + 3600
    it.container.live_until(moment)  # before it is started
    await it.begin()
    await it.call(0)
    it.give(600)
    moment = time.monotonic() + 0.3
    it.container.live_until(moment)
    await it.container.ended()
    assert time.monotonic() >= moment
    assert it.exit is not None
    assert (it.exit.lapsed, it.exit.text, it.lost) == (True, "killed: its slot could not be kept", 1)


async def test_a_container_whose_moment_is_put_off_lives_on(nursery: Nursery) -> None:
    it = await one(nursery, time.sleep)
    for _ in range(10):
        it.container.live_until(time.monotonic() + 30)
        await it.call(0.01)
    it.container.live_until(time.monotonic() + 1)
    it.container.live_until(math.inf)
    await it.call(1.5)
    assert not (await it.end()).lapsed


PAUSED = """
import asyncio, sys, time
from mesh.nursery import Nursery
from tests.test_zygote import One, one

async def main():
    nursery = Nursery()
    it = await one(nursery, time.sleep)
    it.give(600)
    it.container.live_until(time.monotonic() + 1.5)
    print(it.container.pid, flush=True)
    await it.container.ended()
    print(it.exit.text, it.exit.lapsed, it.lost, flush=True)
    await nursery.close()

asyncio.run(main())
"""


def test_a_container_ends_at_its_moment_while_its_worker_is_paused() -> None:
    worker = subprocess.Popen([sys.executable, "-c", PAUSED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert worker.stdout is not None
    with worker.stdout:
        container = int(worker.stdout.readline())
        os.kill(worker.pid, signal.SIGSTOP)
        assert alive(container)
        until(lambda: not alive(container))
        os.kill(worker.pid, signal.SIGCONT)
        assert worker.stdout.readline() == "killed: its slot could not be kept True 1\n"
    assert worker.wait(30) == 0
