"""How long after its call the first line of a function runs, where no container is there for it; and what containers
hold that have nothing to do."""

from __future__ import annotations

import time
from collections.abc import Sequence

import functions
import machine
from rig import Rig, rig
from table import Row, row


def rows(starts: int, worker_starts: int) -> list[Row]:
    """Of a function without imports: with the worker's zygote warm, and right after the worker's own start."""
    with rig() as mesh:
        module = mesh.load("cold_app", functions.COLD)
        module.app.deploy()
        first = []
        for _ in range(worker_starts):
            mesh.stop_worker()
            mesh.start_worker()
            first.append(_until_begun(module.now))
        warm = [_from_rest(mesh, module.now) for _ in range(starts)]
    return [*_quantiles("zygote warm", warm), *_quantiles("right after the worker's start", first), *_idle(50)]


def _until_begun(function) -> float:
    """Milliseconds from the call to the function's first line."""
    called = time.time()
    return 1e3 * (function.remote() - called)


def _from_rest(mesh: Rig, function) -> float:
    """The same, once the container of the call before has ended."""
    assert mesh.worker is not None
    while machine.containers(mesh.worker.pid):
        time.sleep(0.01)
    return _until_begun(function)


def _quantiles(what: str, values: Sequence[float]) -> list[Row]:
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return [row(f"{what}, p50 (ms)", values), row(f"{what}, p99 (ms)", [high])]


def _idle(count: int) -> list[Row]:
    """Memory of containers of an empty function that have run one input each, and of the zygote they share it with."""
    with rig() as mesh:
        module = mesh.load("cold_app", functions.COLD)
        module.app.deploy()
        mesh.start_worker(count)
        assert mesh.worker is not None
        calls = [module.rest.spawn(mesh.folder / "gate") for _ in range(count)]
        while len(machine.containers(mesh.worker.pid)) < count:
            time.sleep(0.1)
        (mesh.folder / "gate").touch()
        for call in calls:
            call.get()
        held = [machine.usage(pid).memory / 1e6 for pid in machine.containers(mesh.worker.pid)]
        zygotes = sum(machine.usage(pid).memory / 1e6 for pid in machine.children(mesh.worker.pid))
    return [
        row(f"{count} idle containers, their share of memory together (MB)", [sum(held)]),
        row("their zygote's share (MB)", [zygotes]),
    ]
