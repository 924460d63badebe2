"""Settling: what an execution came to becomes a stored result, or another try. The one place where a call ends.

Deciding is pure (`judge`); acting is `Settler.settle`, one match over the verdict. The order is what the promises hang
on: the result is stored before the input is acknowledged, a dead letter before that too, and a failed try is recorded
before it is handed back. Where the store is full or away, the lease is kept and the same thing tried again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from mesh.broker import Broker, Headers, Lease, NoResponders, Stored, StoreError, Unanswered
from mesh.exception import (
    FunctionTimeoutError,
    InternalFailure,
    PermissionDeniedError,
    RemoteError,
    TimeoutError,
)
from mesh.protocol import Address, Failure, Format, Result, State, failure, format_time
from mesh.records import Attempt, AttemptLog, Ending
from mesh.spec import FunctionSpec

logger = logging.getLogger("mesh.worker")

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between tries to reach the store
_VALUELESS_TTL = 3600.0  # seconds a success is kept whose value nobody wants


class Kind(StrEnum):
    """What an execution came to."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"  # the user's code raised
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline had passed before it was started
    REFUSED = "refused"  # it cannot be run, now or later
    CRASHED = "crashed"  # the container was lost
    RETURNED = "returned"  # unfinished, through no fault of its own
    NOT_STARTED = "not_started"  # no container for it could be started


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How one delivery of an input went.

    Attributes:
        format, body: the value, where it succeeded. failure: what was raised, or why it was refused.
        text: of what happened, for everything else. started: in seconds since 1970.
        delay: seconds until another try, where the worker decides that and not the function's `Retries`.
    """

    kind: Kind
    format: Format = Format.JSON
    body: bytes = b""
    failure: Failure | None = None
    text: str = ""
    started: float = 0.0
    delay: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the result says of who ran it."""

    app: str
    function: str
    code: str
    worker: str
    spec: FunctionSpec
    crash_budget: int


@dataclass(slots=True, eq=False)
class Held:
    """An input a worker holds: its lease, and what is known of earlier deliveries.

    Attributes:
        since: monotonic time at which it came. marked: that it begins is written down, where that is needed.
        about: by which version it is run, and under which options; set when it is given to a container.
    """

    lease: Lease
    log: AttemptLog = field(default_factory=AttemptLog)
    since: float = field(default_factory=time.monotonic)
    marked: bool = False
    about: About | None = None

    @property
    def key(self) -> str:
        assert self.lease.address is not None
        return self.lease.address.key


@dataclass(frozen=True, slots=True)
class Final:
    """The input ends with this result; `bury`: what failed for good keeps its arguments as a dead letter."""

    result: Result
    bury: bool


@dataclass(frozen=True, slots=True)
class Again:
    """The input is tried again after `delay` seconds."""

    attempt: Attempt
    delay: float


def judge(execution: Execution, held: Held, about: About) -> Final | Again:
    """What becomes of an input whose execution went so."""
    match execution.kind:
        case Kind.SUCCEEDED:
            return Final(_result(State.SUCCEEDED, execution, held, about), bury=False)
        case Kind.FAILED:
            return _retry_or(State.FAILED, _of(execution), execution, held, about)
        case Kind.TIMED_OUT:
            text = f"function {about.function!r} ran longer than its timeout of {about.spec.timeout:g} s"
            return _retry_or(State.TIMED_OUT, failure(FunctionTimeoutError, text), execution, held, about)
        case Kind.CRASHED:
            return _crashed(execution, held, about)
        case Kind.CANCELLED:
            return _final(State.CANCELLED, failure(RemoteError, execution.text), execution, held, about)
        case Kind.EXPIRED:
            return _final(State.EXPIRED, failure(TimeoutError, execution.text), execution, held, about)
        case Kind.REFUSED:
            return _final(State.FAILED, _of(execution), execution, held, about)
        case Kind.RETURNED:
            return Again(_attempt(Ending.RETURNED, execution.text, about), execution.delay)
        case Kind.NOT_STARTED:
            return Again(_attempt(Ending.NOT_STARTED, execution.text, about), execution.delay)


def _of(execution: Execution) -> Failure:
    return execution.failure or failure(InternalFailure, execution.text)


def _retry_or(state: State, failed: Failure, execution: Execution, held: Held, about: About) -> Final | Again:
    """Another try, if the function's retries allow one after those it had."""
    retries = about.spec.retries
    tries = held.log.tries + 1
    if retries is None or tries > retries.max_retries or not retries.covers(failed.bases or (failed.type,)):
        return _final(state, failed, execution, held, about)
    ending = Ending.TIMED_OUT if state is State.TIMED_OUT else Ending.FAILED
    return Again(_attempt(ending, failed.summary, about), retries.delay(tries))


def _crashed(execution: Execution, held: Held, about: About) -> Final | Again:
    """Crashes have a budget of their own, so that an input that kills whatever runs it comes to an end."""
    crashes = [*held.log.crashes(held.lease.delivery)]
    if execution.text:
        crashes.append(f"{execution.text} on {about.worker}")
    if len(crashes) < about.crash_budget:
        return Again(_attempt(Ending.CRASHED, crashes[-1], about), 0.0)
    text = f"function {about.function!r} crashed {len(crashes)} times: {'; '.join(crashes)}"
    return _final(State.FAILED, failure(InternalFailure, text), execution, held, about)


def _attempt(ending: Ending, error: str, about: About) -> Attempt:
    return Attempt(ending=ending, worker=about.worker, at=time.time(), error=error)


