"""What a worker can run at once, in containers, cores and memory, and which functions get it when it is too little."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from mesh.container import Container
from mesh.placement import Size

if TYPE_CHECKING:
    from mesh.pool import Pool

_NOTHING = Size()
_SLICE = 1.0  # seconds a container keeps its place once it has it, while other functions wait for one


class Capacity:
    """The room that the pools of one worker share.

    Args:
        total: what there is. pools: those that have containers or inputs, as they come and go.
    """

    def __init__(self, total: Size, pools: Collection[Pool]) -> None:
        self.total = total
        self._pools = pools

    @property
    def used(self) -> Size:
        """What containers take: all but those that only wait for other calls, and those about to end."""
        return self._sum(lambda c: not c.waiting and not (c.stopping and not c.load))

    @property
    def _leaving(self) -> Size:
        """What of that becomes free once inputs end that run."""
        return self._sum(lambda c: c.stopping and bool(c.load) and not c.waiting)

    def _sum(self, counts: Callable[[Container], bool]) -> Size:
        total = Size()
        for pool in self._pools:
            if pool.containers and (number := sum(map(counts, pool.containers))):
                size = pool.size
                total += Size(containers=number, cpus=number * size.cpus, memory=number * size.memory)
        return total

    @property
    def free(self) -> Size:
        return self.total - self.used

    def make_room(self, pool: Pool, promised: Size = _NOTHING) -> bool:
        """Whether `pool` may start a container now, beside what is promised; idle ones of other pools end for it."""
        ending = self._ending_for(pool, promised)
        for container in ending or ():
            container.stop()
        return ending is not None

    def could_make_room(self, pool: Pool) -> bool:
        """What `make_room` would say, without ending anything."""
        return self._ending_for(pool) is not None

    def _ending_for(self, pool: Pool, promised: Size = _NOTHING) -> list[Container] | None:
        """The idle containers that would have to end for another one of `pool`; `None` where that is not enough."""
        free = self.free - promised
        if self._is_owed(pool, free):
            return None
        if pool.size.fits(free):
            return []
        ending: list[Container] = []
        for container, size in self._spare(pool):
            if pool.size.fits(free):
                break
            if size.eases(pool.size, free):
                ending.append(container)
                free += size
        return ending if pool.size.fits(free) else None

    def _spare(self, pool: Pool) -> list[tuple[Container, Size]]:
        """Containers that pools other than this one can do without, the longest idle first."""
        others = (other for other in self._pools if other.containers and other is not pool)
        spare = [(c, other.size) for other in others for c in other.scaling.spare()]
        return sorted(spare, key=lambda pair: pair[0].idle_since)

    def _is_owed(self, pool: Pool, free: Size) -> bool:
        """Whether what `pool` would take is kept for a function that has waited for it, and has no container at all.
        Without this, a container that claims much would never find room among many that claim little."""
        return pool.starving_since is None and any(
            pool.size.eases(other.size, free) for other in self.starving(_SLICE) if other is not pool
        )

    def make_way(self) -> None:
        """Let busy pools give up containers for those that wait without any: those with most of them first."""
        starving = self.starving()
        free = self.free + self._leaving if starving else Size()
        for pool in starving:
            while not pool.size.fits(free):
                leaving = self._least_needed(pool, free)
                if leaving is None:
                    return
                container, size = leaving
                free += size
                container.take_back()
                container.stop()
            free -= pool.size

    def _least_needed(self, pool: Pool, free: Size) -> tuple[Container, Size] | None:
        """A container that makes way for `pool`: the oldest of the pool that has most of them."""
        now = time.monotonic()
        candidates = [
            (len(other.serving), now - c.started, c, other.size)
            for other in self._pools
            if other is not pool and other.size.eases(pool.size, free)
            for c in other.serving
            if not c.waiting and (len(other.serving) > 1 or now - c.started > _SLICE)
        ]
        if not candidates:
            return None
        _, _, container, size = max(candidates, key=lambda candidate: candidate[:2])
        return container, size

    def on_idle(self, pool: Pool, container: Container) -> None:
        """A container has nothing to do: it ends if that helps a function without any that waits for room."""
        free = self.free
        if any(pool.size.eases(other.size, free) for other in self.starving()):
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
        """Let those start a container that there is room for. They may be many more than that, hundreds of pools of one
        class: none is looked at in vain."""
        promised, too_large = Size(), set[Size]()
        for pool in self.starving():
            size = pool.size
            if size in too_large:
                continue
            if self.make_room(pool, promised):
                promised += size
                pool.feed()
            else:
                too_large.add(size)
