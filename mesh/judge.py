"""Deciding what becomes of an input, from how its execution went. Pure: no clock but the record's own, no I/O.

`settle` does what is decided here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mesh.exception import FunctionTimeoutError, InternalFailure, OutOfMemoryError, RemoteError, TimeoutError
from mesh.protocol import Failure, Format, Result, State, failure
from mesh.records import Attempt, AttemptLog, Ending
from mesh.spec import FunctionSpec


class Kind(StrEnum):
    """What an execution came to."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"  # the user's code raised
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline had passed before it was started
    REFUSED = "refused"  # it cannot be run, now or later
    CRASHED = "crashed"  # the container was lost
    OUT_OF_MEMORY = "out_of_memory"  # the container was lost because it used too much memory
    RETURNED = "returned"  # unfinished, through no fault of its own
    NOT_STARTED = "not_started"  # no container for it could be started


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How one delivery of an input went.

    Attributes:
        format, body: the value, where it succeeded. failure: what was raised, or why it was refused.
        file: that holds what is too large for a message: the value instead of `body`, or the pickle of the failure.
        text: of what happened, for everything else. started: in seconds since 1970.
        delay: seconds until another try, where the worker decides that and not the function's `Retries`.
    """

    kind: Kind
    format: Format = Format.JSON
    body: bytes = b""
    failure: Failure | None = None
    file: Path | None = None
    text: str = ""
    started: float = 0.0
    delay: float = 0.0


def cancelled(reason: str, started: float = 0.0) -> Execution:
    """The end of an input that somebody cancelled."""
    return Execution(kind=Kind.CANCELLED, text=f"cancelled: {reason}", started=started)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the result says of who ran it."""

    app: str
    function: str
    code: str
    worker: str
    spec: FunctionSpec
    crash_budget: int


@dataclass(frozen=True, slots=True)
class Final:
    """The input ends with this result; `bury`: what failed for good keeps its arguments as a dead letter.

    `file` holds what is to be stored beside the result.
    """

    result: Result
    bury: bool
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Again:
    """The input is tried again after `delay` seconds."""

    attempt: Attempt
    delay: float


def judge(execution: Execution, log: AttemptLog, delivery: int, about: About) -> Final | Again:
    """What becomes of an input whose execution went so."""
    match execution.kind:
        case Kind.SUCCEEDED:
            return Final(_result(State.SUCCEEDED, execution, log, delivery, about), bury=False, file=execution.file)
        case Kind.FAILED:
            return _retry_or(State.FAILED, _of(execution), execution, log, delivery, about)
        case Kind.TIMED_OUT:
            text = f"function {about.function!r} ran longer than its timeout of {about.spec.timeout:g} s"
            return _retry_or(State.TIMED_OUT, failure(FunctionTimeoutError, text), execution, log, delivery, about)
        case Kind.CRASHED | Kind.OUT_OF_MEMORY:
            return _crashed(execution, log, delivery, about)
        case Kind.CANCELLED:
            return _final(State.CANCELLED, failure(RemoteError, execution.text), execution, log, delivery, about)
        case Kind.EXPIRED:
            return _final(State.EXPIRED, failure(TimeoutError, execution.text), execution, log, delivery, about)
        case Kind.REFUSED:
            return _final(State.FAILED, _of(execution), execution, log, delivery, about)
        case Kind.RETURNED:
            return Again(_attempt(Ending.RETURNED, execution.text, about), execution.delay)
        case Kind.NOT_STARTED:
            return Again(_attempt(Ending.NOT_STARTED, execution.text, about), execution.delay)


def _of(execution: Execution) -> Failure:
    return execution.failure or failure(InternalFailure, execution.text)


def _retry_or(
    state: State, failed: Failure, execution: Execution, log: AttemptLog, delivery: int, about: About
) -> Final | Again:
    """Another try, if the function's retries allow one after those it had."""
    retries = about.spec.retries
    tries = log.tries + 1
    if retries is None or tries > retries.max_retries or not retries.covers(failed.bases or (failed.type,)):
        return _final(state, failed, execution, log, delivery, about)
    ending = Ending.TIMED_OUT if state is State.TIMED_OUT else Ending.FAILED
    return Again(_attempt(ending, failed.summary, about), retries.delay(tries))


def _crashed(execution: Execution, log: AttemptLog, delivery: int, about: About) -> Final | Again:
    """Crashes have a budget of their own, so that an input that kills whatever runs it comes to an end.

    The last of them names the error: whoever is told «out of memory» shall find that more memory helps.
    """
    crashes = log.crashes(delivery)
    if execution.text:
        crashes.append(_attempt(Ending(execution.kind), f"{execution.text} on {about.worker}", about))
    if crashes and len(crashes) < about.crash_budget:
        return Again(crashes[-1], 0.0)
    kind = OutOfMemoryError if crashes and crashes[-1].ending is Ending.OUT_OF_MEMORY else InternalFailure
    times = "once" if len(crashes) == 1 else f"{len(crashes)} times"
    text = f"function {about.function!r} crashed {times}: {'; '.join(crash.error for crash in crashes)}"
    return _final(State.FAILED, failure(kind, text), execution, log, delivery, about)


def _attempt(ending: Ending, error: str, about: About) -> Attempt:
    return Attempt(ending=ending, worker=about.worker, at=time.time(), error=error)


def _final(state: State, failed: Failure, execution: Execution, log: AttemptLog, delivery: int, about: About) -> Final:
    result = Result.of_failure(
        state,
        failed,
        app=about.app,
        function=about.function,
        code=about.code,
        worker=about.worker,
        attempt=log.tries + 1,
        started=execution.started,
    )
    return Final(result, state in (State.FAILED, State.TIMED_OUT), execution.file)


def _result(state: State, execution: Execution, log: AttemptLog, delivery: int, about: About) -> Result:
    return Result(
        state=state,
        body=execution.body,
        format=execution.format,
        app=about.app,
        function=about.function,
        code=about.code,
        worker=about.worker,
        attempt=log.tries + 1,
        started=execution.started,
    )
