"""What has become of calls: of one, and of the newest many. Read from what the mesh stores, for SDK and CLI alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mesh.protocol import PREVIEW_LIMIT, SEVERAL, Address, Format, Result, State, call_time, class_of
from mesh.records import AttemptLog, CallRecord, WorkerRecord

if TYPE_CHECKING:
    from mesh.broker import Broker, Stored

_PAGE = 1024  # messages read at once where all are wanted
_SCANNED = 20_000  # messages a filtered listing looks at before it says that it was cut
_LOOKED_INTO = 200  # calls of several inputs it looks into


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStatus:
    """What is known of a call.

    Attributes:
        state: queued, running, retrying, succeeded, failed, timed_out, cancelled or expired.
        app, function: what was called. attempts: tries made so far, the running one included.
        created, started, finished: seconds since 1970; `None` where it has not happened, or is not known.
        worker: where it runs or ran. last_error: what went wrong most recently, as `Type: text`.
        waiting_for: why a queued call does not start, where that is known.
        preview: its arguments, as far as they are short and JSON, while it has not ended.
        index: which input this is about: of a call of several, the first that has not ended speaks for all.
        inputs, outstanding: how many the call has, and how many of them have not ended.
        failed: how many failed or ran out of time, as far as their dead letters are kept. cancelled: how many were.
        submitting: whether inputs are still being added.
    """

    call: str
    state: State
    app: str
    function: str
    attempts: int
    created: float
    started: float | None = None
    finished: float | None = None
    worker: str = ""
    last_error: str = ""
    waiting_for: str = ""
    preview: str = ""
    index: int = 0
    inputs: int = 1
    outstanding: int = 0
    failed: int = 0
    cancelled: int = 0
    submitting: bool = False

    @property
    def done(self) -> int:
        """How many inputs have ended well."""
        return self.inputs - self.outstanding - self.failed - self.cancelled


async def find_call(broker: Broker, call: str) -> CallStatus | None:
    """The status of a call, whatever number of inputs it has; `None` if the mesh does not know it."""
    record = await broker.several.find(call)
    if record is None:
        return await find_status(broker, call)
    return await _of_several(broker, record, await broker.workers.all())


async def _of_several(broker: Broker, record: CallRecord, workers: list[WorkerRecord]) -> CallStatus:
    """A call of several inputs: what its first that has not ended is at, and how many there are of each kind."""
    several = broker.several
    first, queued, ended, failed, end = await asyncio.gather(
        several.first_queued(record),
        several.queued(record),
        several.ended(record.call),
        several.died(record),
        broker.results.end(record.call),
    )
    inputs = await several.inputs_of(record)
    counted: dict[str, Any] = {
        "inputs": inputs,
        # What has just ended is still in the queue; what ended long ago may have no result any more.
        "outstanding": 0 if end else max(0, min(queued, inputs - ended)),
        "failed": failed,
        "cancelled": inputs - min(inputs, await several.ended(record.call, end[0])) if end else 0,
        "submitting": end is None and await several.is_being_submitted(record),
    }
    if counted["outstanding"] and first is not None and (address := broker.calls.address(first)) is not None:
        status = _unfinished(broker, record.call, first, workers, await broker.attempts.get(address.key))
        waiting_for = "" if status.worker else why(workers, address)
        return replace(status, waiting_for=waiting_for, **counted)
    return CallStatus(
        call=record.call,
        state=_ended_state(end is not None, failed, submitting=counted["submitting"]),
        app=record.app,
        function=record.function,
        attempts=0,
        created=call_time(record.call),
        finished=end[1].finished if end else None,
        last_error=end[1].error if end else "",
        **counted,
    )


def _ended_state(cancelled: bool, failed: int, *, submitting: bool) -> State:
    if cancelled:
        return State.CANCELLED
    if submitting:
        return State.QUEUED
    return State.FAILED if failed else State.SUCCEEDED


async def find_status(broker: Broker, call: str, index: int = 0, *, at: Address | None = None) -> CallStatus | None:
    """The status of one input; `None` if the mesh does not know it. Results first: they are final."""
    key = f"{call}.{index}"
    result = await broker.results.answer(key)
    if result is None:
        queued = await broker.calls.find(call, index, at=at)
        if queued is not None:
            workers = await broker.workers.all()
            status = _unfinished(broker, call, queued, workers, await broker.attempts.get(key))
            return status if status.worker else replace(status, waiting_for=why(workers, broker.calls.address(queued)))
        result = await broker.results.answer(key)
    return None if result is None else _finished(call, index, result)


def _finished(call: str, index: int, result: Result) -> CallStatus:
    return CallStatus(
        call=call,
        index=index,
        state=result.state,
        app=result.app,
        function=result.function,
        attempts=result.attempt,
        created=call_time(call),
        failed=int(result.state in (State.FAILED, State.TIMED_OUT, State.EXPIRED)),
        cancelled=int(result.state is State.CANCELLED),
        started=result.started or None,
        finished=result.finished or None,
        worker=result.worker,
        last_error=result.error,
    )


def _unfinished(
    broker: Broker, call: str, queued: Stored, workers: list[WorkerRecord], log: AttemptLog | None
) -> CallStatus:
    address = broker.calls.address(queued)
    key = address.key if address else ""
    tries = log.tries if log else 0
    worker = next((w.worker for w in workers if key in w.running), "")
    return CallStatus(
        call=call,
        index=address.index if address else 0,
        state=State.RUNNING if worker else State.RETRYING if tries else State.QUEUED,
        app=address.app if address else "",
        function=address.function if address else "",
        attempts=tries + bool(worker),
        created=call_time(call),
        outstanding=1,
        worker=worker,
        last_error=log.last_error if log else "",
        preview=queued.headers.get("Mesh-Preview", "") or _short_arguments(queued),
    )


def _short_arguments(queued: Stored) -> str:
    if queued.headers.get("Mesh-Format", Format.JSON) != Format.JSON or len(queued.body) > PREVIEW_LIMIT:
        return ""
    return queued.body.decode("utf-8", "replace")


async def why_waiting(broker: Broker, address: Address | None) -> str:
    """Why nobody runs a queued call, if that can be told; empty if somebody could."""
    return why(await broker.workers.recent(), address, broker.topology.environment)


def why(workers: list[WorkerRecord], address: Address | None, environment: str = "") -> str:
    """The same, from the workers that are alive."""
    return why_nowhere(workers, str(address.pool_key) if address else "", environment)


def why_nowhere(workers: list[WorkerRecord], pool: str, environment: str = "") -> str:
    """Why no worker runs what a pool has, if that can be told."""
    takers = [worker for worker in workers if not worker.draining]
    if not takers:
        where = f" in environment {environment!r}" if environment else ""
        return f"no worker is running{where}; start one with `mesh worker` (or `mesh up`)"
    reasons = [worker.trouble or worker.unfit.get(pool, "") for worker in takers]
    return "; ".join(dict.fromkeys(reasons)) if all(reasons) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which calls, or dead letters, are meant; what is empty matches all.

    Attributes:
        error: part of the last error, in any case. since, until: when it was made (a letter: when the call died), in
            seconds since 1970.
    """

    app: str = ""
    function: str = ""
    state: str = ""
    error: str = ""
    since: float = 0.0
    until: float = float("inf")

    def matches(self, *, app: str, function: str, state: str, error: str, at: float) -> bool:
        return (
            (not self.app or app == self.app)
            and (not self.function or self.function in (function, class_of(function)))
            and (not self.state or state == self.state)
            and self.error.lower() in error.lower()
            and self.since <= at <= self.until
        )

    def matches_call(self, status: CallStatus) -> bool:
        return self.matches(
            app=status.app,
            function=status.function,
            state=status.state,
            error=status.last_error,
            at=status.created,
        )


