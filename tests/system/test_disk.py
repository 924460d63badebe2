"""The server's disk is full: not its streams, the disk itself. What that does was seen on nats-server 2.15.1."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from mesh import FunctionCall
from mesh.exception import ConnectionError
from mesh.server import NatsServer
from tests.support import new_mesh, until

pytestmark = pytest.mark.system

WORK = """
    import mesh, time
    app = mesh.App("disk")

    @app.function()
    def work(ledger, seconds):
        with open(ledger, "a") as file:
            file.write("begin\\n")
        time.sleep(seconds)
        return "x" * 20_000  # what fits into the last page of a file is still stored
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def write_on(file: IO[bytes]) -> None:
    while True:
        file.write(b"x" * 4096)


def fill(disk: Path) -> Path:
    """Somebody else's file, up to the last byte."""
    path = disk / "somebody-elses"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
        write_on(file)
    return path


def test_workers_hold_on_until_there_is_room_and_the_server_is_restarted(
    own_server: Callable[..., NatsServer], tmp_path: Path, disk: Path
) -> None:
    store = disk / "store"
    store.mkdir()
    (store / "room.json").write_text(str(1 << 30))  # more than there is: others fill this disk, too
    server = own_server(store=store, sync="always")
    with new_mesh(server, tmp_path, submit_timeout=3, ack_wait=5) as mesh:
        work = mesh.deploy(WORK).work
        worker = mesh.start_worker("--containers", "2")
        path = str(mesh.ledger().path)
        running = [work.spawn(path, 2.0) for _ in range(2)]
        until(lambda: mesh.ledger().count() == 2)
        queued = [work.spawn(path, 0.0) for _ in range(4)]
        file = fill(disk)
        until(lambda: "the store takes nothing" in worker.log, timeout=40)
        with pytest.raises(ConnectionError, match="it may have been accepted"):
            work.spawn(path + " " * 20_000, 0.0)
        done = mesh.cli("check", check=False)
        assert done.returncode == 1
        assert "its disk may be full" in done.stderr
        file.unlink()
        server.stop()
        own_server(store=store, port=server.port, sync="always")
        assert FunctionCall.gather(*running, *queued) == ["x" * 20_000] * 6
        assert mesh.ledger().count() == 6
        assert worker.process.poll() is None
        until(lambda: mesh.cli("check", check=False).stderr == "", what="the worker says that it is well")
