"""Settling: what an execution came to becomes a stored result, or another try. The one place where a call ends.

Deciding is pure (`judge`); acting is `Settler.settle`, one match over the verdict. The order is what the promises hang
on: the result is stored before the input is acknowledged, a dead letter before that too, and a failed try is recorded
before it is handed back. Where the store is full or away, the lease is kept and the same thing tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from mesh.broker import Broker, Headers, Lease, NoResponders, Stored, StoreError, Unanswered
from mesh.exception import PermissionDeniedError
from mesh.judge import About, Again, Execution, Final, cancelled, judge
from mesh.payload import Blob, InFile
from mesh.protocol import SHARED_POOL, Address, Result, State, format_time
from mesh.records import Attempt, AttemptLog, Ending

logger = logging.getLogger("mesh.worker")

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between tries to reach the store
_SETTLING = 2_000  # inputs being settled at once
_VALUELESS_TTL = 3600.0  # seconds a success is kept whose value nobody wants


@dataclass(slots=True, eq=False)
class Held:
    """An input a worker holds: its lease, and what is known of earlier deliveries.

    Attributes:
        number: of this delivery among those that are written down; see `AttemptLog.number`.
        since: monotonic time at which it came. marked: that it begins is written down, where that is needed.
        about: by which version it is run, and under which options; set when it is given to a container.
        cancelled: why it was cancelled, if it was; then there is no other try.
        away: its arguments are large, and not on this machine yet. arguments: the file that holds them, once they are.
        fetching: what brings them.
    """

    lease: Lease
    log: AttemptLog = field(default_factory=AttemptLog)
    number: int = 1
    since: float = field(default_factory=time.monotonic)
    marked: bool = False
    about: About | None = None
    cancelled: str = ""
    away: bool = False
    arguments: Path | None = None
    fetching: asyncio.Task[None] | None = None

    @property
    def generates(self) -> bool:
        """Whether it yields to its caller: that it begins is always written down, since it must never begin twice."""
        return self.lease.input is not None and self.lease.input.generates

    @property
    def key(self) -> str:
        assert self.lease.address is not None
        return self.lease.address.key

    @property
    def call(self) -> str:
        assert self.lease.address is not None
        return self.lease.address.call


async def end_without_lease(broker: Broker, stored: Stored, address: Address, result: Result) -> None:
    """End an input that no worker holds: its result first, then out of the queue, by its own sequence."""
    if await broker.results.create(address.key, result):
        await clear_ended(broker, stored, address, result)
    else:  # somebody else ended it, with another result
        await broker.calls.delete(stored.sequence)


async def clear_ended(broker: Broker, stored: Stored, address: Address, result: Result) -> None:
    """Take an input out of the queue that has ended, and that nobody delivers any more."""
    if _is_buried(result):  # whoever ended it may have died before its dead letter
        death = _death(result, address)
        await broker.dead.bury(broker.topology.dead_subject(address), stored.headers, stored.body, death)
    await broker.calls.delete(stored.sequence)
    if not _is_buried(result) and "Mesh-Blob" in stored.headers:
        await broker.blobs.delete(stored.headers["Mesh-Blob"].partition(" ")[0])


async def quarantine_stored(broker: Broker, stored: Stored, reason: str) -> None:
    """Put aside a message that is no call, and that no worker holds."""
    subject = broker.topology.quarantine_subject(stored.subject)
    await broker.dead.bury(subject, stored.headers, stored.body, _death_of(State.FAILED, reason))
    await broker.calls.delete(stored.sequence)


def _is_buried(result: Result) -> bool:
    """Whether the input of a result has a dead letter, which keeps its arguments."""
    return result.state in (State.FAILED, State.TIMED_OUT)


def _death(result: Result, address: Address) -> Headers:
    death = _death_of(result.state, result.headers().get("Mesh-Error", ""))
    return death if address.pool == SHARED_POOL else {**death, "Mesh-Pool": address.pool}


def _death_of(state: State, error: str) -> Headers:
    """What a dead letter says beside the original's own headers."""
    return {"Mesh-State": state.value, "Mesh-Error": error, "Mesh-Died": format_time(time.time())}


