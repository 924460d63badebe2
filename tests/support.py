"""What the tests share: a mesh on a real nats-server, user modules made on the fly, and waiting by condition."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mesh import client
from mesh._sync import bridge
from mesh.broker import Broker
from mesh.config import Settings
from mesh.deploy import import_file
from mesh.server import NatsServer

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"calls_size": "64M", "results_size": "64M", "logs_size": "16M", "dead_size": "16M", "blobs_size": "64M"}


def until(condition: Callable[[], T], timeout: float = 20.0, what: str = "") -> T:
    """Wait for a condition, and return what made it true. A wait that ends without is a failure with its name."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or condition.__name__}")
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def processes(text: str) -> list[int]:
    """Ids of the processes whose command line holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def parent_of(pid: int) -> int:
    """The process that started another one, or adopted it."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(parent: int, command: bytes = b"") -> list[int]:
    """Ids of the processes that a process is the parent of, and whose command line begins so."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if parent_of(int(entry.name)) == parent and (entry / "cmdline").read_bytes().startswith(command):
                    found.append(int(entry.name))
    return found


@dataclass
class WorkerProcess:
    """A worker in a process of its own, with its log."""

    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def kill(self) -> None:
        """SIGKILL: no chance to say goodbye."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM, and its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def zygotes(self) -> list[int]:
        """Processes that its containers are forked from."""
        return children_of(self.pid, b"mesh zygote")

    def containers(self) -> list[int]:
        """Processes of its containers. (Named once they have their first frame; what they leave is not named so.)"""
        return [pid for zygote in self.zygotes() for pid in children_of(zygote, b"mesh container ")]


