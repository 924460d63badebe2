"""How many containers a pool has on its worker: what the autoscaler is told of it, and the worker's share of
its bounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mesh.autoscaler import Autoscaler, Bounds, Load
from mesh.container import Container
from mesh.memory import MIB

if TYPE_CHECKING:
    from mesh.pool import Pool
    from mesh.worker import Worker

logger = logging.getLogger("mesh.worker")


class Scaling:
    """Of one pool.

    Attributes:
        autoscaler: what it remembers of runs.
    """

    def __init__(self, worker: Worker, pool: Pool) -> None:
        self.autoscaler = Autoscaler()
        self._worker = worker
        self._pool = pool
        self._worn: set[Container] = set()

    @property
    def is_bounded(self) -> bool:
        """Whether the fleet has to agree on how many containers the pool has without any load."""
        spec = self._pool.spec
        return bool(spec.min_containers or spec.buffer_containers) and self._pool.is_open

    @property
    def in_use(self) -> bool:
        """Whether it had inputs lately."""
        return self.autoscaler.quiet(time.monotonic()) < self._pool.spec.scaledown_window

    def bounds(self) -> Bounds:
        """What the pool may have here: its share of what it has over all workers."""
        spec, fleet = self._pool.spec, self._worker.fleet
        window, target = spec.scaledown_window, spec.inputs_wanted
        if not self.is_bounded:
            return Bounds(maximum=spec.max_containers, window=window, target=target)
        return Bounds(
            minimum=fleet.share(self._pool, spec.min_containers),
            kept=fleet.kept(self._pool),
            maximum=spec.max_containers,
            buffer=fleet.share(self._pool, spec.buffer_containers),
            window=window,
            target=target,
        )

    def scale(self, queued: int) -> int:
        """End containers that are not needed. Returns how many others the load wants to be started.

        Args:
            queued: inputs in the queue, which all workers look at.
        """
        now, idle = time.monotonic(), self._idle()
        once = self._pool.spec.single_use_containers
        plan = self.autoscaler.plan(now, self._load(now, idle, queued), self.bounds(), once=once)
        for container in idle[: plan.end]:
            container.stop()
        return plan.start

    def spare(self) -> list[Container]:
        """Idle containers that the pool can do without, the longest idle first."""
        bounds = self.bounds()
        return self._idle()[: max(0, len(self._pool.serving) - max(bounds.minimum, bounds.kept))]

    @property
    def headroom(self) -> int:
        """Inputs that its containers could take at once beside those they have."""
        return sum(max(0, self._pool.spec.inputs_wanted - c.load) for c in self._pool.serving)

    def _idle(self) -> list[Container]:
        """Containers with nothing to do, the longest idle first: inputs go to the last, so that what is too many is not
        used, and ends."""
        return sorted((c for c in self._pool.serving if c.ready and not c.load), key=lambda c: c.idle_since)

    def _load(self, now: float, idle: Sequence[Container], queued: int) -> Load:
        pool, serving = self._pool, self._pool.serving
        busy = [c for c in serving if c.load]
        behind = sum(max(0, c.load - pool.spec.inputs_wanted) for c in busy)
        waiting = len(pool.intake.waiting) + behind + self._worker.fleet.share(pool, queued)
        running = (a.began for c in busy if not c.waiting for a in c.assignments if a.began) if waiting else ()
        return Load(
            waiting=waiting,
            runs=[now - began for began in running],
            busy=len(busy),
            leaving=sum(c.load > 0 for c in self._worn),
            starting=sum(not c.ready for c in serving if not c.load),
            idle=[now - c.idle_since for c in idle],
            in_use=self.is_bounded and self._worker.fleet.in_use_elsewhere(pool),
        )

    # --- containers that have served long enough ---------------------------------------------------------------------

    def uses_left(self, container: Container) -> float:
        """Inputs a container may be given before another takes its place."""
        uses = self._pool.spec.max_uses
        return float("inf") if uses is None else uses - container.served - container.load

    def on_given(self, container: Container) -> None:
        """A container got an input: perhaps its last one. Then another starts now, to be there when it ends."""
        if self.uses_left(container) <= 0:
            self._wear(container)

    def on_outcome(self, container: Container) -> None:
        """An input has ended, and left the container as large as it is."""
        limit = self._pool.spec.recycle_memory
        if limit is None or container.stopping:
            return
        held = self._worker.memory.held(container.pid)
        if held > limit * MIB:
            logger.info(
                "%s: container %s holds %.0f MiB after an input, more than recycle_memory=%d: another takes its place",
                *(self._pool.key, container.name, held / MIB, limit),
            )
            container.take_back()
            self._wear(container)

    def _wear(self, container: Container) -> None:
        self._worn.add(container)
        container.stop()

    def forget(self, container: Container) -> None:
        """It has ended."""
        self._worn.discard(container)