class Settler:
    """Turns verdicts into what the store holds.

    Attributes:
        trouble: what the store said when it last took nothing; empty while it takes everything.
        on_trouble: called with each error of a store that is full or away. on_back: called when it takes everything
            again, or is no longer busy.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._giving_up = asyncio.Event()
        self._settling = 0
        self._refused = 0  # actions that were refused, and are tried again and again
        self.trouble = ""
        self.on_trouble: Callable[[Exception], None] = lambda error: None
        self.on_back: Callable[[], None] = lambda: None

    @property
    def is_busy(self) -> bool:
        """Whether so much is being settled that nothing more is to begin: the store is slower than what runs here."""
        return self._settling >= _SETTLING

    def give_up(self) -> None:
        """Stop trying where the store does not answer: the leases lapse, and others take over."""
        self._giving_up.set()

    async def settle(self, held: Held, execution: Execution, about: About) -> Final | Again:
        """Bring an input to where its execution leads."""
        with self._one_more():
            return await self._settle(held, execution, about)

    async def drop(self, held: Held) -> None:
        """Acknowledge an input that has ended as all inputs of its call have."""
        with self._one_more():
            await self.insist(lambda: self._broker.acks.send(held.lease))

    @contextlib.contextmanager
    def _one_more(self) -> Generator[None]:
        self._settling += 1
        try:
            yield
        finally:
            was_busy, self._settling = self.is_busy, self._settling - 1
            if was_busy and not self.is_busy:
                self.on_back()

    async def _settle(self, held: Held, execution: Execution, about: About) -> Final | Again:
        verdict = judge(execution, held.log, held.number, about)
        if held.cancelled and isinstance(verdict, Again):  # while its last try came to an end
            verdict = judge(cancelled(held.cancelled), held.log, held.number, about)
        match verdict:
            case Final(result, bury, file):
                if file is not None:
                    result = replace(result, blob=await self._put_aside(held, file))
                await self._end(held.lease, await self._store(held, result, bury))
            case Again(attempt, delay):
                await self.insist(lambda: self._broker.attempts.add(held.key, held.number, attempt))
                await held.lease.nak(delay)
        return verdict

    async def _put_aside(self, held: Held, file: Path) -> Blob:
        """Store what is too large for the result, before the result that names it."""
        return await self.insist(lambda: self._broker.blobs.put(held.key, "out", InFile(file)))

    async def _store(self, held: Held, result: Result, bury: bool) -> Result | None:
        """Store the result, if there is none. Returns the one that is stored."""
        input = held.lease.input
        ttl = input.result_ttl if input else None
        if input and result.state is State.SUCCEEDED and not input.keep_result:
            ttl = min(ttl or _VALUELESS_TTL, _VALUELESS_TTL)
        created = await self.insist(lambda: self._broker.results.create(held.key, result, ttl))
        if created:
            if bury:
                await self._bury(held.lease, result)
            return result
        other = await self.insist(lambda: self._broker.results.get(held.key))
        if other is not None:
            await self._bury_failure(held.lease, other)
        if result.blob is not None and (other is None or other.blob != result.blob):
            await self._broker.blobs.delete(result.blob.name)
        return other

    async def finish_other(self, lease: Lease, stored: Result) -> None:
        """The input has a result already: see that nothing is missing beside it, and acknowledge it."""
        await self._bury_failure(lease, stored)
        await self._end(lease, stored)

    async def _end(self, lease: Lease, stored: Result | None) -> None:
        """Acknowledge an input that has its result. Its large arguments go, unless a dead letter names them; where it
        is not known what is stored, they are left to the sweep."""
        await self._broker.acks.send(lease)
        blob = lease.input.blob if lease.input is not None else None
        if blob is not None and stored is not None and not _is_buried(stored):
            await self._broker.blobs.delete(blob.name)

    async def _bury_failure(self, lease: Lease, stored: Result) -> None:
        """Whoever stored a failure may have died before the dead letter, so whoever finds one makes sure of that."""
        if _is_buried(stored):
            await self._bury(lease, stored)

    async def _bury(self, lease: Lease, result: Result) -> None:
        assert lease.address is not None
        subject = self._broker.topology.dead_subject(lease.address)
        death = _death(result, lease.address)
        await self.insist(lambda: self._broker.dead.bury(subject, lease.headers, lease.body, death))

    async def quarantine(self, lease: Lease) -> None:
        """Put aside a message that is no call, with the reason; nobody waits for it."""
        subject = self._broker.topology.quarantine_subject(lease.subject)
        reason = _death_of(State.FAILED, str(lease.refusal))
        await self.insist(lambda: self._broker.dead.bury(subject, lease.headers, lease.body, reason))
        await self._broker.acks.send(lease)

    async def mark_begun(self, held: Held, worker: str) -> None:
        """Write down that an input begins, so that it is known who was lost if nothing follows."""
        begun = Attempt(ending=Ending.BEGAN, worker=worker, at=time.time())
        held.log = await self.insist(lambda: self._broker.attempts.add(held.key, held.number, begun))

    async def adopt(self, held: Held, lease: Lease, worker: str) -> None:
        """The input was delivered again to the worker that has it: go on under the new lease."""
        earlier, held.lease = held.number, lease
        held.number = max(earlier + 1, lease.delivery)
        await lease.renew()
        # Written of the earlier delivery: the new one is still to end, as a try perhaps, and would stay what it is.
        for delivery, ending in ((earlier, Ending.ADOPTED), (held.number, Ending.BEGAN)):
            attempt = Attempt(ending=ending, worker=worker, at=time.time())
            await self.insist(functools.partial(self._broker.attempts.add, held.key, delivery, attempt))

    async def recall(self, inputs: Collection[Held]) -> None:
        """Read what is known of earlier deliveries of these."""
        logs = await self.insist(lambda: self._broker.attempts.get_many([held.key for held in inputs]))
        for held in inputs:
            held.log = logs.get(held.key) or AttemptLog()
            held.number = held.log.number(held.lease.delivery)
            held.marked = held.number == 1 and not held.generates  # the first delivery leaves no mark

    async def insist(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do it, again and again while the store is full or away. Leases are renewed elsewhere meanwhile."""
        pause, refusals = _FIRST_PAUSE, 0
        try:
            while True:
                try:
                    return await action()
                except (Unanswered, NoResponders, StoreError, PermissionDeniedError) as error:
                    if self._giving_up.is_set():
                        raise
                    refusals += 1
                    self._on_refused(error, first=refusals == 1)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            if refusals:
                self._on_taken()

    def _on_refused(self, error: Exception, *, first: bool) -> None:
        text = f"nothing takes {error}" if isinstance(error, NoResponders) else str(error)
        if not self.trouble:
            logger.warning("the store takes nothing, trying again until it does, and nothing new is begun: %s", text)
        self.trouble = text
        self._refused += first
        self.on_trouble(error)

    def _on_taken(self) -> None:
        self._refused -= 1
        if not self._refused and not self._giving_up.is_set():
            logger.info("the store takes everything again")
            self.trouble = ""
            self.on_back()
