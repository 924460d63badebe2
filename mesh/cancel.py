"""Cancelling a call, from the side of whoever wants it ended. Works with its worker, and without any.

One of two ends an input: the worker that holds it, which answers the request, stops it, and stores the cancelled
result once nothing of it runs; or, where no worker holds it, the canceller itself. «Create if there is none» decides
every race. A call of several inputs ends as a whole, by one result for all that have none (`broker.several`).
"""

from __future__ import annotations

import asyncio
import time

from mesh.broker import Broker, Stored
from mesh.exception import RemoteError, ServiceError
from mesh.protocol import SEVERAL, Address, CancelRequest, Result, State, end_key, failure
from mesh.records import CallRecord
from mesh.settle import end_without_lease, quarantine_stored

_ASK_LISTED = 2.0  # seconds to ask again where a live worker lists the input, but does not answer
_LOOK_AGAIN = 5.0  # seconds of waiting for the worker's result after which everything is looked at anew
_PAUSE = 0.1  # seconds between two requests to a worker that is ending what it ran
_GIVE_UP = 90.0  # seconds; longer than any worker takes to end what does not want to (`cancel_grace`, then SIGKILL)


async def cancel_call(broker: Broker, call: str, *, request: CancelRequest) -> State | None:
    """End all inputs of a call. Returns `CANCELLED` if any was; else the state it had come to, `None` if the mesh does
    not know it.

    Of a call of several inputs one result is stored, its end, which answers for all inputs that have no other, those
    included that its caller submits meanwhile. From then on workers refuse them; who waits is told. When this returns,
    nothing of it runs; what is in the queue, workers take out (`ends`).

    Raises:
        ServiceError: as `cancel_input`.
    """
    record = await broker.several.find(call)
    if record is None:
        return await cancel_input(broker, call, request=request)
    if await _has_ended(broker, record):
        return await _came_to(broker, record)
    await broker.several.note_inputs(record)
    await _store_end(broker, record, request.reason)
    await _until_nothing_runs(broker, call, request)
    if not await broker.workers.all():
        await broker.several.drop(record)
    return State.CANCELLED


async def _store_end(broker: Broker, record: CallRecord, reason: str) -> None:
    """The one result for all inputs of a call that have none."""
    cancelled = _cancelled(reason, record.app, record.function)
    await broker.results.create(end_key(record.call), cancelled, record.result_ttl)


async def _has_ended(broker: Broker, record: CallRecord) -> bool:
    """Whether all inputs have ended. The last may still be in the queue then; the first may have no result any more."""
    if record.count is None:
        return False
    return not await broker.several.queued(record) or await broker.several.ended(record.call) >= record.count


async def _came_to(broker: Broker, record: CallRecord) -> State:
    """The state of a call of several inputs that have all ended."""
    if await broker.results.end(record.call) is not None:
        return State.CANCELLED
    return State.FAILED if await broker.several.died(record) else State.SUCCEEDED


async def _until_nothing_runs(broker: Broker, call: str, request: CancelRequest) -> None:
    """Until no worker says that it holds an input of the call."""
    began = time.monotonic()
    while time.monotonic() - began < _GIVE_UP:
        if not await broker.cancels.ask_all(call, request, len(await broker.workers.all())):
            return
        await asyncio.sleep(_PAUSE)
    raise ServiceError(f"call {call}: a worker said that it would end its inputs, and has not after {_GIVE_UP:g} s")


async def cancel_input(
    broker: Broker, call: str, index: int = 0, *, request: CancelRequest, at: Address | None = None
) -> State | None:
    """End an input wherever it is. Returns the state it ended in, which is another one if that came first; `None` if
    the mesh does not know it. When this returns, no worker that answers runs anything of it.

    Raises:
        ServiceError: a worker said that it would end it, and has not.
    """
    key = f"{call}.{index}"
    began = time.monotonic()
    while time.monotonic() - began < _GIVE_UP:
        queued = await broker.calls.find(call, index, at=at)
        if queued is None:
            result = await broker.results.get(key)
            return result.state if result else None
        if await broker.cancels.ask(call, index, request):
            state = await _wait(broker, key)
            if state is not None:
                return state
        elif time.monotonic() - began > _ASK_LISTED or not await _listed(broker, key):
            await _end(broker, queued, request.reason)
            # It may have been delivered at the last moment; then its worker ends what it has begun.
            await _wait_until_free(broker, call, index, request, began + _GIVE_UP)
    raise ServiceError(f"call {call}: its worker said that it would end it, and has not after {_GIVE_UP:g} s")


async def _wait(broker: Broker, key: str) -> State | None:
    """The state the input ends in; `None` after a while without."""
    waiter = await broker.results.expect(key)
    try:
        result = await broker.results.get(key) or await waiter.wait(_LOOK_AGAIN)
    finally:
        waiter.close()
    return result.state if result else None


async def _wait_until_free(broker: Broker, call: str, index: int, request: CancelRequest, deadline: float) -> None:
    """Until no worker says that it holds the input."""
    while time.monotonic() < deadline:
        if not await broker.cancels.ask(call, index, request):
            return
        await asyncio.sleep(_PAUSE)


async def _listed(broker: Broker, key: str) -> bool:
    """Whether a live worker lists the input as running: its answer was lost, or it is paused."""
    listed = any(key in worker.running for worker in await broker.workers.all())
    if listed:
        await asyncio.sleep(_PAUSE)
    return listed


async def _end(broker: Broker, queued: Stored, reason: str) -> None:
    """No worker holds it: store the cancelled result, then take this one message out of the queue."""
    address = broker.calls.address(queued)
    if address is not None:
        cancelled = _cancelled(reason, address.app, address.function)
        await end_without_lease(broker, queued, address, cancelled)


def _cancelled(reason: str, app: str, function: str) -> Result:
    return Result.of_failure(State.CANCELLED, failure(RemoteError, f"cancelled: {reason}"), app=app, function=function)


# --- an app that ends ------------------------------------------------------------------------------------------------


async def cancel_queued(broker: Broker, app: str, reason: str) -> None:
    """End all that is queued of an app, whose workers have let go of it, and take it out of the queue."""
    while queued := await broker.calls.of_app(app):
        for call in {address.call for stored in queued if (address := _of_several(broker, stored)) is not None}:
            await _end_several(broker, call, reason)
        alone = [stored for stored in queued if _of_several(broker, stored) is None]
        await asyncio.gather(*(_end_or_put_aside(broker, stored, reason) for stored in alone))


def _of_several(broker: Broker, stored: Stored) -> Address | None:
    address = broker.calls.address(stored)
    return address if stored.headers.get("Mesh-Kind", "") in SEVERAL else None


async def _end_several(broker: Broker, call: str, reason: str) -> None:
    record = await broker.several.find(call)
    if record is not None:
        await _store_end(broker, record, reason)
        await broker.several.drop(record)


async def _end_or_put_aside(broker: Broker, stored: Stored, reason: str) -> None:
    if broker.calls.address(stored) is None:
        await quarantine_stored(broker, stored, reason)
    else:
        await _end(broker, stored, reason)
