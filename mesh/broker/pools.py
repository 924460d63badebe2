"""Pools of their own: which options, and which class parameters, a pool's name stands for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection

from nats.aio.msg import Msg

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection, Stored, translated
from mesh.exception import Error
from mesh.protocol import PoolKey, parse_time
from mesh.records import PoolRecord
from mesh.topology import Topology

_RENEWED = 3600.0  # seconds after which whoever calls says again that the pool is wanted


class Pools:
    """The pools that callers have asked for, other than the shared one of each function."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._bucket = Bucket(connection, topology, "pools")
        self._registered: dict[PoolKey, float] = {}

    async def register(self, record: PoolRecord) -> None:
        """Say what a pool is, before the first call of this client to it, and again now and then."""
        if self.is_registered(record.key):
            return
        began = time.monotonic()
        async with translated(f"registering pool {record.key}"):
            await self._bucket.put(self._topology.pool_key(record.key), record.encode())
        self._registered[record.key] = began

    def is_registered(self, pool: PoolKey) -> bool:
        """Whether this client has said so lately."""
        said = self._registered.get(pool)
        return said is not None and time.monotonic() - said < _RENEWED

    async def all(self, filter: str = ">") -> list[PoolRecord]:
        """Every pool, or those of an app (`app.*.*`). What cannot be read is left out."""
        return [record async for record, _ in self._read(await self._bucket.keys(filter))]

    async def of(self, app: str, functions: Collection[str]) -> list[PoolRecord]:
        """The pools of some functions of an app."""
        if not functions:
            return []
        shared = self._topology.pool_key(PoolKey(app, "*", "*"))
        return [record for record in await self.all(shared) if record.function in functions]

    async def older_than(self, age: float, now: float) -> list[tuple[PoolRecord, int]]:
        """Pools that nobody has asked for since, with the sequences of their records; `now` by the server's clock."""
        found = self._read(await self._bucket.keys())
        return [(record, s.sequence) async for record, s in found if now - parse_time(s.time) > age]

    async def _read(self, keys: Collection[str]) -> AsyncIterator[tuple[PoolRecord, Stored]]:
        for stored in (await self._bucket.get_many(list(keys))).values():
            try:
                yield PoolRecord.decode(stored.body), stored
            except Error:
                continue

    async def get(self, pool: PoolKey) -> PoolRecord | None:
        """What a pool is; `None` if nobody has asked for it."""
        found = await self._bucket.get(self._topology.pool_key(pool))
        return None if found is None else PoolRecord.decode(found.body)

    async def watch(self, on_record: Callable[[PoolRecord], None]) -> None:
        """Be told of each pool once it is stored. Pushes can get lost: read `all` again now and then."""

        async def deliver(message: Msg) -> None:
            try:
                record = PoolRecord.decode(message.data)
            except Error:  # of a newer mesh, or a deletion
                return
            on_record(record)

        await self._connection.subscribe(self._topology.pooled_subject(), deliver)

    async def restore(self, record: PoolRecord) -> None:
        """Bring back a pool that was forgotten too early."""
        await self._bucket.put(self._topology.pool_key(record.key), record.encode())

    async def forget(self, sequence: int) -> bool:
        """Forget a pool; false if somebody has asked for it since."""
        return await self._bucket.delete(sequence)

    async def erase(self, app: str) -> None:
        """Forget all pools of an app of a single run."""
        await self._bucket.purge(self._topology.pool_key(PoolKey(app, "*", "*")))
