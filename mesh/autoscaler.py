"""How many containers a pool should have: arithmetic, without a clock and without I/O.

Inputs get containers at once where those at hand would not come to them within their patience, which is about as long
as they run themselves. A shortage that lasts is worth more containers, however small it is. A container ends only when
it has been idle for the whole of `scaledown_window`. Between the last two there is so much room that a constant load
starts and ends nothing, also one that comes at random, if its inputs are short. Only while a load begins, when nobody
knows how long its inputs take, are there too many containers; what is idle then, while others work, ends sooner.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

_SHORTEST_PATIENCE, _LONGEST_PATIENCE = 0.5, 1.0  # seconds an input may wait for a container that is there
_LASTING = 1.0  # seconds after which a shortage is no accident
_OVERDUE = 2.0  # times the usual duration, after which a run is not expected to end soon
_BEGINNING = 30.0  # seconds in which a pool comes to terms with a load
_SOON = 10.0  # seconds that an idle container is kept meanwhile, while inputs go on coming
_GOING_ON = 2.0  # seconds within which they do
_RECENT = 32  # runs that durations are known from


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a pool may have on one worker.

    Attributes:
        minimum: containers it has without any load. kept: idle ones it goes on having, because nobody else has them.
        maximum: containers it may have. buffer: idle ones beside those that run, while the pool is in use.
        window: seconds an idle container is kept. target: inputs that a container is to run at once.
    """

    minimum: int = 0
    kept: int = 0
    maximum: int | None = None
    buffer: int = 0
    window: float = 60.0
    target: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a pool has to do, and has to do it with.

    Attributes:
        waiting: inputs that no container runs. runs: seconds that each running input has been running, but for those
            that just wait for other calls; needed only where inputs wait.
        busy, starting: containers with inputs; containers that are not ready.
        leaving: busy containers beside these, which end after what they run, and are to be replaced.
        idle: seconds for which each idle container has had nothing to do, the longest first.
        in_use: another worker has inputs of this pool.
        duration: seconds that inputs take; `None` where that is not known, or does not matter.
        short: seconds for which inputs have waited, or the buffer was not whole. quiet: seconds since it had inputs.
    """

    waiting: int = 0
    runs: Sequence[float] = ()
    busy: int = 0
    leaving: int = 0
    starting: int = 0
    idle: Sequence[float] = ()
    in_use: bool = False
    duration: float | None = None
    short: float = 0.0
    quiet: float = 0.0

    @property
    def containers(self) -> int:
        return self.busy + self.starting + len(self.idle)


@dataclass(frozen=True, slots=True)
class Plan:
    """Containers to start, and how many of the idle ones to end, the longest idle first."""

    start: int
    end: int


def decide(load: Load, bounds: Bounds) -> Plan:
    """What to do about a load, within the bounds."""
    needed = load.busy + load.leaving + _missing(load, bounds)
    lasting = load.duration is None or load.short >= _LASTING
    in_use = needed > 0 or load.in_use or load.quiet < bounds.window
    buffered = needed + bounds.buffer if in_use else needed
    limit = math.inf if bounds.maximum is None else bounds.maximum
    wanted = min(max(buffered if lasting else needed, bounds.minimum), limit)
    kept = min(max(buffered, bounds.minimum, bounds.kept), limit)
    past_window = sum(idle > bounds.window for idle in load.idle)
    end = max(min(past_window, load.containers - kept), load.containers - limit)
    return Plan(start=int(max(0, wanted - load.containers)), end=int(max(0, min(end, len(load.idle)))))


def _missing(load: Load, bounds: Bounds) -> int:
    """Containers that the waiting inputs need beside the busy ones."""
    if not load.waiting:
        return 0
    if load.duration is None:
        return math.ceil(load.waiting / bounds.target)
    usual = max(load.duration, statistics.median(load.runs) if load.runs else 0.0, 1e-6)
    patience = min(max(usual, _SHORTEST_PATIENCE), _LONGEST_PATIENCE)
    ending = sum(run <= max(_OVERDUE * load.duration, patience) for run in load.runs)
    served = ending * patience / usual  # inputs that what runs makes room for while they can wait
    each = bounds.target * max(1.0, patience / usual)  # inputs that a container takes on meanwhile
    missing = math.ceil(max(0.0, load.waiting - served) / each)
    return math.ceil(load.waiting / each) if load.short >= _LASTING else missing


class Autoscaler:
    """Remembers of one pool what its decisions need: how long inputs take, and since when there are too few containers.

    Times come from the caller's clock, whatever that counts from.
    """

    def __init__(self) -> None:
        self.reset()
        self._quiet_since = self._used_since = -math.inf

    def reset(self) -> None:
        """The code is another one: how long it takes is not known."""
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._mean: float | None = None
        self.median: float | None = None
        self._since_median = 0
        self._short_since: float | None = None

    def ran(self, duration: float) -> None:
        """An input took so many seconds."""
        self._durations.append(duration)
        self._since_median += 1
        if len(self._durations) < _RECENT or self._since_median >= _RECENT:
            self._since_median = 0
            self.median = statistics.median(self._durations)
            self._mean = statistics.fmean(self._durations)

    def quiet(self, now: float) -> float:
        """Seconds since the pool had inputs."""
        return now - self._quiet_since

    def plan(self, now: float, load: Load, bounds: Bounds, *, once: bool = False) -> Plan:
        """What to do about a load, seen at `now`. Calling it again is cheap and harms nothing.

        Args:
            load: without its duration and its times, which are known here. once: a container takes one input only, so
                that none at hand makes room for another.
        """
        if load.busy or load.leaving or load.waiting:
            self._used_since = now if self.quiet(now) > bounds.window else self._used_since
            self._quiet_since = now
        quiet = self.quiet(now)
        in_use = load.in_use or quiet < bounds.window
        if not load.waiting and (not in_use or len(load.idle) + load.starting >= bounds.buffer):
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        short = 0.0 if self._short_since is None else now - self._short_since
        if now - self._used_since < _BEGINNING and quiet < _GOING_ON:
            bounds = replace(bounds, window=min(bounds.window, _SOON))
        duration = None if once else self._mean
        plan = decide(replace(load, duration=duration, short=short, quiet=quiet), bounds)
        if plan.start:
            self._short_since = None  # what is started must show first what it does
        return plan
