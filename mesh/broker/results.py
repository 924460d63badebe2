"""Results: created once by whoever finishes first, pushed to who waits, and readable until they expire."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nats.aio.subscription import Subscription

from mesh.background import Background
from mesh.broker.bucket import Bucket, condition
from mesh.broker.connection import (
    WRONG_LAST_SEQUENCE,
    Connection,
    NoResponders,
    Stored,
    StoreError,
    Unanswered,
)
from mesh.broker.lines import Incoming, encode_headers
from mesh.broker.publishing import Publisher
from mesh.exception import Error
from mesh.protocol import END, Result, end_key, token_of
from mesh.topology import Topology

REREAD = 15.0  # seconds after which everything waited for is read again: core messages can get lost
_LINGER = 5.0  # seconds a subscription is kept after the last waiter, so that calls in a row share it
_TICK = 0.5


@dataclass(slots=True)
class _Subject:
    """One subscription, and how many wait on it."""

    waiters: int = 0
    subscription: Subscription | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Waiter:
    """Somebody who waits for one result. Has begun to listen when it is made; close it in a `finally`."""

    __slots__ = ("_results", "future", "key", "look_at", "subjects")

    def __init__(
        self, results: Results, key: str, subjects: Sequence[str], future: asyncio.Future[Result | None]
    ) -> None:
        self.key = key
        self.subjects = subjects
        self.future = future
        self.look_at = float("inf")
        self._results = results

    async def wait(self, pause: float) -> Result | None:
        """The result; `None` after about `pause` seconds, when it is time to look for oneself.

        One clock serves all waiters: a timer for each would cost more than the rest of a short wait.
        """
        self.look_at = asyncio.get_running_loop().time() + pause
        return await self.future

    def wake(self) -> None:
        """End a wait without a result. One that comes from now on is the next wait's, also before that has begun."""
        woken, self.future = self.future, asyncio.get_running_loop().create_future()
        self.look_at = float("inf")
        woken.set_result(None)

    def close(self) -> None:
        self._results.release(self)


