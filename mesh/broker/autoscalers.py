"""What `update_autoscaler` has set for pools, beside what is deployed: until the next deploy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from nats.aio.msg import Msg

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection
from mesh.exception import Error
from mesh.protocol import PoolKey
from mesh.records import AutoscalerRecord
from mesh.topology import Topology

Check = Callable[[Mapping[str, Any]], object]


class Autoscalers:
    """The settings of pools that differ from what is deployed, in the bucket of pools, beside what these are."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._bucket = Bucket(connection, topology, "pools")

    async def update(self, pool: PoolKey, options: Mapping[str, Any], check: Check) -> dict[str, Any]:
        """Set options of a pool; others stay as they were set. Returns all that are set.

        Args:
            check: raises where all of them together make no sense.
        """
        key = self._topology.autoscaler_key(pool)
        while True:
            found = await self._bucket.get(key)
            merged = {**(AutoscalerRecord.decode(found.body).options if found else {}), **options}
            check(merged)
            record = AutoscalerRecord(options=merged)
            if await self._bucket.write(key, record.encode(), last=found.sequence if found else 0) is not None:
                return merged

    async def all(self, app: str = "*") -> dict[PoolKey, Mapping[str, Any]]:
        """What is set, by pool. What cannot be read is left out."""
        found: dict[PoolKey, Mapping[str, Any]] = {}
        for key, stored in (await self._bucket.all(self._topology.autoscaler_key(PoolKey(app, "*", "*")))).items():
            pool = self._topology.parse_autoscaler(key)
            with contextlib.suppress(Error):  # of a newer mesh
                if pool is not None:
                    found[pool] = AutoscalerRecord.decode(stored.body).options
        return found

    async def reset(self, app: str) -> None:
        """Let what is deployed hold again for all pools of an app."""
        for pool, options in (await self.all(app)).items():
            if options:  # written, and not deleted: workers are told of what is written
                await self._bucket.put(self._topology.autoscaler_key(pool), AutoscalerRecord(options={}).encode())

    async def erase(self, app: str) -> None:
        """Forget all of an app of a single run."""
        await self._bucket.purge(self._topology.autoscaler_key(PoolKey(app, "*", "*")))

    async def watch(self, on_change: Callable[[PoolKey, Mapping[str, Any]], None]) -> None:
        """Be told what is set once it is stored. Pushes can get lost: read `all` again now and then."""

        async def deliver(message: Msg) -> None:
            pool = self._topology.parse_autoscaler(message.subject.removeprefix(f"{self._topology.root}.pooled."))
            with contextlib.suppress(Error):
                if pool is not None:
                    on_change(pool, AutoscalerRecord.decode(message.data).options)

        await self._connection.subscribe(self._topology.pooled_subject(), deliver)
