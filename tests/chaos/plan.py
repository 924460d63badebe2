"""What will go wrong, and when: decided by the seed before anything starts."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """Kinds of faults."""

    CONTAINER_KILL = "container_kill"
    CONTAINER_STOP = "container_stop"
    ZYGOTE_KILL = "zygote_kill"
    WORKER_KILL = "worker_kill"
    WORKER_STOP = "worker_stop"
    WORKER_TERM = "worker_term"
    SERVER_KILL = "server_kill"
    SERVER_STOP = "server_stop"
    CLIENT_KILL = "client_kill"
    CUT = "cut"
    BLACKHOLE = "blackhole"


# In each round; a fault has to be frequent enough to meet the others, and the mesh must have time to work.
_ROUND = [*Fault, *[Fault.CONTAINER_KILL] * 3, Fault.CONTAINER_STOP, Fault.WORKER_KILL, Fault.CUT]

_PAUSE = (0.4, 2.6)  # seconds between two faults
_LENGTHS = {  # seconds a fault lasts
    Fault.CONTAINER_STOP: (0.3, 3.0),
    Fault.WORKER_STOP: (0.5, 7.0),  # beyond the ack wait, too: others take over, and then it is back
    Fault.SERVER_KILL: (0.0, 2.0),
    Fault.SERVER_STOP: (0.5, 3.0),
    Fault.BLACKHOLE: (1.0, 3.0),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault: when (seconds from the start), what, to whom (0 to 1, of those that are there), for how long."""

    at: float
    fault: Fault
    pick: float
    length: float


def plan(seed: int, seconds: float, faults: Collection[Fault] = tuple(Fault)) -> list[Planned]:
    """The faults of a run, of these kinds. Every kind comes in each round, in another order each time."""
    kinds = [fault for fault in _ROUND if fault in faults]
    chance = random.Random(seed)
    planned: list[Planned] = []
    at = 2.0  # the workers are starting
    while True:
        for fault in chance.sample(kinds, len(kinds)):
            at += chance.uniform(*_PAUSE)
            if at >= seconds:
                return planned
            planned.append(Planned(at, fault, chance.random(), chance.uniform(*_LENGTHS.get(fault, (0.0, 0.0)))))