@dataclass
class Mesh:
    """One environment on a server, and what a test starts in it."""

    server: NatsServer
    directory: Path
    settings: Settings
    workers: list[WorkerProcess] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of programs that use this mesh."""
        settings = self.settings
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}
        return {
            **kept,
            **{f"MESH_{name.upper()}": value for name, value in SMALL.items()},
            "HOME": str(self.directory / "home"),
            "MESH_NATS_URL": settings.nats_url,
            "MESH_ENVIRONMENT": settings.environment,
            "MESH_ACK_WAIT": str(settings.ack_wait),
            "MESH_CALLER_SILENCE": str(settings.caller_silence),
            "MESH_SLOT_TTL": str(settings.slot_ttl),
            "MESH_MAX_AGE": str(settings.max_age),
            "MESH_CACHE_DIR": str(self.directory / "cache"),
            "MESH_STATE_DIR": str(self.directory / "state"),
            "MESH_DATA_DIR": str(self.directory / "data"),
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }

    # --- workers -----------------------------------------------------------------------------------------------------

    def start_worker(self, *arguments: str, inside: Sequence[str] = (), **variables: str) -> WorkerProcess:
        """Start a worker, `inside` another command perhaps; returns when it is ready."""
        log = self.directory / f"worker-{len(self.workers)}.log"
        ours, theirs = socket.socketpair()
        with log.open("wb") as output, ours:
            process = subprocess.Popen(
                [*inside, sys.executable, "-m", "mesh", "worker", "--ready-fd", str(theirs.fileno()), *arguments],
                env={**self.variables, **variables},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            theirs.close()
            worker = WorkerProcess(process, log)
            self.workers.append(worker)
            ours.settimeout(30)
            if not ours.recv(1):
                raise AssertionError(f"the worker ended with {process.wait()}: {worker.log}")
        return worker

    # --- user code ---------------------------------------------------------------------------------------------------

    def write(self, source: str, name: str = "", folder: str = "src") -> Path:
        """A user's file."""
        path = self.directory / folder / f"{name or f'user_{secrets.token_hex(4)}'}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    def load(self, source: str, name: str = "") -> ModuleType:
        """A user's module, imported here."""
        module = import_file(self.write(source, name))
        self.modules.append(module.__name__)
        return module

    def deploy(self, source: str, name: str = "") -> ModuleType:
        """A user's module, its `app` deployed."""
        module = self.load(source, name)
        module.app.deploy()
        return module

    def redeploy(self, module: ModuleType, source: str) -> ModuleType:
        """Another version of the same module, deployed."""
        path = Path(module.__file__ or "")
        path.write_text(textwrap.dedent(source))
        os.utime(path, (time.time() + 10, time.time() + 10))  # or Python trusts its cache of the old source
        fresh = importlib.reload(module)
        fresh.app.deploy()
        return fresh

    # --- looking -----------------------------------------------------------------------------------------------------

    def ask(self, work: Callable[[Broker], Coroutine[Any, Any, T]]) -> T:
        """Do something with a broker of this environment."""

        async def connected() -> T:
            return await work(await client.broker())

        return bridge().run(connected())

    def cli(
        self, *arguments: str, check: bool = True, timeout: float = 60, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the `mesh` command."""
        done = subprocess.run(
            [sys.executable, "-m", "mesh", *arguments],
            env={**self.variables, **variables},
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"mesh {' '.join(arguments)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def python(self, source: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program that uses this mesh."""
        script = self.write(source, folder="programs")
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**self.variables, **variables},
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def interrupt(self, source: str, begun: Callable[[], object]) -> None:
        """Run a program, and press Ctrl-C once something has begun: it ends by that, with nothing else to say."""
        script = self.write(source, folder="programs")
        running = subprocess.Popen([sys.executable, str(script)], env=self.variables, stderr=subprocess.PIPE)
        try:
            until(begun, timeout=60, what="the program has begun")
            running.send_signal(signal.SIGINT)
            _, error = running.communicate(timeout=30)
        finally:
            running.kill()
        assert error.rstrip().endswith(b"KeyboardInterrupt"), error.decode()

    def ledger(self, name: str = "ledger") -> Ledger:
        return Ledger(self.directory / name)

    def forget(self, kept: list[str]) -> None:
        """Forget the modules that were imported since."""
        for name in self.modules:
            if name not in kept:
                sys.modules.pop(name, None)
        self.modules[:] = kept

    def close(self) -> None:
        """End what the test started, and forget what it imported."""
        client.use_settings(None)
        bridge().run(client.close())
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        self.forget([])
        sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(self.directory))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def gateway(mesh: Mesh, *arguments: str) -> Iterator[str]:
    """A gateway in a process of its own; gives its address."""
    ours, theirs = socket.socketpair()
    port = free_port()
    command = [sys.executable, "-m", "mesh", "gateway", "--port", str(port), "--ready-fd", str(theirs.fileno())]
    with (mesh.directory / f"gateway-{port}.log").open("wb") as log, ours:
        process = subprocess.Popen(
            [*command, *arguments], env=mesh.variables, stdout=log, stderr=log, pass_fds=(theirs.fileno(),)
        )
        theirs.close()
        try:
            ours.settimeout(30)
            assert ours.recv(1), "the gateway has ended"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            assert process.wait(30) == 0


@dataclass
class Ledger:
    """A file that functions write a line into, to count what really ran. One write is one line, whoever writes."""

    path: Path

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def count(self, text: str = "") -> int:
        return sum(line.startswith(text) for line in self.lines())


@contextlib.contextmanager
def new_mesh(server: NatsServer, directory: Path, **settings: object) -> Iterator[Mesh]:
    """An environment of its own, used by this process too."""
    (directory / "home").mkdir(parents=True, exist_ok=True)
    flags = {
        **SMALL,
        "nats_url": server.url,
        "environment": f"t-{secrets.token_hex(6)}",
        "cache_dir": str(directory / "cache"),
        "ack_wait": 15,
        **settings,
    }
    mesh = Mesh(server, directory, Settings.load(flags, start=directory))
    client.use_settings(mesh.settings)
    try:
        mesh.ask(lambda broker: broker.ensure())
        yield mesh
    finally:
        mesh.close()


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`."""
    return asyncio.run(work)
