"""Requests through a gateway beside the same application under uvicorn alone, in the same run; and how soon a change of
the source answers under `mesh serve`. The client is ApacheBench, of Debian's apache2-utils."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
from rig import Rig, rig
from table import Row, row

_PAGE = """
from fastapi import FastAPI

import mesh

app = mesh.App("bench-web")
site = FastAPI()


@site.get("/")
async def root():
    return {"answer": 42}


@app.function()
@mesh.asgi_app()
def page():
    return site
"""
_SERVED = """
import mesh

app = mesh.App("bench-serve")


@app.function()
@mesh.asgi_app()
def page():
    from fastapi import FastAPI
    site = FastAPI()

    @site.get("/")
    async def root():
        return NUMBER

    return site
"""


@dataclass(frozen=True, slots=True)
class _Run:
    """What ApacheBench saw: requests a second, and milliseconds; processor time a request by process, in µs."""

    rate: float
    p50: float
    p99: float
    cpu: Mapping[str, float]


def rows(rounds: int, requests: int) -> list[Row]:
    """Of each number of connections: mesh and uvicorn by turns, as often as there are rounds."""
    with rig() as mesh:
        mesh.load("bench_page", _PAGE).app.deploy()
        mesh.start_worker(1)
        with _gateway(mesh) as (gateway, address), _uvicorn(mesh.folder / "src") as (uvicorn, plain):
            through = f"{address}/bench-web/page/"
            _until_answered(through)
            assert mesh.worker is not None
            processes = {
                "gateway": gateway,
                "worker": mesh.worker.pid,
                "container": machine.containers(mesh.worker.pid)[0],
                "nats-server": mesh.server.pid,
            }
            found: list[Row] = []
            for connections in (1, 50):
                ours, theirs = [], []
                for _ in range(rounds):
                    theirs.append(_load(plain, connections, requests, {"uvicorn": uvicorn}))
                    ours.append(_load(through, connections, requests, processes))
                found += _compared(connections, ours, theirs)
    return found


def _compared(connections: int, ours: Sequence[_Run], theirs: Sequence[_Run]) -> list[Row]:
    of = f"{connections} connection{'s' if connections > 1 else ''}"
    found = []
    for what, unit in (("rate", "requests/s"), ("p50", "p50, ms"), ("p99", "p99, ms")):
        alone = [getattr(run, what) for run in theirs]
        through = [getattr(run, what) for run in ours]
        found.append(row(f"{of}, uvicorn alone: {unit}", alone))
        ratios = [mine / other for mine, other in zip(through, alone, strict=True)]
        found.append(row(f"{of}, through mesh: {unit}", through, ratios))
    for runs in (theirs, ours):
        names = runs[0].cpu
        found += [row(f"{of}: CPU of {name} a request, µs", [run.cpu[name] for run in runs]) for name in names]
    return found


def reload_rows(count: int) -> list[Row]:
    """Seconds from a save to the first answer of the new source, under `mesh serve`."""
    with rig() as mesh:
        mesh.start_worker(4)
        file = mesh.folder / "served" / "bench_served.py"
        file.parent.mkdir()
        file.write_text(_SERVED.replace("NUMBER", "0"))
        log = mesh.folder / "serve.log"
        with log.open("wb") as output:
            serving = subprocess.Popen(
                [sys.executable, "-m", "mesh", "serve", str(file)], env=_variables(mesh), stdout=output, stderr=output
            )
        try:
            while (found := re.search(r"http://\S+page", log.read_text())) is None:
                time.sleep(0.05)
            address = found[0] + "/"
            _until_answered(address)
            seconds = []
            for number in range(1, count + 1):
                time.sleep(2)  # as somebody who reads the page
                file.write_text(_SERVED.replace("NUMBER", str(number)))
                saved = time.monotonic()
                while _answer(address) != str(number):
                    time.sleep(0.005)
                seconds.append(time.monotonic() - saved)
        finally:
            serving.terminate()
            serving.wait()
    return [row("from a save to the first answer of the new source (s)", seconds)]


# --- who answers -----------------------------------------------------------------------------------------------------


def _variables(mesh: Rig) -> dict[str, str]:
    return {**os.environ, "MESH_NATS_URL": mesh.server.url, "MESH_CACHE_DIR": str(mesh.folder / "cache")}


@contextlib.contextmanager
def _gateway(mesh: Rig) -> Iterator[tuple[int, str]]:
    port = _free_port()
    command = [sys.executable, "-m", "mesh", "gateway", "--quiet", "--port", str(port)]
    with _running(command, _variables(mesh), mesh.folder) as pid:
        yield pid, f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _uvicorn(folder: Path) -> Iterator[tuple[int, str]]:
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", "bench_page:site", "--no-access-log", "--log-level", "error"]
    with _running([*command, "--port", str(port)], dict(os.environ), folder) as pid:
        address = f"http://127.0.0.1:{port}/"
        _until_answered(address)
        yield pid, address


@contextlib.contextmanager
def _running(command: Sequence[str], variables: Mapping[str, str], folder: Path) -> Iterator[int]:
    process = subprocess.Popen(command, env=variables, cwd=folder)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answer(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def _until_answered(address: str) -> None:
    while not _answer(address):
        time.sleep(0.05)


# --- who asks --------------------------------------------------------------------------------------------------------


def _load(address: str, connections: int, requests: int, processes: Mapping[str, int]) -> _Run:
    program = shutil.which("ab")
    if program is None:
        raise SystemExit("the bench of web functions needs ab: apt-get install apache2-utils")
    before = {name: machine.usage(pid).cpu for name, pid in processes.items()}
    with tempfile.NamedTemporaryFile() as file:
        command = [program, "-q", "-k", "-l", "-e", file.name, "-n", str(requests), "-c", str(connections), address]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        percentiles = dict(line.split(",") for line in Path(file.name).read_text().splitlines())
    if int(_number("Failed requests", said)) or "Non-2xx" in said:
        raise SystemExit(f"not all requests were answered:\n{said}")
    cpu = {name: 1e6 * (machine.usage(pid).cpu - before[name]) / requests for name, pid in processes.items()}
    return _Run(_number("Requests per second", said), float(percentiles["50"]), float(percentiles["99"]), cpu)


def _number(what: str, said: str) -> float:
    found = re.search(rf"{what}:\s+([\d.]+)", said)
    assert found is not None, said
    return float(found[1])
