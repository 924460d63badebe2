"""What the server holds, read when nothing moves any more."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

from mesh import serialization
from mesh.broker import Broker
from mesh.broker.bucket import Bucket
from mesh.protocol import Failure, Result, State, parse_time
from tests.chaos.kinds import raised, told

_GROWING = ("KV_{}_results", "KV_{}_attempts")  # what a call leaves behind, and may
_SHORT_LIVED = ("KV_{}_workers", "KV_{}_slots", "KV_{}_clients")  # whose entries end by themselves
_LONGEST_LIFE = 150.0  # seconds


@dataclass(frozen=True, slots=True)
class Ended:
    """A stored result: what it says, as `told` and `raised` tell it, and when it was stored by the server's clock."""

    state: State
    value: str
    at: float
    worker: str


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything in an environment that outlives a moment.

    Attributes:
        deployed: streams, consumers and keys that calls must leave as they were.
        overdue: keys that should have ended by themselves. unsettled: inputs that consumers still know of.
        stored: results with how often each is there. dead: calls that have a dead letter, with how many.
    """

    deployed: frozenset[str]
    queued: tuple[str, ...]
    unsettled: int
    overdue: tuple[str, ...]
    results: dict[str, Ended] = field(default_factory=dict[str, Ended])
    stored: int = 0
    dead: Counter[str] = field(default_factory=Counter[str])


async def read(broker: Broker) -> Contents:
    """Everything there is."""
    topology, connection = broker.topology, broker.connection
    root = topology.bucket("")[:-1]
    growing = {name.format(root) for name in _GROWING} | {topology.calls, topology.dead, topology.logs}
    short_lived = {name.format(root) for name in _SHORT_LIVED}
    deployed, overdue = set[str](), []
    for stream in await _streams(broker):
        deployed.add(stream)
        if stream in growing:
            continue
        for subject in await connection.subjects(stream, ">"):
            if stream not in short_lived:
                deployed.add(f"{stream} {subject}")
            elif await _age(broker, stream, subject) > _LONGEST_LIFE:
                overdue.append(f"{stream} {subject}")
    deployed.update(f"consumer {name}" for name in await broker.consumers.names())
    results = await _results(broker)
    info = await connection.api(f"STREAM.INFO.{topology.bucket_stream('results')}")
    queued, unsettled = await queue(broker)
    dead = Counter[str]()
    for subject, count in (await connection.subjects(topology.dead, ">")).items():
        dead[subject.split(".")[-2]] += count
    return Contents(
        frozenset(deployed), queued, unsettled, tuple(overdue), results, int(info["state"]["messages"]), dead
    )


async def queue(broker: Broker) -> tuple[tuple[str, ...], int]:
    """Ids of the inputs in the queue, and how many inputs consumers know of."""
    subjects = await broker.connection.subjects(broker.topology.calls, ">")
    _, known = await broker.consumers.queue_sizes()
    return tuple(subject.split(".")[-2] for subject in subjects), known


async def waiting_clients(broker: Broker) -> list[str]:
    """Clients that are said to wait for their calls."""
    return list(await broker.clients.silent(math.inf))


async def _streams(broker: Broker) -> list[str]:
    """Names of the environment's streams."""
    names: list[str] = []
    while True:
        page = await broker.connection.api("STREAM.NAMES", {"offset": len(names)})
        names += page.get("streams") or []
        if len(names) >= page["total"]:
            root, upper = broker.topology.bucket("")[:-1], broker.topology.stream("")
            return [name for name in names if f"_{root}_" in name or name.startswith(upper)]


async def _age(broker: Broker, stream: str, subject: str) -> float:
    found = await broker.connection.get(stream, subject)
    return 0.0 if found is None else time.time() - parse_time(found.time)


async def _results(broker: Broker) -> dict[str, Ended]:
    bucket = Bucket(broker.connection, broker.topology, "results")
    ended = {}
    for key, stored in (await bucket.all()).items():
        result = Result.decode(stored.headers, stored.body)
        if result.state is State.SUCCEEDED:
            value = told(serialization.decode(result.format, result.body))
        else:
            value = raised(Failure.decode(result.body).type)
        ended[key.partition(".")[0]] = Ended(result.state, value, parse_time(stored.time), result.worker)
    return ended
