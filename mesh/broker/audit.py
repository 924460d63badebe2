"""Whether an environment is as the topology says: what was deleted or changed by hand, and what of it can be mended.

What holds data is never made anew by itself: a server that did not bring a stream back may still have it on its disk,
and a backup can only be restored where nothing stands. The rest is made again, or set right, without asking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.broker.connection import STREAM_NOT_FOUND, Connection, NoResponders, StoreError
from mesh.broker.consumers import Consumers, filters_of
from mesh.protocol import PoolKey
from mesh.topology import Config, Limits, Topology, differences

_OPERATORS = ("max_bytes", "max_age", "duplicate_window", "num_replicas")  # where set, an operator may set them anew


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        name: of the stream or consumer. text: what is wrong with it. advice: what to do.
        is_missing: whether it is not there at all. pool: that of a consumer that can be set right.
    """

    name: str
    text: str
    advice: str
    is_missing: bool = False
    pool: PoolKey | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.text}: {self.advice}"


def is_missing(error: Exception) -> bool:
    """Whether an error may say that a stream is gone."""
    return isinstance(error, NoResponders) or (isinstance(error, StoreError) and error.code == STREAM_NOT_FOUND)


async def audit(
    connection: Connection, topology: Topology, pools: Mapping[PoolKey, Collection[str]], ack_wait: float | None
) -> list[Finding]:
    """Compare everything that is there with the topology. One request a stream, and one for 256 consumers.

    Args:
        pools: those that should have consumers, with the methods of classes. ack_wait: theirs; `None`: not known.

    Raises:
        StoreError, Unanswered, NoResponders, PermissionDeniedError: it cannot be told.
    """
    wanted = list(topology.streams(Limits()))
    found = await asyncio.gather(*(_config(connection, config["name"]) for config in wanted))
    findings = [finding for pair in zip(wanted, found, strict=True) for finding in _of_stream(topology, *pair)]
    if topology.calls not in {finding.name for finding in findings if finding.is_missing}:
        missing = {topology.consumer(pool): pool for pool in pools}
        async for consumer in Consumers(connection, topology).infos():
            missing.pop(consumer["name"], None)
            findings += _of_consumer(topology, consumer, pools, ack_wait)
        advice = "a worker makes it again within a minute"
        findings += [Finding(name, "is gone", advice, is_missing=True, pool=pool) for name, pool in missing.items()]
    return findings


async def _config(connection: Connection, stream: str) -> Config | None:
    try:
        config: Config = (await connection.api(f"STREAM.INFO.{stream}"))["config"]
    except StoreError as error:
        if error.code == STREAM_NOT_FOUND:
            return None
        raise
    return config


def _of_stream(topology: Topology, wanted: Config, found: Config | None) -> Iterator[Finding]:
    name = wanted["name"]
    if found is None and topology.is_kept(name):
        advice = "restore it from a backup, or make it anew with `mesh init`"
        yield Finding(name, "is gone, with what it held", advice, is_missing=True)
    elif found is None:
        advice = "a worker makes it again within a minute; `mesh init` does it now"
        yield Finding(name, "is gone", advice, is_missing=True)
    else:
        fixed = {key: value for key, value in wanted.items() if key not in _OPERATORS or not value}
        for setting, (is_, should) in differences(fixed, found).items():
            advice = "set it back with `nats stream edit`, as docs/operations.md says"
            yield Finding(name, f"was changed: {setting} is {is_!r}, and should be {should!r}", advice)


def _of_consumer(
    topology: Topology, info: Mapping[str, Any], pools: Mapping[PoolKey, Collection[str]], ack_wait: float | None
) -> Iterator[Finding]:
    name, found = info["name"], info["config"]
    pool = topology.parse_consumer(name)
    if pool is None:
        advice = f"it keeps calls from the workers; remove it with `nats consumer rm {topology.calls} {name}`"
        yield Finding(name, f"is no consumer of mesh's on {topology.calls}", advice)
        return
    methods = set(pools.get(pool, ()))
    if methods or pool not in pools:  # of a class, those that are gone are delivered too: somebody has to end them
        methods |= topology.methods_in(filters_of(found))
    wanted = topology.consumer_config(pool, ack_wait or 0, methods)
    unknown = (*_OPERATORS, *(() if ack_wait else ("ack_wait",)))
    changes = differences({key: value for key, value in wanted.items() if key not in unknown}, found)
    for setting, (is_, should) in changes.items():
        text = f"was changed: {setting} is {is_!r}, and should be {should!r}"
        yield Finding(name, text, "a worker sets it right within a minute", pool=pool)
    if info.get("paused"):
        advice = f"`nats consumer resume {topology.calls} {name}` goes on with it"
        yield Finding(name, f"is paused until {found.get('pause_until')}", advice)