async def recent(broker: Broker, limit: int, wanted: Filter) -> tuple[list[CallStatus], bool]:
    """The newest calls that match, newest first, and whether older ones may have been left out.

    Reads from the ends of the queue, the results and the records of calls of several inputs, never everything.
    """
    workers = await broker.workers.all()
    several, several_cut = await _newest_several(broker, limit, wanted, workers)
    waiting, waiting_cut = await _newest_open(broker, limit, wanted, workers)
    ended, ended_cut = await _newest_ended(broker, limit, wanted)
    seen = {status.call for status in ended}
    merged = sorted([*several, *ended, *(s for s in waiting if s.call not in seen)], key=lambda s: -s.created)
    return merged[:limit], several_cut or waiting_cut or ended_cut or len(merged) > limit


async def unfinished(broker: Broker, wanted: Filter) -> AsyncIterator[CallStatus]:
    """Every call that has not ended and matches: those of several inputs, then the others, newest first."""
    workers = await broker.workers.all()
    filter = _filter(broker, wanted)
    in_several = 0
    async for record in _several(broker):
        if not wanted.app or record.app == wanted.app:
            queued = await broker.several.queued(record)
            in_several += queued
            if queued or record.count is None:
                status = await _of_several(broker, record, workers)
                if not status.state.final and wanted.matches_call(status):
                    yield status
    left = await broker.calls.count(filter) - in_several
    before: int | None = None
    while left > 0 and (page := await broker.calls.newest(_PAGE, before, filter)):
        before = page[-1].sequence
        alone = _alone(broker, page)
        left -= len(alone)
        for status in await _statuses(broker, alone, workers):
            if wanted.matches_call(status):
                yield status


