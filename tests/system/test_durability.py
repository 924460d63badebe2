"""When the server says that it has something, is it on the disk? Seen in its system calls."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.broker import Broker
from mesh.protocol import Address, Input, Result, State, new_call_id
from mesh.server import NatsServer
from tests.support import Mesh, new_mesh, until

pytestmark = pytest.mark.system


@contextmanager
def traced(server: NatsServer, trace: Path) -> Iterator[None]:
    """Every write and fsync of a server, one a line, in the order in which they began or ended."""
    log = trace.with_suffix(".log")
    with log.open("wb") as errors:
        calls = "trace=fsync,fdatasync,write,writev,pwrite64"
        strace = subprocess.Popen(
            ["strace", "-f", "-y", "-s", "400", "-e", calls, "-o", trace, "-p", str(server.pid)], stderr=errors
        )
    try:
        until(lambda: "attached" in log.read_text(), what="strace has attached")
        yield
    finally:
        strace.terminate()
        strace.wait()


def moments(trace: Path, stream: str, stored: str) -> list[str]:
    """What happened to one message, in order: written to the stream's file, synced, and confirmed to the client."""
    found, syncing = [], set()
    for line in trace.read_text().splitlines():
        thread, _, call = line.partition(" ")
        in_file = f"/streams/{stream}/msgs/" in call
        if "pwrite64(" in call and in_file and stored in call:
            found.append("written")
        elif "sync(" in call and in_file and "unfinished" in call:
            syncing.add(thread)
        elif ("sync(" in call and in_file and call.endswith("= 0")) or (
            "sync resumed" in call and thread in syncing and call.endswith("= 0")
        ):
            syncing.discard(thread)
            found.append("synced")
        elif re.search(rf'write[v]?\(.*\\"stream\\":\\"{stream}\\"', call):
            found.append("confirmed")
    return found


@pytest.mark.parametrize(
    ("sync", "order"),
    [("always", ["written", "synced", "confirmed"]), ("2m", ["written", "confirmed"])],
)
def test_what_is_confirmed_is_on_the_disk(
    own_server: Callable[..., NatsServer], tmp_path: Path, sync: str, order: list[str]
) -> None:
    server = own_server(sync=sync)
    with new_mesh(server, tmp_path) as mesh:
        names = mesh.ask(streams)
        for number, (stream, store) in enumerate(((names[0], submit), (names[1], finish))):
            trace = tmp_path / f"trace-{number}"
            with traced(server, trace):
                key = mesh.ask(store)
            assert moments(trace, stream, key) == order


def test_a_group_commit_is_on_the_disk_before_any_of_it_is_confirmed(
    own_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    server = own_server(sync="always")
    with new_mesh(server, tmp_path) as mesh:
        stream = mesh.ask(streams)[1]
        trace = tmp_path / "trace"
        with traced(server, trace):
            call = mesh.ask(finish_many)
        alone, batch = ["synced", "confirmed"], ["written", "synced", "confirmed"]
        for number in (1, 50, 99):
            assert moments(trace, stream, f"{call}.{number}\\") == alone + batch


async def streams(broker: Broker) -> tuple[str, str]:
    return broker.topology.calls, broker.topology.bucket_stream("results")


async def submit(broker: Broker) -> str:
    """Submit a call; its id is part of what is written."""
    address = Address("app", "function", "_", new_call_id(broker.token))
    await broker.calls.submit(Input(address=address, body=b"{}"))
    return address.call


async def finish(broker: Broker) -> str:
    """Store a result."""
    call = new_call_id(broker.token)
    assert await broker.results.create(f"{call}.0", Result(state=State.SUCCEEDED, body=b"1"))
    return call


async def finish_many(broker: Broker) -> str:
    """Store a hundred results at once: the first goes alone, the others in a group commit."""
    call, result = new_call_id(broker.token), Result(state=State.SUCCEEDED, body=b"1")
    assert all(await asyncio.gather(*(broker.results.create(f"{call}.{number}", result) for number in range(100))))
    return call


def test_a_call_that_ends_is_on_the_disk_before_anybody_hears_of_it(
    own_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    server = own_server(sync="always")
    with new_mesh(server, tmp_path) as mesh:
        module = mesh.deploy("import mesh\napp = mesh.App('disk')\n@app.function()\ndef one():\n    return 1\n")
        mesh.start_worker()
        assert module.one.remote() == 1
        trace = tmp_path / "trace"
        with traced(server, trace):
            call = module.one.spawn()
            assert call.get() == 1
        assert pushed_after_sync(trace, mesh, call.object_id)


def pushed_after_sync(trace: Path, mesh: Mesh, call: str) -> bool:
    """Whether the result was synced between being written and being pushed."""
    stream = mesh.ask(streams)[1]
    lines = trace.read_text().splitlines()
    written = next(n for n, line in enumerate(lines) if f"/streams/{stream}/msgs/" in line and call in line)
    pushed = next(n for n, line in enumerate(lines) if "writev(" in line and f".done.{call[:-8]}." in line)
    return any("sync" in line and line.endswith("= 0") for line in lines[written:pushed])