def _final(state: State, failed: Failure, execution: Execution, held: Held, about: About) -> Final:
    result = Result.of_failure(
        state,
        failed,
        app=about.app,
        function=about.function,
        code=about.code,
        worker=about.worker,
        attempt=held.log.tries + 1,
        started=execution.started,
    )
    return Final(result, bury=state in (State.FAILED, State.TIMED_OUT))


def _result(state: State, execution: Execution, held: Held, about: About) -> Result:
    return Result(
        state=state,
        body=execution.body,
        format=execution.format,
        app=about.app,
        function=about.function,
        code=about.code,
        worker=about.worker,
        attempt=held.log.tries + 1,
        started=execution.started,
    )


async def end_without_lease(broker: Broker, stored: Stored, address: Address, result: Result) -> None:
    """End an input that no worker holds: its result first, then out of the queue, by its own sequence."""
    created = await broker.results.create(address.key, result)
    if created and result.state in (State.FAILED, State.TIMED_OUT):
        await broker.bury(broker.topology.dead_subject(address), stored.headers, stored.body, _death(result))
    await broker.calls.delete(stored.sequence)


async def quarantine_stored(broker: Broker, stored: Stored, reason: str) -> None:
    """Put aside a message that is no call, and that no worker holds."""
    subject = broker.topology.quarantine_subject(stored.subject)
    await broker.bury(subject, stored.headers, stored.body, _death_of(State.FAILED, reason))
    await broker.calls.delete(stored.sequence)


def _death(result: Result) -> Headers:
    return _death_of(result.state, result.headers().get("Mesh-Error", ""))


def _death_of(state: State, error: str) -> Headers:
    """What a dead letter says beside the original's own headers."""
    return {"Mesh-State": state.value, "Mesh-Error": error, "Mesh-Died": format_time(time.time())}


class Settler:
    """Turns verdicts into what the store holds."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._giving_up = asyncio.Event()
        self.troubled = False

    def give_up(self) -> None:
        """Stop trying where the store does not answer: the leases lapse, and others take over."""
        self._giving_up.set()

    async def settle(self, held: Held, execution: Execution, about: About) -> Final | Again:
        """Bring an input to where its execution leads."""
        verdict = judge(execution, held, about)
        match verdict:
            case Final(result, bury):
                await self._store(held, result, bury)
                await held.lease.ack()
            case Again(attempt, delay):
                await self.insist(lambda: self._broker.attempts.add(held.key, held.lease.delivery, attempt))
                await held.lease.nak(delay)
        return verdict

    async def _store(self, held: Held, result: Result, bury: bool) -> None:
        input = held.lease.input
        ttl = input.result_ttl if input else None
        if input and result.state is State.SUCCEEDED and not input.keep_result:
            ttl = min(ttl or _VALUELESS_TTL, _VALUELESS_TTL)
        created = await self.insist(lambda: self._broker.results.create(held.key, result, ttl))
        if created and bury:
            await self._bury(held.lease, result)
        elif not created:
            other = await self.insist(lambda: self._broker.results.get(held.key))
            if other is not None:
                await self._bury_failure(held.lease, other)

    async def finish_other(self, lease: Lease, stored: Result) -> None:
        """The input has a result already: see that nothing is missing beside it, and acknowledge it."""
        await self._bury_failure(lease, stored)
        await lease.ack()

    async def _bury_failure(self, lease: Lease, stored: Result) -> None:
        """Whoever stored a failure may have died before the dead letter, so whoever finds one makes sure of that."""
        if stored.state in (State.FAILED, State.TIMED_OUT):
            await self._bury(lease, stored)

    async def _bury(self, lease: Lease, result: Result) -> None:
        assert lease.address is not None
        subject = self._broker.topology.dead_subject(lease.address)
        await self.insist(lambda: self._broker.bury(subject, lease.headers, lease.body, _death(result)))

    async def quarantine(self, lease: Lease) -> None:
        """Put aside a message that is no call, with the reason; nobody waits for it."""
        subject = self._broker.topology.quarantine_subject(lease.subject)
        reason = _death_of(State.FAILED, str(lease.refusal))
        await self.insist(lambda: self._broker.bury(subject, lease.headers, lease.body, reason))
        await lease.ack()

    async def mark_begun(self, held: Held, worker: str) -> None:
        """Write down that a redelivered input begins, so that it is known who was lost if nothing follows."""
        begun = Attempt(ending=Ending.BEGAN, worker=worker, at=time.time())
        held.log = await self.insist(lambda: self._broker.attempts.add(held.key, held.lease.delivery, begun))

    async def adopt(self, held: Held, lease: Lease, worker: str) -> None:
        """The input was delivered again to the worker that has it: go on under the new lease."""
        earlier, held.lease = held.lease.delivery, lease
        await lease.renew()
        # Written of the earlier delivery: the new one is still to end, as a try perhaps, and would stay what it is.
        for delivery, ending in ((earlier, Ending.ADOPTED), (lease.delivery, Ending.BEGAN)):
            attempt = Attempt(ending=ending, worker=worker, at=time.time())
            await self.insist(functools.partial(self._broker.attempts.add, held.key, delivery, attempt))

    async def read_log(self, lease: Lease) -> AttemptLog:
        """What is known of earlier deliveries."""
        assert lease.address is not None
        key = lease.address.key
        return await self.insist(lambda: self._broker.attempts.get(key))

    async def insist(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do it, again and again while the store is full or away. Leases are renewed elsewhere meanwhile."""
        pause = _FIRST_PAUSE
        while True:
            try:
                done = await action()
            except (Unanswered, NoResponders, StoreError, PermissionDeniedError) as error:
                if not self.troubled:
                    logger.warning("the store takes nothing, trying again until it does: %s", error)
                self.troubled = True
                if self._giving_up.is_set():
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if self.troubled:
                    logger.info("the store is back")
                self.troubled = False
                return done
