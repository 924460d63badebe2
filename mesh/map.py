"""`map` and its relatives: one call of several inputs, submitted as they are read, its outputs given as they are taken.

An input is read when there is room for it: at most `LIMIT` are anywhere between the iterable they come from and whoever
takes the outputs. So memory stays flat however many there are, and neither side runs away from the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from mesh import context
from mesh.behind import behind
from mesh.cancel import cancel_call
from mesh.exception import ClientClosed, ResourceExhaustedError
from mesh.inputs import Source, Wanted, open_source
from mesh.protocol import CancelRequest, Input, Result, State, new_call_id
from mesh.submission import Recorder, until_cancelled, wait_for_room

if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.broker.results import Waiter
    from mesh.call import FunctionCall
    from mesh.sdk import Function
    from mesh.target import Target

R = TypeVar("R")

LIMIT = 1_000  # inputs that were read and whose outputs are not taken yet
_SUBMITTING = 256  # submissions under way at once
_TAKEN = 100  # outputs taken at once; few beside LIMIT, so that work goes on while they are looked at
_SILENCE = 3.0  # seconds without any output after which a caller is told that no worker is there
_LOOK_AGAIN = 30.0  # seconds between looks whether an output can still come


async def outputs(function: Function[..., R], wanted: Wanted) -> AsyncGenerator[list[R], None]:
    """The outputs, some at a time. Nothing is read or submitted before the first are asked for.

    Raises:
        Exception: what the first input that failed raised, unless those are outputs; what an iterable raised; and what
            `Function.remote` raises. What is left is cancelled then, as it is when the generator is closed early.
    """
    broker, target = await function._lookup()
    running = _Running(function, broker, target, wanted)
    driver = broker.background.spawn(running.drive())
    try:
        while batch := await running.take():
            yield batch
    finally:
        driver.cancel()
        await asyncio.wait([driver])


class _Running(Generic[R]):
    """One call of several inputs under way: its driver submits and waits, its owner takes."""

    def __init__(self, function: Function[..., R], broker: Broker, target: Target, wanted: Wanted) -> None:
        self._function = function
        self._broker = broker
        self._target = target
        self._wanted = wanted
        self._id = new_call_id(broker.token)
        self._source: Source[Input] = open_source(wanted, self._input, LIMIT)
        self._recorder = Recorder(broker, target, self._id, wanted.method)
        self._submitting = asyncio.Semaphore(_SUBMITTING)
        self._begun = asyncio.Event()  # the first is submitted
        self._unsettled = 0  # inputs that were, or may have been, submitted, and have no result
        self._accepted = 0  # those of them that certainly were
        self._read = 0
        self._submitted = 0
        self._outputs: dict[int, R] = {}
        self._came = 0
        self._next = 0
        self._taken = 0
        self._news = asyncio.Event()
        self._silent = True
        self._ended = False
        self._error: BaseException | None = ClientClosed(
            f"call {self._id}: the connection was closed before all its outputs were there"
        )

    # --- taking ------------------------------------------------------------------------------------------------------

    async def take(self) -> list[R]:
        """Some outputs; none at the end. Those taken before are done with, and make room for as many inputs.

        Raises:
            Exception: what ended it early, once all that was ready is taken.
        """
        self._source.more(self._taken)
        while not (batch := self._ready()) and not self._ended:
            self._news.clear()
            with context.waiting_in_mesh():
                await self._wait_for_news()
        if not batch and self._error is not None:
            raise self._error
        self._taken = len(batch)
        return batch

    def _ready(self) -> list[R]:
        batch: list[R] = []
        while self._next in self._outputs and len(batch) < _TAKEN:
            batch.append(self._outputs.pop(self._next))
            self._next += 1
        return batch

    async def _wait_for_news(self) -> None:
        if self._silent:
            self._silent = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SILENCE):
                    await self._news.wait()
                return
            if self._unsettled:
                await self._call(0)._warn_without_worker(self._broker)
        await self._news.wait()

    # --- driving -----------------------------------------------------------------------------------------------------

    async def drive(self) -> None:
        """Submit inputs and wait for their results, until there are no more, or something ends it early."""
        try:
            with self._broker.clients.waiting():
                await self._drive()
        finally:
            self._ended = True
            self._news.set()

    async def _drive(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                heeding = tasks.create_task(self._heed())
                await self._submit_all()
                heeding.cancel()
            self._error = None
        except BaseExceptionGroup as failed:
            self._error = _first(failed)
        finally:
            self._source.close()
            self._recorder.close()
            if self._unsettled and not self._target.spec.detach:
                await self._cancel_behind()

    async def _submit_all(self) -> None:
        async with asyncio.TaskGroup() as inputs:
            try:
                async with contextlib.aclosing(self._source.batches()) as batches:
                    async for batch in batches:
                        for input in batch:
                            await self._begin(inputs, input)
            finally:
                if self._begun.is_set():
                    self._broker.parting.spawn(self._recorder.end(self._read))

    async def _begin(self, inputs: asyncio.TaskGroup, input: Input) -> None:
        if not self._begun.is_set():
            await self._recorder.begin()
        self._read += 1
        inputs.create_task(self._run(input))
        await self._begun.wait()  # what the first one looks up first, the others have: none overtakes one

    async def _heed(self) -> NoReturn:
        """End all of it when somebody cancels the call, also while nothing of it is under way."""
        await self._call(0)._value(self._broker, await until_cancelled(self._broker, self._id))
        raise AssertionError("a cancelled call has no value")

    async def _run(self, input: Input) -> None:
        """One input, until its output is there."""
        index = input.address.index
        waiter = await self._broker.results.expect(input.address.key)
        self._unsettled += 1
        try:
            await self._submit(input)
            del input  # its arguments may be large, and the wait long
            self._accepted += 1
            self._submitted += 1
            self._recorder.accepted(self._submitted)
            self._begun.set()
            result = await self._wait(waiter, index)
        finally:
            waiter.close()
        self._accepted -= 1
        self._unsettled -= 1
        output = await self._output(index, result)
        self._outputs[index if self._wanted.ordered else self._came] = output
        self._came += 1
        self._news.set()

    async def _submit(self, input: Input) -> None:
        """Submit one input. A full queue is waited for as long as others of ours are in it, whose end makes room."""
        while True:
            try:
                async with self._submitting:
                    await self._broker.calls.submit(input)
                return
            except ResourceExhaustedError as error:
                if not self._accepted:
                    raise
                await wait_for_room(self._id, error)

    async def _wait(self, waiter: Waiter, index: int) -> Result:
        """The result, once it is pushed. Looks at times whether it can still come.

        Raises:
            NotFoundError, OutputExpiredError: it cannot come any more.
        """
        while True:
            found = await waiter.wait(_LOOK_AGAIN) or await self._call(index)._look_quietly(self._broker, index)
            if found is not None:
                return found

    async def _output(self, index: int, result: Result) -> Any:
        """What an input came to. That it was cancelled ends all of them, also where exceptions are outputs: a call is
        cancelled as a whole, with the inputs that nobody has seen yet."""
        try:
            return await self._call(index)._value(self._broker, result)
        except Exception as error:
            if self._wanted.return_exceptions and result.state is not State.CANCELLED:
                return error
            raise

    async def _cancel_behind(self) -> None:
        request = CancelRequest(reason=f"by {self._broker.client}")
        await behind(self._broker, lambda broker: cancel_call(broker, self._id, request=request))

    def _call(self, index: int) -> FunctionCall[R]:
        return self._function._call_of(self._broker, self._target, self._id, index)

    def _input(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Input:
        return self._function._input(self._broker, self._target, "map", args, kwargs, call=self._id, index=index)


def _first(failed: BaseException) -> BaseException:
    """What went wrong first; the others only followed."""
    while isinstance(failed, BaseExceptionGroup):
        failed = failed.exceptions[0]
    return failed
