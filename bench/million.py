"""A call of a million inputs, from submission to its end: how fast, in how much memory, what others see meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType

import functions
import machine
import table
from rig import Rig, rig
from table import Row

from mesh import FunctionCall
from mesh.exception import RemoteError

_SMALL = 10_000  # inputs whose rate the others' is compared with
_PAUSE = 0.5  # seconds between two looks at what is left

_FAILING = """

@app.function()
def fails(x: int) -> None:
    raise ValueError(x)
"""


def rows(sync: str, count: int) -> list[Row]:
    """One run: each figure is printed as it is measured, since the whole takes minutes."""
    found: list[Row] = []

    def note(what: str, value: float) -> None:
        print(f"{what:<60} {value:>14,.2f}", flush=True)
        found.append(table.row(what, [value]))

    with rig(sync) as mesh:
        module = mesh.load("million_app", functions.CALLS + _FAILING)
        module.app.deploy()
        _run(mesh, module, count, note)
    return found


def _run(mesh: Rig, module: ModuleType, count: int, note: Callable[[str, float], None]) -> None:
    memory = _Memory(mesh)
    note("client, before (MiB)", memory.client())
    call = _submit(mesh, module, count, note)
    note("client, all queued (MiB)", memory.client())
    note("server, all queued (MiB)", memory.server())
    for name, seconds in _reads(mesh, call.object_id).items():
        note(f"{name}, all queued (s)", seconds)
    mesh.start_worker()
    _drain(mesh, call, count, note, memory)
    _small(module, note)
    _read(call, count, note)
    note("client, all read (MiB)", memory.client())
    _cancel(mesh, module, count, note)
    _purge(mesh, module, min(count, _SMALL), note)


def _submit(mesh: Rig, module: ModuleType, count: int, note: Callable[[str, float], None]) -> FunctionCall[int]:
    """Submit all of them, while the command line looks on."""
    worst: dict[str, float] = {}
    over = threading.Event()

    def look_on() -> None:
        while not over.is_set():
            for name, seconds in _reads(mesh, "").items():
                worst[name] = max(seconds, worst.get(name, 0.0))

    looking = threading.Thread(target=look_on)
    looking.start()
    began = time.perf_counter()
    call = module.noop.spawn_map(range(count))
    taken = time.perf_counter() - began
    over.set()
    looking.join()
    note("queued (s)", taken)
    note("queued (inputs/s)", count / taken)
    for name, seconds in worst.items():
        note(f"{name}, worst while submitting (s)", seconds)
    return call


def _reads(mesh: Rig, call: str) -> dict[str, float]:
    """How long each command takes that only reads."""
    commands = ["call list", "app list", "worker list", "check", "call list --app bench --state queued"]
    return {f"mesh {words}": _timed(mesh, *words.split()) for words in commands} | (
        {"mesh call status": _timed(mesh, "call", "status", call)} if call else {}
    )


def _timed(mesh: Rig, *words: str) -> float:
    variables = {**os.environ, "MESH_NATS_URL": mesh.server.url}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "mesh", *words], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"mesh {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - began


def _drain(mesh: Rig, call: FunctionCall[int], count: int, note: Callable[[str, float], None], memory: _Memory) -> None:
    """Until all have ended; the server is killed and restarted when half have."""
    began = time.perf_counter()
    most, restarted = 0.0, False
    while left := call.status().outstanding:
        most = max(most, memory.worker())
        if not restarted and left < count / 2:
            restarted = True
            note("first half drained (inputs/s)", (count - left) / (time.perf_counter() - began))
            again = time.perf_counter()
            mesh.restart_server()
            call.status()
            note("server killed and back (s)", time.perf_counter() - again)
            began, count = time.perf_counter(), left
        time.sleep(_PAUSE)
    note("second half drained, after the restart (inputs/s)", count / (time.perf_counter() - began))
    note("worker, at most (MiB)", most)


def _small(module: ModuleType, note: Callable[[str, float], None]) -> None:
    """As many inputs as fit any queue, for comparison."""
    call = module.noop.spawn_map(range(_SMALL))
    began = time.perf_counter()
    left = call.status().outstanding
    while call.status().outstanding:
        time.sleep(_PAUSE / 10)
    note(f"{_SMALL:,} drained (inputs/s)", left / (time.perf_counter() - began))


def _read(call: FunctionCall[int], count: int, note: Callable[[str, float], None]) -> None:
    """Every value, by whoever has the id."""
    began = time.perf_counter()
    for expected, value in enumerate(FunctionCall.from_id(call.object_id).iter()):
        if value != expected:
            raise SystemExit(f"input {expected} came to {value}")
    note("read and checked (values/s)", count / (time.perf_counter() - began))


def _cancel(mesh: Rig, module: ModuleType, count: int, note: Callable[[str, float], None]) -> None:
    mesh.stop_worker()
    call = module.noop.spawn_map(range(count))
    mesh.start_worker()
    waited: list[float] = []

    def wait() -> None:
        try:
            call.get(index=count - 1)
        except RemoteError:
            waited.append(time.perf_counter())

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(1)
    began = time.perf_counter()
    taken = _timed(mesh, "call", "cancel", call.object_id)
    waiting.join()
    note("mesh call cancel of all of them (s)", taken)
    note("who waits is told after (s)", waited[0] - began)
    while _queued(call):
        time.sleep(_PAUSE)
    note("out of the queue after (s)", time.perf_counter() - began)


def _queued(call: FunctionCall[int]) -> int:
    from mesh import client
    from mesh._sync import bridge

    async def count() -> int:
        return await (await client.broker()).calls.count()

    return bridge().run(count())


def _purge(mesh: Rig, module: ModuleType, count: int, note: Callable[[str, float], None]) -> None:
    call = module.fails.spawn_map(range(count))
    while call.status().outstanding:
        time.sleep(_PAUSE)
    note(f"mesh dead purge --all, of {count:,} letters (s)", _timed(mesh, "dead", "purge", "--all", "--yes", "--json"))


class _Memory:
    """How much memory processes hold, in MiB."""

    def __init__(self, mesh: Rig) -> None:
        self._mesh = mesh

    def client(self) -> float:
        return _held(os.getpid())

    def server(self) -> float:
        return _held(self._mesh.server.pid)

    def worker(self) -> float:
        return _held(self._mesh.worker.pid) if self._mesh.worker else 0.0


def _held(pid: int) -> float:
    return machine.usage(pid).memory / (1 << 20)
