"""How containers follow a load: nothing, 200 calls at once, nothing, a burst that turns into a constant load, nothing.

Two workers, sampled five times a second, drawn as an SVG: inputs that wait above, containers of both workers below.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chart import Panel, chart
from rig import Rig, rig
from table import Row, row

from mesh import client
from mesh.protocol import PoolKey

_SOURCE = """
import time

import mesh

app = mesh.App("scaling")


@app.function(scaledown_window={window})
def work() -> None:
    time.sleep({seconds})
"""
_SECONDS, _WINDOW, _CONTAINERS = 0.3, 5, 16
_EVERY = 0.2


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the load: so many calls at once, or so many a second, for so long."""

    name: str
    seconds: float
    at_once: int = 0
    rate: float = 0.0


STEPS = (
    Step("nothing", 3),
    Step("200 at once", 15, at_once=200),
    Step("100 a second", 3, rate=100),
    Step("20 a second", 32, rate=20),
    Step("nothing", 13),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What there was at a moment: inputs that have not ended, and the containers of each worker."""

    at: float
    open: int
    containers: tuple[int, ...]

    @property
    def waiting(self) -> int:
        """Inputs that no container runs, where each has one as long as there are any."""
        return max(0, self.open - sum(self.containers))


def rows(picture: Path) -> list[Row]:
    """Play the load, draw it, and say how long it took to follow."""
    with rig() as mesh:
        module = mesh.load("scaling_load", _SOURCE.format(window=_WINDOW, seconds=_SECONDS))
        module.app.deploy()
        workers = [_worker(mesh) for _ in range(2)]
        try:
            samples = asyncio.run(_played(module.work, [worker.pid for worker in workers]))
        finally:
            workers[0].terminate()  # the rig ends the other one
            workers[0].wait()
    picture.write_text(_drawn(samples))
    return list(_figures(samples))


def _worker(mesh: Rig) -> Any:
    mesh.start_worker(_CONTAINERS)
    return mesh.worker


async def _played(function: Any, workers: Sequence[int]) -> list[Sample]:
    began = time.monotonic()
    samples: list[Sample] = []
    sampling = asyncio.create_task(_sample(lambda: time.monotonic() - began, workers, samples))
    start = 0.0
    for step in STEPS:
        calls = [(start, step.at_once)] if step.at_once else []
        calls += [(start + n / step.rate, 1) for n in range(int(step.seconds * step.rate))]
        for moment, count in calls:
            await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
            await asyncio.gather(*(function.spawn.aio() for _ in range(count)))
        start += step.seconds
        await asyncio.sleep(max(0.0, began + start - time.monotonic()))
    sampling.cancel()
    await client.close()
    return samples


async def _sample(clock: Callable[[], float], workers: Sequence[int], samples: list[Sample]) -> None:
    broker = await client.broker()
    pool = PoolKey("scaling", "work")
    while True:
        info = await broker.consumers.info(pool) or {"num_pending": 0, "num_ack_pending": 0}
        samples.append(Sample(clock(), info["num_pending"] + info["num_ack_pending"], _containers(workers)))
        await asyncio.sleep(_EVERY)


def _containers(workers: Sequence[int]) -> tuple[int, ...]:
    """How many containers each worker has: children of its zygote that call themselves so."""
    parents, containers = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if (entry / "cmdline").read_bytes().startswith(b"mesh container "):
                    containers.append(int(entry.name))
            except OSError:
                continue  # it has ended
    owners = [parents.get(parents.get(pid, 0), 0) for pid in containers]
    return tuple(owners.count(worker) for worker in workers)


def _figures(samples: Sequence[Sample]) -> list[Row]:
    starts = [sum(step.seconds for step in STEPS[:n]) for n in range(len(STEPS) + 1)]
    full = next((s.at - starts[1] for s in samples if s.at >= starts[1] and sum(s.containers) >= 2 * _CONTAINERS), -1.0)
    empty = next((s.at - starts[1] for s in samples if s.at > starts[1] + 1 and not s.open), -1.0)
    gone = next((s.at - starts[1] - empty for s in samples if s.at > starts[1] + empty and not sum(s.containers)), -1.0)
    constant = [sum(s.containers) for s in samples if starts[3] + 12 < s.at < starts[4]]
    return [
        row("200 at once: until every container has started (s)", [full]),
        row("200 at once: until all have ended (s)", [empty]),
        row(f"then until no container is left, window {_WINDOW} s (s)", [gone]),
        row("a constant load: containers", [float(count) for count in constant]),
    ]


def _drawn(samples: Sequence[Sample]) -> str:
    starts = [sum(step.seconds for step in STEPS[:n]) for n in range(len(STEPS))]
    times = [sample.at for sample in samples]
    return chart(
        f"Containers follow the load: calls of {_SECONDS} s on two workers with room for {_CONTAINERS} containers each",
        times,
        [
            Panel("inputs that wait", [("waiting", [s.waiting for s in samples])]),
            Panel("containers", [(f"worker {n + 1}", [s.containers[n] for s in samples]) for n in range(2)]),
        ],
        [(start, step.name) for start, step in zip(starts, STEPS, strict=True)],
    )
