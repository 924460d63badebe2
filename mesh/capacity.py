"""How many containers a worker may run at once, and which functions get them when there are more than fit."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from mesh.container import Container

if TYPE_CHECKING:
    from mesh.pool import Pool

_SLICE = 1.0  # seconds a container keeps its place once it has it, while other functions wait for one


class Capacity:
    """The room that the pools of one worker share.

    Args:
        limit: containers at once. pools: all of them, as they come and go.
    """

    def __init__(self, limit: int, pools: Collection[Pool]) -> None:
        self.limit = limit
        self._pools = pools

    @property
    def used(self) -> int:
        """Containers that take up room: all but those that only wait for other calls, and those about to end."""
        return sum(not c.waiting and not (c.stopping and not c.load) for pool in self._pools for c in pool.containers)

    def has_room(self) -> bool:
        return self.used < self.limit

    def make_room(self, pool: Pool) -> bool:
        """Whether `pool` may start a container now; an idle one of another pool ends for it."""
        if self.has_room():
            return True
        idle = [
            container
            for other in self._pools
            if other is not pool and len(other.serving) > other.spec.min_containers
            for container in other.serving
            if container.ready and not container.load
        ]
        if not idle:
            return False
        min(idle, key=lambda c: c.idle_since).stop()
        return True

    def make_way(self) -> None:
        """Let busy pools give up containers, one for each pool that waits: those with most of them first."""
        leaving = sum(c.stopping for pool in self._pools for c in pool.containers)
        now = time.monotonic()
        for _ in range(len(self.starving()) - leaving):
            candidates = [
                (len(pool.serving), now - c.started, c)
                for pool in self._pools
                for c in pool.serving
                if not c.waiting and (len(pool.serving) > 1 or now - c.started > _SLICE)
            ]
            if not candidates:
                return
            _, _, container = max(candidates, key=lambda candidate: candidate[:2])
            container.take_back()
            container.stop()

    def on_idle(self, container: Container) -> None:
        """A container has nothing to do: it ends if a function without any waits for room."""
        if self.starving() and not self.has_room():
            container.stop()
            self._feed_starving()

    def changed(self) -> None:
        """There may be room now."""
        self._feed_starving()
        for pool in [pool for pool in self._pools if pool.containers]:
            pool.feed()

    def starving(self, seconds: float = 0.0) -> list[Pool]:
        """Pools whose inputs wait and that have no container, for this long or longer; the longest waiting first."""
        until = time.monotonic() - seconds
        starving = [(since, pool) for pool in self._pools if (since := pool.starving_since) is not None]
        return [pool for since, pool in sorted(starving, key=lambda pair: pair[0]) if since <= until]

    def _feed_starving(self) -> None:
        for pool in self.starving():
            if not self.make_room(pool):
                break
            pool.feed()
