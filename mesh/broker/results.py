"""Results: created once by whoever finishes first, pushed to who waits, and readable until they expire."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from mesh.background import Background
from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection, NoResponders, Stored, StoreError, Unanswered
from mesh.exception import Error
from mesh.protocol import Result, token_of
from mesh.topology import Topology

REREAD = 15.0  # seconds after which a waiter looks for itself, whatever was pushed: core messages can get lost
_LINGER = 5.0  # seconds a subscription is kept after the last waiter, so that calls in a row share it


@dataclass(slots=True)
class _Subject:
    """One subscription, and how many wait on it."""

    waiters: int = 0
    subscription: Subscription | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Results:
    """The results of an environment, for clients who wait and workers who finish.

    Args:
        token: of this client; its own calls share one subscription, others' get one each.
    """

    def __init__(self, connection: Connection, topology: Topology, token: str) -> None:
        self._connection = connection
        self._topology = topology
        self._token = token
        self._bucket = Bucket(connection, topology, "results")
        self._waiting: dict[str, list[asyncio.Future[Result]]] = {}
        self._subjects: dict[str, _Subject] = {}
        self._background = Background()
        self._rereading = False
        connection.events.reconnected.append(lambda: self._background.spawn(self._reread()))

    async def close(self) -> None:
        """End what runs in the background. Waiters are their owners' to end."""
        await self._background.cancel()

    # --- storing -----------------------------------------------------------------------------------------------------

    async def create(self, key: str, result: Result, ttl: float | None = None) -> bool:
        """Store the result of an input; false if it has one already.

        Raises:
            StoreError, Unanswered, NoResponders: it is not known to be stored; try again, and keep the lease.
        """
        return await self._bucket.write(key, result.body, last=0, ttl=ttl, headers=result.headers()) is not None

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get(self, key: str) -> Result | None:
        """The stored result, or `None`."""
        found = await self._bucket.get(key)
        return None if found is None else Result.decode(found.headers, found.body)

    async def get_many(self, keys: Iterable[str]) -> dict[str, Result]:
        """What there is of these."""
        found = await self._bucket.get_many(list(keys))
        return {key: Result.decode(stored.headers, stored.body) for key, stored in found.items()}

    async def newest(self, count: int, before: int | None = None) -> list[tuple[str, Stored]]:
        """The results stored last, newest first, with their keys; `before` a sequence, to go on from there."""
        state = (await self._connection.api(f"STREAM.INFO.{self._bucket.stream}"))["state"]
        end = state["last_seq"] if before is None else before - 1
        found: list[Stored] = []
        while end >= state["first_seq"] and len(found) < count and state["messages"]:
            start = max(state["first_seq"], end - 2 * count + 1)
            page = await self._connection.get_range(self._bucket.stream, start, end - start + 1)
            found += sorted((m for m in page if m.sequence <= end), key=lambda m: -m.sequence)
            end = start - 1
        return [(self._bucket.key(stored), stored) for stored in found[:count]]

    # --- waiting -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def waiting(self, key: str) -> AsyncGenerator[asyncio.Future[Result]]:
        """A future that resolves when the result is pushed. Listening has begun when this yields: submit or read then.

        Pushes can get lost, so what is waited for is also read again at times.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        subject = self._subject_for(key)
        self._waiting.setdefault(key, []).append(future)
        try:
            await self._listen(subject)
            if not self._rereading:
                self._rereading = True
                self._background.spawn(self._reread_regularly())
            yield future
        finally:
            future.cancel()
            self._waiting[key].remove(future)
            if not self._waiting[key]:
                del self._waiting[key]
            self._unlisten(subject)

    def _subject_for(self, key: str) -> str:
        call, _, index = key.partition(".")
        if token_of(call) == self._token:
            return self._topology.done_filter(self._token)
        return self._topology.done_subject(call, index)

    async def _listen(self, subject: str) -> None:
        entry = self._subjects.setdefault(subject, _Subject())
        entry.waiters += 1
        async with entry.lock:
            if entry.subscription is None:
                entry.subscription = await self._connection.subscribe(subject, self._on_done)

    def _unlisten(self, subject: str) -> None:
        entry = self._subjects[subject]
        entry.waiters -= 1
        if not entry.waiters:
            asyncio.get_running_loop().call_later(_LINGER, self._drop, subject, entry)

    def _drop(self, subject: str, entry: _Subject) -> None:
        if not entry.waiters and self._subjects.get(subject) is entry and entry.subscription is not None:
            del self._subjects[subject]
            if not self._connection.is_closed:
                self._background.spawn(entry.subscription.unsubscribe())

    async def _on_done(self, message: Msg) -> None:
        _, head, token, index = message.subject.rsplit(".", 3)
        self._resolve(f"{head}{token}.{index}", message.headers or {}, message.data)

    def _resolve(self, key: str, headers: Mapping[str, str], body: bytes) -> None:
        waiting = [future for future in self._waiting.get(key, ()) if not future.done()]
        if not waiting:
            return  # not even parsed
        try:
            result = Result.decode(headers, body)
        except Error as error:
            for future in waiting:
                future.set_exception(error)
        else:
            for future in waiting:
                future.set_result(result)

    async def _reread_regularly(self) -> None:
        while self._waiting:
            await asyncio.sleep(REREAD * random.uniform(0.8, 1.2))
            await self._reread()
        self._rereading = False

    async def _reread(self) -> None:
        """Read what is waited for, in case a push was missed."""
        keys = [key for key, futures in self._waiting.items() if not all(f.done() for f in futures)]
        try:
            for key, stored in (await self._bucket.get_many(keys)).items():
                self._resolve(key, stored.headers, stored.body)
        except (Unanswered, NoResponders, StoreError):
            pass  # the server is away; the reconnect brings us here again