class Results:
    """The results of an environment, for clients who wait and workers who finish.

    Args:
        token: of this client; its own calls share one subscription, others' get one each.
    """

    def __init__(self, connection: Connection, topology: Topology, token: str) -> None:
        self._connection = connection
        self._topology = topology
        self._token = token
        self._own = topology.done_filter(token)
        self._bucket = Bucket(connection, topology, "results")
        self._publisher = Publisher(connection)
        self._waiting: dict[str, list[Waiter]] = {}
        self._subjects: dict[str, _Subject] = {}
        self._background = Background()
        self._ticking = False
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
        headers = encode_headers({**result.headers(), **condition(0, ttl)})
        try:
            await self._publisher.store(self._bucket.subject(key), result.body, headers)
        except StoreError as error:
            if error.code == WRONG_LAST_SEQUENCE:
                return False
            raise
        return True

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get(self, key: str) -> Result | None:
        """The stored result, or `None`."""
        found = await self._bucket.get(key)
        return None if found is None else Result.decode(found.headers, found.body)

    async def get_many(self, keys: Iterable[str]) -> dict[str, Result]:
        """What there is of these."""
        found = await self._bucket.get_many(list(keys))
        return {key: Result.decode(stored.headers, stored.body) for key, stored in found.items()}

    async def answer(self, key: str) -> Result | None:
        """What an input came to: its result, or that all of its call was cancelled before it had one."""
        return (await self.answers([key])).get(key)

    async def answers(self, keys: Collection[str]) -> dict[str, Result]:
        """What these came to, as far as they have ended."""
        calls = {key.partition(".")[0] for key in keys}
        found = await self._bucket.get_many([*keys, *map(end_key, calls)])
        firsts = {key: _first(found.get(key), found.get(end_key(key.partition(".")[0]))) for key in keys}
        return {key: Result.decode(stored.headers, stored.body) for key, stored in firsts.items() if stored}

    async def end(self, call: str) -> tuple[int, Result] | None:
        """How a call of several inputs was cancelled as a whole, with its sequence; `None` if it was not."""
        found = await self._bucket.get(end_key(call))
        return None if found is None else (found.sequence, Result.decode(found.headers, found.body))

    async def newest(self, count: int, before: int | None = None) -> list[tuple[str, Stored]]:
        """The results stored last, newest first, with their keys; `before` a sequence, to go on from there."""
        found = await self._connection.get_newest(self._bucket.stream, count, before)
        return [(self._bucket.key(stored), stored) for stored in found]

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def expect(self, key: str) -> Waiter:
        """Begin to listen for a result: submit the call, or read its result, after this."""
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        waiter = Waiter(self, key, self._subjects_for(key), future)
        self._waiting.setdefault(key, []).append(waiter)
        entries = [(subject, self._subjects.setdefault(subject, _Subject())) for subject in waiter.subjects]
        for _, entry in entries:
            entry.waiters += 1
        try:
            for subject, entry in entries:
                if entry.subscription is None:
                    await self._listen(subject, entry)
        except BaseException:
            self.release(waiter)
            raise
        if not self._ticking:
            self._ticking = True
            self._background.spawn(self._tick())
        return waiter

    def release(self, waiter: Waiter) -> None:
        """Nobody waits here any more."""
        waiters = self._waiting[waiter.key]
        waiters.remove(waiter)
        if not waiters:
            del self._waiting[waiter.key]
        for subject in waiter.subjects:
            entry = self._subjects[subject]
            entry.waiters -= 1
            if not entry.waiters:
                asyncio.get_running_loop().call_later(_LINGER, self._drop, subject, entry)

    def _subjects_for(self, key: str) -> tuple[str, ...]:
        call, _, index = key.partition(".")
        if token_of(call) == self._token:
            return (self._own,)
        return self._topology.done_subject(call, index), self._topology.done_subject(call, END)

    async def _listen(self, subject: str, entry: _Subject) -> None:
        async with entry.lock:
            if entry.subscription is None:
                entry.subscription = await self._connection.listen(subject, self._on_done)

    def _drop(self, subject: str, entry: _Subject) -> None:
        if not entry.waiters and self._subjects.get(subject) is entry and entry.subscription is not None:
            del self._subjects[subject]
            if not self._connection.is_closed:
                self._background.spawn(entry.subscription.unsubscribe())

    def _on_done(self, message: Incoming) -> None:
        _, head, token, index = message.subject.rsplit(".", 3)
        call = head + token
        if index == END:  # which all of the call have that have no other result
            for key in [key for key in self._waiting if key.startswith(f"{call}.")]:
                self._resolve(key, message.headers, message.data)
        elif (key := f"{call}.{index}") in self._waiting:  # else its headers are not even parsed
            self._resolve(key, message.headers, message.data)

    def _resolve(self, key: str, headers: Mapping[str, str], body: bytes) -> None:
        waiting = [waiter.future for waiter in self._waiting.get(key, ()) if not waiter.future.done()]
        try:
            result = Result.decode(headers, body)
        except Error as error:
            for future in waiting:
                future.set_exception(error)
        else:
            for future in waiting:
                future.set_result(result)

    async def _tick(self) -> None:
        """The waiters' clock: wakes those whose time has come, and reads for all of them now and then."""
        loop = asyncio.get_running_loop()
        reread_at = loop.time() + REREAD
        while self._waiting:
            await asyncio.sleep(_TICK)
            now = loop.time()
            for waiter in [w for waiters in self._waiting.values() for w in waiters if w.look_at <= now]:
                if not waiter.future.done():
                    waiter.wake()
            if now >= reread_at:
                await self._reread()
                reread_at = now + REREAD * random.uniform(0.8, 1.2)
        self._ticking = False

    async def _reread(self) -> None:
        """Read what is waited for, in case a push was missed."""
        keys = [key for key, waiters in self._waiting.items() if not all(w.future.done() for w in waiters)]
        try:
            for key, result in (await self.answers(keys)).items():
                for waiter in self._waiting.get(key, ()):
                    if not waiter.future.done():
                        waiter.future.set_result(result)
        except (Unanswered, NoResponders, StoreError):
            pass  # the server is away; the reconnect brings us here again


def _first(own: Stored | None, end: Stored | None) -> Stored | None:
    """What an input came to, of its own result and of the end of its call: what was stored first."""
    if own is None or end is None:
        return own or end
    return min(own, end, key=lambda stored: stored.sequence)
