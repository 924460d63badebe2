"""Submitting many inputs as one call: its record, kept while it is made, and `spawn_map`, which leaves it to run."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from mesh.behind import behind
from mesh.call import FunctionCall
from mesh.cancel import cancel_call
from mesh.exception import RemoteError, RequestSizeError, ResourceExhaustedError, ServerWarning
from mesh.inputs import Source, Wanted, open_source
from mesh.progress import Progress
from mesh.protocol import CancelRequest, Input, Result, end_key, new_call_id
from mesh.records import CallRecord

if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.sdk import Function
    from mesh.target import Target

R = TypeVar("R")

AHEAD = 10_000  # inputs that were read and are not accepted yet
_FULL_PAUSE = 1.0  # seconds until a full queue is tried again
_WRITTEN = 2.0  # seconds between two notes of how far it got
_AGAIN = 0.5  # seconds until it is tried again to note it
_RENEWED = 600.0  # seconds after which it is noted again though nothing has changed
_LOOK_AGAIN = 30.0  # seconds between looks whether somebody has cancelled it


class Recorder:
    """Keeps the record of a call while its inputs are submitted, and as long as its caller waits for it."""

    def __init__(self, broker: Broker, target: Target, call: str, kind: str) -> None:
        self._broker = broker
        self._record = CallRecord(
            call=call,
            app=target.record.app,
            function=target.name,
            pool=target.pool,
            kind=kind,
            client=broker.client,
            result_ttl=target.result_ttl(kind),
        )
        self._changed = False
        self._keeping: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Write it down: before the first input."""
        from mesh.broker import translated

        async with translated(f"beginning call {self._record.call}"):
            await self._broker.several.put(self._record)
        self._keeping = self._broker.background.spawn(self._keep())

    def accepted(self, submitted: int) -> None:
        """So many inputs, from the first on, are in the queue."""
        self._record = replace(self._record, submitted=submitted)
        self._changed = True

    async def end(self, count: int) -> None:
        """Nobody submits more than so many. Tries for a while where the server is away."""
        self._record = replace(self._record, count=count)
        await self._write()
        deadline = time.monotonic() + self._broker.settings.submit_timeout
        while self._changed and time.monotonic() < deadline:
            await asyncio.sleep(_AGAIN)
            await self._write()

    def close(self) -> None:
        """Nobody waits for it here any more."""
        if self._keeping is not None:
            self._keeping.cancel()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_WRITTEN)
            if self._changed or time.time() - self._record.at > _RENEWED:
                await self._write()

    async def _write(self) -> None:
        from mesh.broker import NoResponders, StoreError, Unanswered

        self._changed, self._record = False, replace(self._record, at=time.time())
        try:
            await self._broker.several.put(self._record)
        except (Unanswered, NoResponders, StoreError):  # the server is away, or has no room
            self._changed = True


async def wait_for_room(call: str, error: ResourceExhaustedError) -> None:
    """The queue is full, and others of the call are in it, whose end makes room: say so, and wait a moment."""
    warnings.warn(f"call {call} waits with further inputs: {error}", ServerWarning, stacklevel=2)
    await asyncio.sleep(_FULL_PAUSE)


async def until_cancelled(broker: Broker, call: str) -> Result:
    """Wait until somebody cancels all of a call; returns its end."""
    waiter = await broker.results.expect(end_key(call))
    try:
        while True:
            found = await waiter.wait(_LOOK_AGAIN)
            if found is not None:
                return found
            with contextlib.suppress(Exception):  # the server is away: a reconnect reads what is waited for
                if (end := await broker.results.end(call)) is not None:
                    return end[1]
    finally:
        waiter.close()


async def spawn_map(function: Function[..., R], wanted: Wanted) -> FunctionCall[R]:
    """Submit all inputs as one call, which runs whatever becomes of this process.

    Raises:
        Exception: what an iterable raised; what `Function.spawn` raises; `RemoteError`, if somebody cancelled the call.
            What was submitted is cancelled then, unless the function has `detach=True`.
    """
    broker, target = await function._lookup()
    submission = _Submission(function, broker, target, wanted)
    try:
        await submission.run()
    except BaseException:
        if submission.submitted and not target.spec.detach:
            request = CancelRequest(reason=f"by {broker.client}, while it was submitted")
            await behind(broker, lambda broker: cancel_call(broker, submission.call, request=request))
        raise
    return FunctionCall(submission.call, environment=broker.topology.environment)


class _Submission:
    """A `spawn_map` under way."""

    def __init__(self, function: Function[..., Any], broker: Broker, target: Target, wanted: Wanted) -> None:
        self.call = new_call_id(broker.token)
        self.submitted = 0
        self._broker = broker
        self._recorder = Recorder(broker, target, self.call, wanted.method)
        self._progress = Progress(f"{wanted.method} {target.record.app}.{target.name}, {self.call}", wanted.total)

        def make(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Input:
            return function._input(broker, target, "spawn_map", args, kwargs, call=self.call, index=index)

        self._source = open_source(wanted, make, AHEAD)
        self._feed = _Feed(self._source)

    async def run(self) -> None:
        """Until all are accepted, or somebody cancels the call."""
        with self._broker.clients.waiting():
            submitting = asyncio.ensure_future(self._submit())
            heeding = asyncio.ensure_future(until_cancelled(self._broker, self.call))
            try:
                await asyncio.wait([submitting, heeding], return_when=asyncio.FIRST_COMPLETED)
                if not submitting.done():
                    raise RemoteError(heeding.result().error.partition(": ")[2])
                await submitting
            finally:
                self._source.close()
                self._feed.close()
                for task in (submitting, heeding):
                    task.cancel()
                await asyncio.wait([submitting, heeding])
                await self._recorder.end(self.submitted)
                self._recorder.close()
                self._progress.close()

    async def _submit(self) -> None:
        await self._feed.first()
        await self._recorder.begin()
        while True:
            try:
                await self._broker.calls.submit_many(self._feed, self._tell)
                return
            except ResourceExhaustedError as error:
                if not self.submitted:
                    raise
                await wait_for_room(self.call, error)

    def _tell(self, input: Input, error: Exception | None) -> None:
        """What came of an input."""
        if isinstance(error, RequestSizeError):
            raise error
        if error is not None:
            self._feed.again(input)
            return
        self.submitted += 1
        self._source.more(1)
        self._recorder.accepted(self.submitted)
        self._progress.advance(1)


class _Feed:
    """Inputs one by one, as they have been read. To stop waiting for the next one loses none."""

    def __init__(self, source: Source[Input]) -> None:
        self._ready: deque[Input] = deque()
        self._news = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read(source))
        self._reading.add_done_callback(lambda _: self._news.set())

    async def _read(self, source: Source[Input]) -> None:
        async with contextlib.aclosing(source.batches()) as batches:
            async for inputs in batches:
                self._ready += inputs
                self._news.set()

    async def first(self) -> None:
        """Wait until there is one, or will be none."""
        while not self._ready and not self._reading.done():
            self._news.clear()
            await self._news.wait()

    def again(self, input: Input) -> None:
        """It was refused, and comes once more."""
        self._ready.append(input)

    def __aiter__(self) -> _Feed:
        return self

    async def __anext__(self) -> Input:
        await self.first()
        if self._ready:
            return self._ready.popleft()
        self._reading.result()  # raises what the iterable raised
        raise StopAsyncIteration

    def close(self) -> None:
        self._reading.cancel()
