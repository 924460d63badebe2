"""What has become of calls: of one, and of the newest many. Read from what the mesh stores, for SDK and CLI alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mesh.protocol import PREVIEW_LIMIT, Address, Format, Result, State, call_time, class_of
from mesh.records import AttemptLog, WorkerRecord

if TYPE_CHECKING:
    from mesh.broker import Broker, Stored

_PAGE = 1024  # messages read at once where all are wanted
_SCANNED = 20_000  # messages a filtered listing looks at before it says that it was cut


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
        inputs, ended: how many the call has, and how many of them have ended; known where one call is looked up.
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
    ended: int = 0


async def find_call(broker: Broker, call: str) -> CallStatus | None:
    """The status of a call, whatever number of inputs it has; `None` if the mesh does not know it."""
    left, inputs = await count_inputs(broker, call)
    if not inputs:
        return None
    status = await find_status(broker, call, left[0] if left else 0)
    return status and replace(status, inputs=inputs, ended=inputs - len(left))


async def count_inputs(broker: Broker, call: str) -> tuple[list[int], int]:
    """The inputs of a call that have not ended, and how many it has in all, as far as they were submitted."""
    queued = {address.index for address in await broker.calls.of_call(call)}
    ended = await broker.results.of_call(call)  # after the queue: then none is missed that ends meanwhile
    return sorted(queued - ended), max(queued | ended, default=-1) + 1


async def find_status(broker: Broker, call: str, index: int = 0, *, at: Address | None = None) -> CallStatus | None:
    """The status of one input; `None` if the mesh does not know it. Results first: they are final."""
    key = f"{call}.{index}"
    result = await broker.results.get(key)
    if result is None:
        queued = await broker.calls.find(call, index, at=at)
        if queued is not None:
            workers = await broker.workers.all()
            status = _unfinished(broker, call, queued, workers, await broker.attempts.get(key))
            return status if status.worker else replace(status, waiting_for=why(workers, broker.calls.address(queued)))
        result = await broker.results.get(key)
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
    takers = [worker for worker in workers if not worker.draining]
    if not takers:
        where = f" in environment {environment!r}" if environment else ""
        return f"no worker is running{where}; start one with `mesh worker` (or `mesh up`)"
    pool = str(address.pool_key) if address else ""
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

    Reads from the ends of the queue and of the results, never everything.
    """
    workers = await broker.workers.all()
    open_calls, open_cut = await _newest_open(broker, limit, wanted, workers)
    ended, ended_cut = await _newest_ended(broker, limit, wanted)
    seen = {(status.call, status.index) for status in ended}
    left = {s.call: s for s in open_calls if (s.call, s.index) not in seen}
    merged = sorted([*left.values(), *(s for s in ended if s.call not in left)], key=lambda s: -s.created)
    return merged[:limit], open_cut or ended_cut or len(merged) > limit


async def unfinished(broker: Broker, wanted: Filter) -> AsyncIterator[CallStatus]:
    """Every call that has not ended and matches, newest first."""
    workers = await broker.workers.all()
    before: int | None = None
    several: set[str] = set()  # calls of several inputs that were met
    while page := await broker.calls.newest(_PAGE, before):
        before = page[-1].sequence
        first = [(s, a) for s, a in _of_calls(broker, page) if a.call not in several]
        several |= {address.call for _, address in first if address.index}
        logs = await broker.attempts.get_many([address.key for _, address in first])
        for stored, address in first:
            status = _unfinished(broker, address.call, stored, workers, logs.get(address.key))
            if wanted.matches_call(status):
                yield status


def _of_calls(broker: Broker, stored: list[Stored]) -> list[tuple[Stored, Address]]:
    """One input of each call, the first of those that are there."""
    found: dict[str, tuple[Stored, Address]] = {}
    for message in stored:
        address = broker.calls.address(message)
        if address is not None and (address.call not in found or address.index < found[address.call][1].index):
            found[address.call] = message, address
    return list(found.values())


async def _newest_open(
    broker: Broker, limit: int, wanted: Filter, workers: list[WorkerRecord]
) -> tuple[list[CallStatus], bool]:
    if wanted.state and State(wanted.state).final:
        return [], False
    stored = await broker.calls.newest(limit if wanted == Filter() else _SCANNED)
    first = _of_calls(broker, stored)
    if len(first) < limit <= len(stored) < _SCANNED:  # calls of several inputs are in front of others
        stored = await broker.calls.newest(_SCANNED)
        first = _of_calls(broker, stored)
    logs = await broker.attempts.get_many([a.key for _, a in first[: 2 * limit]])
    statuses = [_unfinished(broker, a.call, s, workers, logs.get(a.key)) for s, a in first]
    matching = [status for status in statuses if wanted.matches_call(status)]
    return matching[:limit], len(matching) > limit or len(stored) >= _SCANNED


async def _newest_ended(broker: Broker, limit: int, wanted: Filter) -> tuple[list[CallStatus], bool]:
    found: list[CallStatus] = []
    before: int | None = None
    scanned = 0
    while len(found) <= limit:
        page = await broker.results.newest(max(limit, 256), before)
        if not page:
            return found, False
        if scanned >= _SCANNED:
            break
        scanned += len(page)
        before = page[-1][1].sequence
        for key, stored in page:
            call, _, index = key.partition(".")
            if index == "0":
                status = _finished(call, 0, Result.decode(stored.headers, b""))
                found += [status] if wanted.matches_call(status) else []
    return found[:limit], True
