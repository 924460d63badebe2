"""A mesh on one machine: the embedded server with a worker and a gateway, for as long as somebody wants it.

`up` runs them until a signal; `for_one_run` lends them to a single `mesh run` where no mesh is running. Both use the
same store under the same lock, so what was deployed in one is there in the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from mesh import background, vault
from mesh.broker import Broker
from mesh.config import Settings, note_running
from mesh.exception import InvalidError, ServiceError
from mesh.processes import end_with_parent
from mesh.server import DEFAULT_PORT, Credentials, NatsServer, find_nats_server, is_free, locked
from mesh.worker import ExitCode, Worker

logger = logging.getLogger("mesh.up")

_LOOK = 0.5  # seconds between looks whether the server still runs
_WORKER_START = 30.0  # seconds a worker, or a gateway, may take to be ready
_GATEWAY_PAUSE = 5.0  # seconds between looks whether a gateway still runs that has died before


def _credentials(store: Path) -> Credentials:
    """The passwords of this store's server: made once, so that programs that know them survive a restart."""
    path = store / "credentials.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Credentials(**json.loads(path.read_text()))
    credentials = Credentials.random()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(dataclasses.asdict(credentials), file)
    return credentials


def _port(store: Path, host: str, wanted: int | None) -> int:
    """The port asked for; else the usual one, or the one this store had last, where free; else any."""
    if wanted is not None:
        if not is_free(host, wanted):
            raise InvalidError(f"port {wanted} on {host} is in use; choose another with --port, or 0 for any")
        return wanted
    last = 0
    with contextlib.suppress(OSError, ValueError):
        last = int((store / "port").read_text())
    return next((port for port in (last, DEFAULT_PORT) if port and is_free(host, port)), 0)


def start_server(settings: Settings, store: Path, host: str = "127.0.0.1", port: int | None = None) -> NatsServer:
    """Start this user's server on its store. Hold the store's lock meanwhile."""
    server = NatsServer.start(
        store,
        program=find_nats_server(settings.nats_server),
        host=host,
        port=_port(store, host, port),
        sync=settings.sync,
        credentials=_credentials(store),
    )
    (store / "port").write_text(str(server.port))
    return server


def store_of(settings: Settings) -> Path:
    """Where this user's server keeps its data."""
    return settings.data_dir / "server"


def up(
    settings: Settings,
    *,
    listen: str = "127.0.0.1",
    port: int | None = None,
    on_ready: Callable[[NatsServer, Worker], None],
    on_output: Callable[[str, str, int, str], None] | None = None,
    gateway: Sequence[str] = ("--quiet",),
) -> ExitCode:
    """Run a server, a worker and a gateway until SIGINT or SIGTERM. Server and gateway are started again if they die.

    Args:
        gateway: flags of `mesh gateway`.

    Raises:
        ConflictError: another process has the store. InvalidError: the port is taken.
        ServiceError: the server does not start.
    """
    store = store_of(settings)
    with locked(store, f"`mesh up`, process {os.getpid()}"):
        server = start_server(settings, store, listen, port)
        local = dataclasses.replace(settings, nats_url=server.url, container_url=server.container_url)
        note_running(
            settings.state_dir,
            {
                "nats_url": server.url,
                "container_url": server.container_url,
                "pid": os.getpid(),
                "sync": settings.sync,
            },
        )
        try:
            return background.run(_serve(local, store, listen, server, on_ready, on_output, gateway))
        finally:
            note_running(settings.state_dir, None)


async def _serve(
    settings: Settings,
    store: Path,
    listen: str,
    server: NatsServer,
    on_ready: Callable[[NatsServer, Worker], None],
    on_output: Callable[[str, str, int, str], None] | None,
    gateway_flags: Sequence[str],
) -> ExitCode:
    running = [server]
    worker = Worker(settings, on_output=on_output)
    gateway = [_start("gateway", settings, *gateway_flags)]
    keeping = [
        asyncio.create_task(_keep_running(running, settings, store, listen)),
        asyncio.create_task(_keep_gateway(gateway, settings, gateway_flags)),
    ]
    try:
        await establish_key(settings)
        return await worker.run(lambda: on_ready(server, worker))
    finally:
        for task in keeping:
            task.cancel()
        await asyncio.to_thread(_end, gateway[0], settings.grace)
        await asyncio.to_thread(running[0].stop)


