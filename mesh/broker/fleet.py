"""Who is at work, which single runs are alive, what went wrong with inputs: the small records beside the calls."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Generator, Sequence

from nats.aio.msg import Msg

from mesh.background import Background
from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection, NoResponders, StoreError, Unanswered
from mesh.exception import Error
from mesh.protocol import escape, parse_time, unescape
from mesh.records import Attempt, AttemptLog, WorkerRecord
from mesh.topology import Topology

WORKER_TTL = 30.0  # seconds a worker is taken as alive after it last said so
RENEW_WORKER = 5.0  # seconds between two such signs
_FRESH = 2.0  # seconds a list of workers is good enough for a hint
APP_TTL = 30.0  # the same for the client of a single run
RENEW_APP = 10.0
_CLIENT_KEPT = 3600.0  # seconds the entry of a client stays that nobody looks after


class Workers:
    """The workers that are alive."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
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

    async def watch(self, on_record: Callable[[WorkerRecord], None]) -> None:
        """Be told what workers announce, as they do. Announcements can get lost; the next one comes soon."""

        async def deliver(message: Msg) -> None:
            with contextlib.suppress(Error):  # of another version of mesh
                on_record(WorkerRecord.decode(message.data))

        await self._connection.subscribe(self._bucket.subject("*"), deliver)

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


class Clients:
    """Clients that wait for their calls: `remote` and `map` end with whoever made them.

    An entry says by its time when its client was last there. It is deleted when the client waits no more, or by
    whoever finds it old; so what is not here is dead, or has not waited long.

    Args:
        token: of this client. client: how others see it, `host/pid`. silence: seconds after which a client that said
            it waits, and nothing since, is taken as dead.
    """

    def __init__(self, connection: Connection, topology: Topology, token: str, client: str, silence: float) -> None:
        self._bucket = Bucket(connection, topology, "clients")
        self._token = token
        self._client = client
        self.silence = silence
        self._waiting = 0
        self._entry: int | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._background = Background()

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Say that this client waits, again and again while the block runs."""
        self._waiting += 1
        if self._renewing is None:
            self._renewing = self._background.spawn(self._renew())
        try:
            yield
        finally:
            self._waiting -= 1

    async def _renew(self) -> None:
        try:
            while self._waiting:
                try:
                    self._entry = await self._bucket.put(self._token, self._client.encode(), ttl=_CLIENT_KEPT)
                    await asyncio.sleep(self.silence / 3)
                except (Unanswered, NoResponders, StoreError, Error):  # the server is away, or has no room
                    await asyncio.sleep(1)
        finally:
            self._renewing = None
        await self._withdraw()

    async def _withdraw(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            with contextlib.suppress(Error):  # then it is found to be old
                await self._bucket.discard(entry)

    def leave(self) -> None:
        """Leave the entry as it is: this client goes while calls of its are open, which workers end once it is old."""
        self._entry = None

    async def close(self) -> None:
        """This client waits no more."""
        await self._background.cancel()
        await self._withdraw()

    async def missing(self, tokens: Collection[str]) -> set[str]:
        """Those of these that nobody waits under."""
        return set(tokens) - set(await self._bucket.get_many(list(tokens)))

    async def silent(self, now: float) -> dict[str, int]:
        """Tokens whose client has gone without a word, with the sequences of their entries; `now` by the server."""
        entries = await self._bucket.all()
        return {
            token: stored.sequence for token, stored in entries.items() if now - parse_time(stored.time) > self.silence
        }

    async def forget(self, sequence: int) -> bool:
        """Delete an entry; false if its client has said something since."""
        return await self._bucket.delete(sequence)


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
    """Short claims that one worker of the fleet holds, such as the minute's sweep. Names without a dot: slots have
    three, in the same bucket."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._bucket = Bucket(connection, topology, "slots")

    async def claim(self, name: str, owner: str, ttl: float) -> bool:
        """Hold `name` for `ttl` seconds; false if somebody else does."""
        return await self._bucket.write(name, owner.encode(), last=0, ttl=ttl) is not None
