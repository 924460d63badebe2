"""Web functions under load, by clients that know nothing of mesh: ApacheBench and curl."""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mesh import client
from mesh.server import NatsServer
from tests.support import Mesh, WorkerProcess, gateway, new_mesh, processes, until

pytestmark = [pytest.mark.load, pytest.mark.timeout(900)]

SIZE = 200_000_000  # bytes of a stream
PIECE = 65_536
FLAT = 60 << 20  # bytes by which a process may grow while a stream passes through: some windows, and what Python keeps

SITE = """
import hashlib, os
import mesh

app = mesh.App("loaded")

@app.function(scaledown_window=5)
@mesh.asgi_app()
def site():
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (event := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": event["text"]})
            return
        path = scope["path"].rpartition("/")[2]
        if path == "upload":
            digest, more = hashlib.sha256(), True
            while more:
                event = await receive()
                digest.update(event["body"])
                more = event.get("more_body", False)
            body = digest.hexdigest().encode()
        elif path == "download":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for number in range(SIZE // PIECE):
                body = number.to_bytes(8, "big") * (PIECE // 8)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            body = b""
        else:
            body = b"%d" % os.getpid()
        if path != "download":
            length = (b"content-length", b"%d" % len(body))
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})
    return application
"""


@pytest.fixture
def ab() -> str:
    found = shutil.which("ab")
    assert found is not None, "install apache2-utils"
    return found


@pytest.fixture
def loaded(server: NatsServer, tmp_path: Path) -> Iterator[tuple[Mesh, str]]:
    """The site on a mesh with a worker and a gateway, and its address."""
    with new_mesh(server, tmp_path) as mesh, gateway(mesh, "--quiet") as address:
        client.use_settings(mesh.settings)
        mesh.start_worker("--containers", "2")
        mesh.deploy(SITE.replace("SIZE", str(SIZE)).replace("PIECE", str(PIECE)))
        until(lambda: httpx.get(f"{address}/loaded/site/", timeout=30).is_success)
        yield mesh, f"{address}/loaded/site"


def held(pid: int) -> int:
    """Bytes that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) << 10


class Watch:
    """The most that the gateway, the worker and its containers hold, each beside what it held before."""

    def __init__(self, mesh: Mesh, worker: WorkerProcess) -> None:
        gateways = [pid for pid in processes("mesh\0gateway") if pid]
        self._before = {pid: held(pid) for pid in (*gateways, worker.pid, *worker.containers())}
        self.growth = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.2):
            self.growth = max(self.growth, *(held(pid) - before for pid, before in self._before.items()))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def summary(output: str) -> tuple[int, int, int]:
    """What ApacheBench counted: complete requests, failed ones, and those that were not answered with 200."""
    counts = [
        re.search(rf"{what}:\s+(\d+)", output) for what in ("Complete requests", "Failed requests", "Non-2xx responses")
    ]
    complete, failed, other = (int(found[1]) if found else 0 for found in counts)
    return complete, failed, other


def test_ten_thousand_requests_over_fifty_connections(loaded: tuple[Mesh, str], ab: str) -> None:
    command = [ab, "-l", "-k", "-r", "-n", "10000", "-c", "50", f"{loaded[1]}/"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    assert summary(output) == (10_000, 0, 0), output


def test_a_long_download_to_a_slow_reader_takes_no_memory(loaded: tuple[Mesh, str]) -> None:
    mesh, address = loaded
    expected = hashlib.sha256()
    for number in range(SIZE // PIECE):
        expected.update(number.to_bytes(8, "big") * (PIECE // 8))
    with Watch(mesh, mesh.workers[0]) as watch:
        command = ["curl", "-sf", "--limit-rate", "20M", f"{address}/download"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
            digest = hashlib.sha256()
            assert reader.stdout is not None
            while piece := reader.stdout.read(1 << 20):
                digest.update(piece)
        assert reader.returncode == 0
    assert digest.hexdigest() == expected.hexdigest()
    assert watch.growth < FLAT


def test_a_long_upload_takes_no_memory(loaded: tuple[Mesh, str], tmp_path: Path) -> None:
    mesh, address = loaded
    digest = hashlib.sha256()
    with (tmp_path / "file").open("wb") as file:
        for number in range(SIZE // PIECE):
            piece = number.to_bytes(8, "big") * (PIECE // 8)
            digest.update(piece)
            file.write(piece)
    with Watch(mesh, mesh.workers[0]) as watch:
        command = ["curl", "-sf", "-X", "POST", "-T", str(tmp_path / "file"), f"{address}/upload"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == digest.hexdigest()
    assert watch.growth < FLAT


def test_websockets_echo_side_by_side(loaded: tuple[Mesh, str]) -> None:
    from websockets.sync.client import connect

    wrong: list[str] = []

    def talk(number: int) -> None:
        with connect(f"{loaded[1].replace('http', 'ws')}/ws") as connection:
            for turn in range(100):
                connection.send(f"{number} {turn}")
                said = connection.recv()
                if said != f"{number} {turn}":
                    wrong.append(str(said))

    talking = [threading.Thread(target=talk, args=(number,)) for number in range(20)]
    for thread in talking:
        thread.start()
    for thread in talking:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_worker_that_goes_under_load(loaded: tuple[Mesh, str], ab: str, signal: str) -> None:
    """One that drains loses nothing; one that is killed loses what it had: as many as there are connections at most."""
    mesh, address = loaded
    second = mesh.start_worker("--containers", "2")
    loading = subprocess.Popen(
        [ab, "-l", "-k", "-r", "-n", "6000", "-c", "20", f"{address}/"], stdout=subprocess.PIPE, text=True
    )
    until(lambda: second.containers(), what="the second worker serves, too")
    time.sleep(1)
    assert loading.poll() is None
    if signal == "SIGTERM":
        second.process.terminate()
    else:
        second.kill()
    output, _ = loading.communicate(timeout=300)
    complete, failed, other = summary(output)
    assert complete == 6000, output
    assert (failed, other) == (0, 0) if signal == "SIGTERM" else failed + other <= 20, output


def test_a_client_that_goes_in_the_middle_of_a_download_frees_everything(loaded: tuple[Mesh, str]) -> None:
    mesh, address = loaded
    host, port = address.removeprefix("http://").partition("/")[0].split(":")
    with Watch(mesh, mesh.workers[0]) as watch:
        for _ in range(50):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(b"GET /loaded/site/download HTTP/1.1\r\nhost: x\r\n\r\n")
                connection.recv(PIECE)
    assert watch.growth < 3 * FLAT
    assert httpx.get(f"{address}/", timeout=30).is_success
