"""A pool without processes and without time: arrivals, containers and what the autoscaler decides, event by event."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from mesh.autoscaler import Autoscaler, Bounds, Load

_TICK = 0.5


@dataclass(eq=False)
class Box:
    """A container of the simulation."""

    ready: bool = False
    began: float | None = None
    idle_since: float = 0.0


@dataclass
class Simulation:
    """One pool under a load.

    Attributes:
        takes: seconds that an input runs. start: seconds a container takes to start. room: containers that fit.
        changes: when containers were started (+) or ended (-), and how many. counts: containers and backlog over time.
        waits: seconds that each input waited.
    """

    takes: Callable[[], float]
    bounds: Bounds = field(default_factory=Bounds)
    start: float = 0.1
    room: int = 1000
    once: bool = False
    scaler: Autoscaler = field(default_factory=Autoscaler)
    boxes: list[Box] = field(default_factory=list[Box])
    queue: deque[float] = field(default_factory=deque[float])
    changes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    counts: list[tuple[float, int, int]] = field(default_factory=list[tuple[float, int, int]])
    waits: list[float] = field(default_factory=list[float])
    _again: bool = False

    def run_closed(self, callers: int, until: float) -> None:
        """Play it with so many callers, each of which calls again as soon as its input has ended."""
        self._again = True
        self.run([0.0] * callers, until)

    def run(self, arrivals: Iterable[float], until: float) -> None:
        """Play it: each arrival is one input."""
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = itertools.count()
        self._arrivals = iter(arrivals)
        self._next_arrival()
        self._at(0.0, self._tick)
        while self._events and self._events[0][0] <= until:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
            self._feed(now)

    def changes_after(self, moment: float) -> list[tuple[float, int]]:
        return [change for change in self.changes if change[0] > moment]

    def containers_at(self, moment: float) -> int:
        return sum(change for at, change in self.changes if at <= moment)

    def _at(self, moment: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._number), happen))

    def _next_arrival(self) -> None:
        moment = next(self._arrivals, None)
        if moment is not None:
            self._at(moment, self._arrive)

    def _arrive(self, now: float) -> None:
        self.queue.append(now)
        self._next_arrival()

    def _tick(self, now: float) -> None:
        self.counts.append((now, len(self.boxes), len(self.queue)))
        self._at(now + _TICK, self._tick)

    def _feed(self, now: float) -> None:
        while self.queue:
            idle = [box for box in self.boxes if box.ready and box.began is None]
            if not idle:
                break
            self._begin(max(idle, key=lambda box: box.idle_since), now)
        plan = self.scaler.plan(now, self._load(now), self.bounds, once=self.once)
        for box in sorted(self._idle(), key=lambda box: box.idle_since)[: plan.end]:
            self.boxes.remove(box)
            self.changes.append((now, -1))
        for _ in range(min(plan.start, self.room - len(self.boxes))):
            box = Box()
            self.boxes.append(box)
            self.changes.append((now, 1))
            self._at(now + self.start, lambda moment, box=box: self._ready(box, moment))  # type: ignore[misc]

    def _idle(self) -> list[Box]:
        return [box for box in self.boxes if box.ready and box.began is None]

    def _load(self, now: float) -> Load:
        running = [box.began for box in self.boxes if box.began is not None]
        return Load(
            waiting=len(self.queue),
            runs=[now - began for began in running],
            busy=len(running),
            starting=sum(not box.ready for box in self.boxes),
            idle=sorted((now - box.idle_since for box in self._idle()), reverse=True),
        )

    def _ready(self, box: Box, now: float) -> None:
        box.ready, box.idle_since = True, now

    def _begin(self, box: Box, now: float) -> None:
        self.waits.append(now - self.queue.popleft())
        box.began = now
        self._at(now + self.takes(), lambda moment: self._end(box, moment))

    def _end(self, box: Box, now: float) -> None:
        assert box.began is not None
        self.scaler.ran(now - box.began)
        box.began, box.idle_since = None, now
        if self._again:
            self.queue.append(now)
        if self.once:
            self.boxes.remove(box)
            self.changes.append((now, -1))


def evenly(rate: float, since: float = 0.0, until: float = float("inf")) -> Iterator[float]:
    """So many arrivals a second, at equal distances."""
    moment = since
    while moment < until:
        yield moment
        moment += 1 / rate


def at_random(rate: float, chance: random.Random, since: float = 0.0, until: float = float("inf")) -> Iterator[float]:
    """So many arrivals a second on average, each independent of the others."""
    moment = since + chance.expovariate(rate)
    while moment < until:
        yield moment
        moment += chance.expovariate(rate)
