"""`remote_gen`: one call whose items are read as its generator yields them.

Two things come from the call: a flow of items, and, once it has ended, its result, which says how. Both must be there
for the end: a result without the end of the flow, or a flow that falls silent, is an error and never a short success.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from mesh import context
from mesh.broker import Unanswered
from mesh.exception import ConnectionError, InternalFailure
from mesh.flow import SILENCE, Items
from mesh.protocol import Format, Input, Result, State

if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.broker.flows import Reader
    from mesh.call import FunctionCall
    from mesh.sdk import Function

_LAST_ITEMS = 2.0  # seconds to wait for the end of the flow of a call that is known to have failed


async def items(
    function: Function[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncGenerator[list[Any]]:
    """The items, some at a time. Nothing is submitted before the first are asked for.

    Raises:
        Exception: what `Function.remote_gen` raises, after the items before it. The call is cancelled then if it has
            not ended, as it is when the generator is closed early.
    """
    broker, target = await function._lookup()
    input = function._input(broker, target, "generator", args, kwargs)
    call = function._call_of(broker, target, input.address.call, 0)
    flow = await broker.flows.read(input.address.call, input.address.index)
    try:
        waiter = await broker.results.expect(input.address.key)
        try:
            await _submit(broker, call, input)
            del input, args, kwargs  # they may be large, and the wait long
            reading = _Reading(broker, call, flow, asyncio.create_task(call._wait(broker, waiter, caller=True)))
            try:
                while batch := await reading.take():
                    yield batch
            finally:
                await reading.end()
        finally:
            waiter.close()
    finally:
        flow.close()


async def _submit(broker: Broker, call: FunctionCall[Any], input: Input) -> None:
    try:
        await broker.calls.submit(input)
    except asyncio.CancelledError:
        await call._cancel_behind(broker)
        raise


class _Reading:
    """One generator under way."""

    def __init__(self, broker: Broker, call: FunctionCall[Any], flow: Reader, result: asyncio.Task[Result]) -> None:
        self._broker = broker
        self._call = call
        self._flow = flow
        self._result = result
        self._result_since: float | None = None
        self._items = Items()
        self._raw: deque[tuple[Format, bytes]] = deque()
        self._taken = 0
        result.add_done_callback(self._on_result)

    def _on_result(self, _: asyncio.Task[Result]) -> None:
        self._result_since = time.monotonic()
        self._flow.news.set()

    async def take(self) -> list[Any]:
        """Some items; none at the end.

        Raises:
            Exception: what ended it early, once all items before are taken.
        """
        while True:
            if self._raw:
                return self._decoded()
            if (chunk := self._flow.pop()) is not None:
                self._raw.extend(self._items.feed(chunk))
            elif self._flow.error is not None:
                raise type(self._flow.error)(self._so_far(str(self._flow.error)))
            elif self._result.done() and (self._flow.ended or self._overdue() <= 0):
                return await self._conclude(self._result.result())
            else:
                self._flow.news.clear()
                with context.waiting_in_mesh():
                    await self._wait()

    def _decoded(self) -> list[Any]:
        """What has come whole. An item that cannot be read is an error in its place."""
        batch: list[Any] = []
        while self._raw:
            try:
                batch.append(self._call._decoded(self._broker, f"item {self._taken}", *self._raw[0]))
            except Exception:
                if batch:
                    return batch
                raise
            self._raw.popleft()
            self._taken += 1
        return batch

    async def _conclude(self, result: Result) -> list[Any]:
        """The end, if it is one.

        Raises:
            Exception: the call failed, or not all of its items have come.
        """
        count = await self._call._value(self._broker, result)
        if not self._flow.ended or count != self._taken or not self._items.whole:
            raise InternalFailure(self._so_far(f"the generator yielded {count}, the others are lost"))
        return []

    def _so_far(self, text: str) -> str:
        return f"call {self._call.object_id}, after {self._taken} items: {text}"

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _overdue(self) -> float:
        """Seconds left for the end of the flow, once there is a result."""
        assert self._result_since is not None
        failed = self._result.exception() is not None or self._result.result().state is not State.SUCCEEDED
        return self._result_since + (_LAST_ITEMS if failed else SILENCE) - time.monotonic()

    async def _wait(self) -> None:
        """Until something comes, or it is time to look whether something still can.

        Raises:
            InternalFailure, ConnectionError: nothing has been heard of its worker for too long.
        """
        if self._result.done():
            limit: float | None = self._overdue()
        elif self._flow.begun and not self._flow.ended:
            limit = self._flow.heard + SILENCE - time.monotonic()
        else:
            limit = None  # it waits for its turn, or for its result to be stored
        try:
            async with asyncio.timeout(limit):
                await self._flow.news.wait()
        except TimeoutError:
            if not self._result.done():
                await self._check_silence()

    async def _check_silence(self) -> None:
        """Nothing was heard of its worker. Perhaps it was not listened for: this loop may have been busy."""
        before, connection = self._flow.heard, self._broker.connection
        try:
            if connection.is_up:
                await connection.flush()  # what was sent before its answer has come then
                await asyncio.sleep(0)
        except Unanswered:
            pass
        if not connection.is_up:
            raise ConnectionError(self._so_far("the server is away, and with it what the generator yields"))
        if self._flow.heard == before and not self._result.done():
            raise InternalFailure(self._so_far(f"its worker has not been heard of for {SILENCE:g} s"))

    async def end(self) -> None:
        """Stop, and cancel the call if it has not ended."""
        if not self._result.done():
            self._result.cancel()
            if not self._broker.connection.is_closed:
                await self._call._cancel_behind(self._broker)
        await asyncio.wait([self._result])
        if not self._result.cancelled():
            self._result.exception()  # which is seen now, be it that nobody asked for it
