"""Cancelling a call, from the side of whoever wants it ended. Works with its worker, and without any.

One of two ends it: the worker that holds it, which answers the request, stops it, and stores the cancelled result once
nothing of it runs; or, where no worker holds it, the canceller itself. «Create if there is none» decides every race.
"""

from __future__ import annotations

import asyncio
import time

from mesh.broker import Broker, Stored
from mesh.exception import RemoteError, ServiceError
from mesh.protocol import Address, CancelRequest, Result, State, failure
from mesh.settle import end_without_lease

_ASK_LISTED = 2.0  # seconds to ask again where a live worker lists the input, but does not answer
_LOOK_AGAIN = 5.0  # seconds of waiting for the worker's result after which everything is looked at anew
_PAUSE = 0.1  # seconds between two requests to a worker that is ending what it ran
_TOGETHER = 256  # inputs of one call that are ended at once
_GIVE_UP = 90.0  # seconds; longer than any worker takes to end what does not want to (`cancel_grace`, then SIGKILL)


async def cancel_call(broker: Broker, call: str, *, request: CancelRequest) -> State | None:
    """End all inputs of a call, those included that its caller submits meanwhile: he stops at the first that is
    cancelled. Returns `CANCELLED` if any was; else the state of its first one, `None` if the mesh does not know it.

    The workers are asked for all of it at once, so what many inputs take is to end those that nobody holds.

    Raises:
        ServiceError: as `cancel_input`.
    """
    began, ended = time.monotonic(), set[str]()
    looks = 0
    while time.monotonic() - began < _GIVE_UP:
        workers = await broker.workers.all()
        held = await broker.cancels.ask_all(call, request, len(workers))
        left = await broker.calls.of_call(call)
        ended |= {address.key for address in left}
        if not left and not held:
            looks += 1
            if looks > 1 or not ended:
                return await _came_to(broker, call, ended)
        if time.monotonic() - began < _ASK_LISTED:  # a worker that lists an input, but does not answer, may be paused
            running = {key for worker in workers for key in worker.running}
            held |= {address.index for address in left if address.key in running}
        await _end_all(broker, [address for address in left if address.index not in held], request.reason)
        await asyncio.sleep(_PAUSE)  # for what ends in workers, or is just being submitted
    raise ServiceError(f"call {call}: a worker said that it would end its inputs, and has not after {_GIVE_UP:g} s")


async def _end_all(broker: Broker, free: list[Address], reason: str) -> None:
    """End inputs that no worker holds, each in its place."""
    together = asyncio.Semaphore(_TOGETHER)

    async def end(address: Address) -> None:
        async with together:
            queued = await broker.calls.find(address.call, address.index, at=address)
            if queued is not None:
                await _end(broker, queued, reason)

    await asyncio.gather(*map(end, free))


async def _came_to(broker: Broker, call: str, ended: set[str]) -> State | None:
    results = await broker.results.get_many({f"{call}.0"} | ended)
    if any(result.state is State.CANCELLED for key, result in results.items() if key in ended):
        return State.CANCELLED
    first = results.get(f"{call}.0")
    return first.state if first else None


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
    if address is None:
        return
    cancelled = failure(RemoteError, f"cancelled: {reason}")
    result = Result.of_failure(State.CANCELLED, cancelled, app=address.app, function=address.function)
    await end_without_lease(broker, queued, address, result)
