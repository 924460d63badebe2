"""How many containers a pool should have: arithmetic, without a clock and without I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mesh.spec import FunctionSpec

_DRAIN_TIME = 1.0  # seconds of work in the backlog that are worth another container


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a pool has to do, as its worker sees it.

    Attributes:
        waiting: inputs that do not run, also those a container has behind a running one. running: inputs that do.
        duration: median seconds of recent runs; `None` while that is not known.
    """

    waiting: int
    running: int
    duration: float | None = None


def containers_wanted(load: Load, spec: FunctionSpec) -> int:
    """Containers for this load, within the function's bounds.

    One for as many inputs that wait or run as a container is to have; fewer where runs are known to be so short that
    the ones at hand work the backlog off within a second, since another container would come too late to help.
    """
    waiting = load.waiting
    if load.duration is not None:
        waiting = min(waiting, math.ceil(waiting * load.duration / _DRAIN_TIME))
    busy = math.ceil((load.running + waiting) / spec.inputs_wanted)
    active = busy + (spec.buffer_containers if busy else 0)
    wanted = max(active, spec.min_containers)
    return wanted if spec.max_containers is None else min(wanted, spec.max_containers)
