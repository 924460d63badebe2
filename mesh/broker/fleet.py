"""Who is at work, which single runs are alive, what went wrong with inputs: the small records beside the calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection
from mesh.exception import Error
from mesh.protocol import escape, parse_time, unescape
from mesh.records import Attempt, AttemptLog, WorkerRecord
from mesh.topology import Topology

WORKER_TTL = 30.0  # seconds a worker is taken as alive after it last said so
RENEW_WORKER = 10.0  # seconds between two such signs
_FRESH = 2.0  # seconds a list of workers is good enough for a hint
APP_TTL = 30.0  # the same for the client of a single run
RENEW_APP = 10.0


class Workers:
    """The workers that are alive."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._bucket = Bucket(connection, topology, "workers")
        self._recent: tuple[float, list[WorkerRecord]] = (0.0, [])
        self._reading = asyncio.Lock()

    async def announce(self, record: WorkerRecord) -> int:
        """Say that a worker is alive, and what it does. Returns the entry's sequence."""
        return await self._bucket.put(record.worker, record.encode(), ttl=WORKER_TTL)

    async def server_time(self, worker: str) -> float:
        """When a worker last announced itself, by the server's clock; its own clock where that is not known."""
        found = await self._bucket.get(worker)
        return parse_time(found.time) if found is not None else time.time()

    async def withdraw(self, sequence: int) -> None:
        """Say that it has ended."""
        await self._bucket.delete(sequence)

    async def recent(self) -> list[WorkerRecord]:
        """The same as `all`, perhaps some seconds old: for hints, of which thousands may be asked for at once."""
        async with self._reading:
            when, records = self._recent
            if time.monotonic() - when > _FRESH:
                records = await self.all()
                self._recent = (time.monotonic(), records)
            return records

    async def all(self) -> list[WorkerRecord]:
        """The workers that are alive, by name. Records of another version of mesh are left out."""
        records = []
        for stored in (await self._bucket.all()).values():
            try:
                records.append(WorkerRecord.decode(stored.body))
            except Error:
                continue
        return sorted(records, key=lambda record: record.worker)


class Runs:
    """Apps of a single run: alive while their client renews them."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._bucket = Bucket(connection, topology, "apps")

    async def is_new(self) -> bool:
        """Whether the bucket was made (again) so lately that clients which are alive may not be in it yet."""
        info = await self._connection.api(f"STREAM.INFO.{self._bucket.stream}")
        return parse_time(info["ts"]) - parse_time(info["created"]) < APP_TTL

    async def renew(self, app: str, client: str) -> int:
        return await self._bucket.put(escape(app), client.encode(), ttl=APP_TTL)

    async def end(self, app: str) -> None:
        """The client has ended: the app goes now instead of when its time is up."""
        found = await self._bucket.get(escape(app))
        if found is not None:
            await self._bucket.delete(found.sequence)

    async def alive(self) -> set[str]:
        """Names of the apps whose client is there."""
        return {unescape(key) for key in await self._bucket.keys()}


class Attempts:
    """What went wrong with inputs so far. A happy call has no entry."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._bucket = Bucket(connection, topology, "attempts")

    async def get(self, key: str) -> AttemptLog:
        found = await self._bucket.get(key)
        return AttemptLog() if found is None else AttemptLog.decode(found.body)

    async def get_many(self, keys: Sequence[str]) -> dict[str, AttemptLog]:
        """What there is of these."""
        return {key: AttemptLog.decode(stored.body) for key, stored in (await self._bucket.get_many(keys)).items()}

    async def add(self, key: str, delivery: int, attempt: Attempt) -> AttemptLog:
        """Record how a delivery went; returns the log with it. A delivery that is recorded already stays as it is."""
        while True:
            found = await self._bucket.get(key)
            log = AttemptLog() if found is None else AttemptLog.decode(found.body)
            new = log.with_attempt(delivery, attempt)
            if new is log or await self._bucket.write(key, new.encode(), last=found.sequence if found else 0):
                return new


class Locks:
    """Short claims that one worker of the fleet holds, such as the minute's sweep."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._bucket = Bucket(connection, topology, "slots")

    async def claim(self, name: str, owner: str, ttl: float) -> bool:
        """Hold `name` for `ttl` seconds; false if somebody else does."""
        return await self._bucket.write(name, owner.encode(), last=0, ttl=ttl) is not None