async def _several(broker: Broker) -> AsyncIterator[CallRecord]:
    """The records of calls of several inputs, those written last first."""
    before: int | None = None
    while before != 0:
        page, before = await broker.several.newest(_PAGE, before)
        for record in page:
            yield record


def _filter(broker: Broker, wanted: Filter) -> str:
    return broker.topology.call_filter(app=wanted.app or "*")


def _alone(broker: Broker, stored: list[Stored]) -> list[tuple[Stored, Address]]:
    """The calls of one input among these."""
    found = [(s, broker.calls.address(s)) for s in stored if s.headers.get("Mesh-Kind", "") not in SEVERAL]
    return [(message, address) for message, address in found if address is not None]


async def _statuses(
    broker: Broker, alone: list[tuple[Stored, Address]], workers: list[WorkerRecord]
) -> list[CallStatus]:
    logs = await broker.attempts.get_many([address.key for _, address in alone])
    return [_unfinished(broker, a.call, s, workers, logs.get(a.key)) for s, a in alone]


async def _newest_several(
    broker: Broker, limit: int, wanted: Filter, workers: list[WorkerRecord]
) -> tuple[list[CallStatus], bool]:
    found: list[CallStatus] = []
    looked = 0
    async for record in _several(broker):
        if len(found) > limit or looked >= _LOOKED_INTO:
            return found[:limit], True
        if not wanted.app or record.app == wanted.app:
            looked += 1
            status = await _of_several(broker, record, workers)
            found += [status] if wanted.matches_call(status) else []
    return found[:limit], len(found) > limit


async def _newest_open(
    broker: Broker, limit: int, wanted: Filter, workers: list[WorkerRecord]
) -> tuple[list[CallStatus], bool]:
    if wanted.state and State(wanted.state).final:
        return [], False
    found: list[CallStatus] = []
    before: int | None = None
    scanned, cut = 0, False
    while len(found) <= limit and scanned < _SCANNED:
        page = await broker.calls.newest(max(limit, 256), before, _filter(broker, wanted))
        if not page:
            return found[:limit], cut
        before, scanned = page[-1].sequence, scanned + len(page)
        alone = _alone(broker, page)
        found += [status for status in await _statuses(broker, alone, workers) if wanted.matches_call(status)]
        address = broker.calls.address(page[-1])
        if not alone and address is not None and (first := await broker.several.first_queued(address)) is not None:
            cut, before = True, min(before, first.sequence)  # what is among the inputs of one call is not looked for
    return found[:limit], True


async def _newest_ended(broker: Broker, limit: int, wanted: Filter) -> tuple[list[CallStatus], bool]:
    found: list[CallStatus] = []
    before: int | None = None
    scanned, cut = 0, False
    while len(found) <= limit and scanned < _SCANNED:
        page = await broker.results.newest(max(limit, 256), before)
        if not page:
            return found[:limit], cut
        before, scanned = page[-1][1].sequence, scanned + len(page)
        calls = {key.partition(".")[0] for key, _ in page}
        several = await broker.several.get_many(calls)
        for key, stored in page:
            call, _, index = key.partition(".")
            if index == "0" and call not in several:
                status = _finished(call, 0, Result.decode(stored.headers, b""))
                found += [status] if wanted.matches_call(status) else []
        if len(calls) == 1 and several:
            cut, before = True, min(before, await broker.several.first_ended(calls.pop()))
    return found[:limit], True