async def _keep_gateway(gateway: list[subprocess.Popen[bytes]], settings: Settings, flags: Sequence[str]) -> None:
    """Start the gateway again whenever it dies."""
    pause = _LOOK
    while True:
        await asyncio.sleep(pause)
        if gateway[0].poll() is not None:
            pause = _GATEWAY_PAUSE  # longer, from now on: what ends it may be there to stay
            logger.error("the gateway ended with exit code %d; starting it again", gateway[0].returncode)
            # In this thread: the kernel ends it with the thread that started it.
            gateway[0] = _start("gateway", settings, *flags)


async def establish_key(settings: Settings) -> bool:
    """Make the environment, with a key for its secrets, where there is none. Returns whether a key file was made."""
    broker = await Broker.open(settings, role="init")
    try:
        await broker.ensure()
        return await vault.establish(broker, settings.key_file)
    finally:
        await broker.close()


async def _keep_running(running: list[NatsServer], settings: Settings, store: Path, listen: str) -> None:
    """Start the server again whenever it dies."""
    while True:
        await asyncio.sleep(_LOOK)
        if running[0].running():
            continue
        logger.error("the server died; starting it again (its log: %s)", store / "nats.log")
        try:
            # In this thread: the kernel ends the server with the thread that started it.
            running[0] = start_server(settings, store, listen, running[0].port)
        except (ServiceError, InvalidError) as error:
            logger.error("%s", error)


@contextlib.contextmanager
def for_one_run(settings: Settings) -> Generator[Settings]:
    """Settings of a mesh that is there for the length of the block: a server, and a worker in a process of its own.

    Raises:
        ConflictError: another process has the store. ServiceError: something did not start.
    """
    store = store_of(settings)
    with locked(store, f"`mesh run`, process {os.getpid()}"):
        server = start_server(settings, store)
        local = dataclasses.replace(settings, nats_url=server.url, container_url=server.container_url)
        try:
            background.run(establish_key(local))
            with worker_process(local):
                yield local
        finally:
            server.stop()


def worker_process(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """A worker as a process of its own, ready when the block begins, drained when it ends."""
    return _process("worker", settings)


@contextlib.contextmanager
def gateway_for(settings: Settings, running: bool) -> Generator[None]:
    """A gateway for the length of the block, where none is running."""
    if running:
        yield
        return
    with _process("gateway", settings):
        yield


@contextlib.contextmanager
def _process(command: str, settings: Settings) -> Generator[None]:
    """A daemon as a process of its own, ready when the block begins, told to end when that does."""
    ours, theirs = socket.socketpair()
    process = _start(command, settings, "--quiet", "--ready-fd", str(theirs.fileno()), passed=[theirs.fileno()])
    theirs.close()
    try:
        with ours:
            ours.settimeout(_WORKER_START)
            _wait_ready(command, ours, process)
        yield
    finally:
        _end(process, settings.grace + 10)


def _start(command: str, settings: Settings, *arguments: str, passed: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a daemon, with the settings of this process."""
    variables = {
        **os.environ,
        "MESH_NATS_URL": settings.nats_url,
        "MESH_CONTAINER_URL": settings.container_url,
        "MESH_ENVIRONMENT": settings.environment,
        "MESH_CACHE_DIR": str(settings.cache_dir),
        "MESH_CONTAINERS": str(settings.containers),
        "MESH_SECRET_KEY_FILE": str(settings.key_file),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "mesh", command, *arguments],
        env=variables,
        stdin=subprocess.DEVNULL,
        pass_fds=passed,
        start_new_session=True,  # Ctrl-C is for us: it ends when we have
        preexec_fn=end_with_parent,
    )


def _end(process: subprocess.Popen[bytes], limit: float) -> None:
    """End a daemon: killed if it takes longer than that."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_ready(command: str, ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
    try:
        ready = ours.recv(1)
    except TimeoutError:
        raise ServiceError(f"the {command} was not ready within {_WORKER_START:g} s") from None
    if not ready:
        raise ServiceError(f"the {command} ended with exit code {process.wait()}; what it said is above")
