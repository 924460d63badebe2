"""The durable consumers on the queue: one a pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any

from nats.aio.msg import Msg

from mesh.broker.connection import CONSUMER_NOT_FOUND, Connection, StoreError
from mesh.protocol import PoolKey, parse_time
from mesh.topology import Topology

_TOGETHER = 50  # consumers that are made at once


class Consumers:
    """What delivers inputs to workers, pool by pool."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology

    async def watch(self, on_made: Callable[[str, float], None]) -> None:
        """Be told the name of each consumer that is made, by whomever, and when, by the server's clock."""

        async def deliver(message: Msg) -> None:
            advisory = json.loads(message.data)
            on_made(advisory["consumer"], parse_time(advisory["timestamp"]))

        await self._connection.subscribe(f"$JS.EVENT.ADVISORY.CONSUMER.CREATED.{self._topology.calls}.*", deliver)

    async def names(self) -> set[str]:
        """Names of the consumers that exist."""
        names: set[str] = set()
        while True:
            page = await self._connection.api(f"CONSUMER.NAMES.{self._topology.calls}", {"offset": len(names)})
            found = page.get("consumers") or []
            names.update(found)
            if not found or len(names) >= page["total"]:
                return names

    async def infos(self) -> AsyncIterator[dict[str, Any]]:
        """Everything about each consumer; 256 with each request."""
        seen = 0
        while True:
            page = await self._connection.api(f"CONSUMER.LIST.{self._topology.calls}", {"offset": seen})
            consumers = page.get("consumers") or []
            seen += len(consumers)
            for info in consumers:
                yield info
            if not consumers or seen >= page["total"]:
                return

    async def info(self, pool: PoolKey) -> dict[str, Any] | None:
        """Everything about the consumer of a pool; `None` if it has none."""
        try:
            name = self._topology.consumer(pool)
            info: dict[str, Any] = await self._connection.api(f"CONSUMER.INFO.{self._topology.calls}.{name}")
        except StoreError as error:
            if error.code == CONSUMER_NOT_FOUND:
                return None
            raise
        return info

    async def queue_sizes(self) -> tuple[int, int]:
        """Inputs in the queue, and inputs that consumers know of: waiting, running or delayed. These are counted before
        and after those, and the larger number counts, since inputs come and go meanwhile."""
        before = await self._known()
        info = await self._connection.api(f"STREAM.INFO.{self._topology.calls}")
        return int(info["state"]["messages"]), max(before, await self._known())

    async def _known(self) -> int:
        known = 0
        async for consumer in self.infos():
            known += consumer["num_pending"] + consumer["num_ack_pending"]
        return known

    async def delivered(self) -> set[str]:
        """The filters of all consumers: what nobody delivers is in none of them."""
        found: set[str] = set()
        async for info in self.infos():
            found.update(filters_of(info["config"]))
        return found

    async def add(self, pools: Mapping[PoolKey, Collection[str]], ack_wait: float) -> dict[str, float]:
        """Create the consumers of these pools, or set right what was changed of them.

        Args:
            pools: with the methods of each that is a class's. What is queued for a method that is gone is delivered
                all the same, since somebody has to end it.

        Returns when each was made, by the server's clock.
        """
        gate = asyncio.Semaphore(_TOGETHER)

        async def add(pool: PoolKey, methods: Collection[str]) -> tuple[str, float]:
            async with gate:
                if methods and (info := await self.info(pool)) is not None:
                    methods = {*methods, *self._topology.methods_in(filters_of(info["config"]))}
                return await self._create(pool, methods, ack_wait)

        return dict(await asyncio.gather(*(add(pool, methods) for pool, methods in pools.items())))

    async def _create(self, pool: PoolKey, methods: Collection[str], ack_wait: float) -> tuple[str, float]:
        config = self._topology.consumer_config(pool, ack_wait, methods)
        name = f"CONSUMER.CREATE.{self._topology.calls}.{config['durable_name']}"
        if not methods:
            name = f"{name}.{config['filter_subject']}"
        info = await self._connection.api(name, {"stream_name": self._topology.calls, "config": config})
        return config["durable_name"], parse_time(info["created"])

    async def remove(self, name: str) -> None:
        """Delete a consumer; what it has not delivered stays in the stream."""
        try:
            await self._connection.api(f"CONSUMER.DELETE.{self._topology.calls}.{name}")
        except StoreError as error:
            if error.code != CONSUMER_NOT_FOUND:
                raise


def filters_of(config: Mapping[str, Any]) -> list[str]:
    """The subjects that a consumer delivers."""
    return config.get("filter_subjects") or [config.get("filter_subject") or ">"]
