"""`map` and its relatives: one call of several inputs, submitted as they are read, its outputs given as they are taken.

An input is read when there is room for it: at most `LIMIT` are anywhere between the iterable they come from and whoever
takes the outputs. So memory stays flat however many there are, and neither side runs away from the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mesh import context
from mesh.behind import behind
from mesh.cancel import cancel_call
from mesh.exception import ClientClosed, ExecutionError, InvalidError, ResourceExhaustedError, ServerWarning
from mesh.protocol import CancelRequest, Input, Result, State, new_call_id

if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.broker.results import Waiter
    from mesh.call import FunctionCall
    from mesh.sdk import Function
    from mesh.target import Target

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")

LIMIT = 1_000  # inputs that were read and whose outputs are not taken yet
_SUBMITTING = 256  # submissions under way at once
_TAKEN = 100  # outputs taken at once; few beside LIMIT, so that work goes on while they are looked at
_SILENCE = 3.0  # seconds without any output after which a caller is told that no worker is there
_LOOK_AGAIN = 30.0  # seconds between looks whether an output can still come
_FULL_PAUSE = 1.0  # seconds until a full queue is tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a caller asked for.

    Attributes:
        method: map, starmap or for_each. iterables: read together, the shortest ends; of starmap there is one, whose
            items hold all positional arguments. kwargs: given to each input.
        ordered: outputs come in the order of the inputs, else as they are there.
        return_exceptions: what a failed input raised is its output, instead of the end of everything.
    """

    method: str
    iterables: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ordered: bool
    return_exceptions: bool

    def __post_init__(self) -> None:
        if not self.iterables:
            raise InvalidError(
                f"{self.method} takes at least one iterable of inputs, such as .{self.method}(range(10))"
            )
        for given in self.iterables:
            if not isinstance(given, Iterable | AsyncIterable):
                raise InvalidError(
                    f"{self.method} takes iterables of inputs, not {given!r}; one input is .remote({given!r})"
                )

    def arguments(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments of one input."""
        if self.method != "starmap":
            return items
        if not isinstance(items[0], Iterable):
            raise InvalidError(f"starmap takes an iterable of argument tuples, and {items[0]!r} is none; use .map()")
        return tuple(items[0])


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
        self._source = self._open()
        self._submitting = asyncio.Semaphore(_SUBMITTING)
        self._begun = asyncio.Event()  # the first is submitted
        self._unsettled = 0  # inputs that were, or may have been, submitted, and have no result
        self._accepted = 0  # those of them that certainly were
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
            async with asyncio.TaskGroup() as inputs:
                async for input in self._source:
                    inputs.create_task(self._run(input))
                    await self._begun.wait()  # what the first one looks up first, the others have: none overtakes one
            self._error = None
        except BaseExceptionGroup as failed:
            self._error = failed.exceptions[0]  # the others only followed
        finally:
            self._source.close()
            if self._unsettled and not self._target.spec.detach:
                await self._cancel_behind()

    async def _run(self, input: Input) -> None:
        """One input, until its output is there."""
        index = input.address.index
        waiter = await self._broker.results.expect(input.address.key)
        self._unsettled += 1
        try:
            await self._submit(input)
            del input  # its arguments may be large, and the wait long
            self._accepted += 1
            self._begun.set()
            result = await self._wait(waiter, index)
        finally:
            waiter.close()
        self._accepted -= 1
        self._unsettled -= 1
        output = self._output(index, result)
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
                warnings.warn(f"call {self._id} waits with further inputs: {error}", ServerWarning, stacklevel=2)
                await asyncio.sleep(_FULL_PAUSE)

    async def _wait(self, waiter: Waiter, index: int) -> Result:
        """The result, once it is pushed. Looks at times whether it can still come.

        Raises:
            NotFoundError, OutputExpiredError: it cannot come any more.
        """
        while True:
            found = await waiter.wait(_LOOK_AGAIN) or await self._call(index)._look_quietly(self._broker, index)
            if found is not None:
                return found

    def _output(self, index: int, result: Result) -> Any:
        """What an input came to. That it was cancelled ends all of them, also where exceptions are outputs: a call is
        cancelled as a whole, with the inputs that nobody has seen yet."""
        try:
            return self._call(index)._value(self._broker, result)
        except Exception as error:
            if self._wanted.return_exceptions and result.state is not State.CANCELLED:
                return error
            raise

    async def _cancel_behind(self) -> None:
        request = CancelRequest(reason=f"by {self._broker.client}")
        await behind(self._broker, lambda broker: cancel_call(broker, self._id, request=request))

    def _call(self, index: int) -> FunctionCall[R]:
        return self._function._call_of(self._broker, self._target, self._id, index)

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _open(self) -> _Source[Input]:
        """The inputs. Each is encoded before the next is read, which may be the same object with another content."""
        iterables = self._wanted.iterables
        plain = [given for given in iterables if isinstance(given, Iterable) and not isinstance(given, AsyncIterable)]
        if len(plain) == len(iterables):
            return _Threaded(self._encoded(plain), LIMIT)
        return _Awaited(self._encoded_as_they_come(), LIMIT)

    def _encoded(self, iterables: Iterable[Iterable[Any]]) -> Iterator[Input]:
        for index, items in enumerate(zip(*iterables, strict=False)):
            yield self._input(index, items)

    async def _encoded_as_they_come(self) -> AsyncGenerator[Input, None]:
        async with contextlib.aclosing(_zipped(self._wanted.iterables)) as read:
            index = 0
            async for items in read:
                yield self._input(index, items)
                index += 1

    def _input(self, index: int, items: tuple[Any, ...]) -> Input:
        args, kwargs = self._wanted.arguments(items), dict(self._wanted.kwargs)
        return self._function._input(self._broker, self._target, "map", args, kwargs, call=self._id, index=index)


# --- reading what may block ------------------------------------------------------------------------------------------


class _Source(Protocol[T_co]):
    """Items that are read as far ahead as there is room: so many at first, and for each of `more` another."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...
    def more(self, count: int) -> None: ...
    def close(self) -> None: ...


class _Threaded(Generic[T]):
    """A plain iterable, read in a thread of its own, since its next item may take as long as it likes."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self._items = items
        self._room = threading.Semaphore(ahead)
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._read: asyncio.Queue[tuple[T] | BaseException] = asyncio.Queue()
        # A daemon: a program must be able to end while its iterable waits for something.
        threading.Thread(target=copy_context().run, args=(self._run,), name="mesh-inputs", daemon=True).start()

    def more(self, count: int) -> None:
        if count:
            self._room.release(count)

    def close(self) -> None:
        """Read no more. What is being read now is left to end by itself."""
        self._closed = True
        self._room.release()

    async def __aiter__(self) -> AsyncGenerator[T, None]:
        while True:
            item = await self._read.get()
            if isinstance(item, tuple):
                yield item[0]
            elif isinstance(item, StopIteration):
                return
            else:
                raise item

    def _run(self) -> None:
        try:
            items = iter(self._items)
            while self._room.acquire() and not self._closed:
                self._hand_over((next(items),))
        except Exception as error:  # noqa: BLE001 - StopIteration, or whatever the iterable raised
            self._hand_over(error)
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like would end the loop instead of the map
            stopped = ExecutionError(f"the iterable of inputs raised {error!r}")
            stopped.__cause__ = error
            self._hand_over(stopped)

    def _hand_over(self, item: tuple[T] | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever wanted the items
            self._loop.call_soon_threadsafe(self._read.put_nowait, item)


class _Awaited(Generic[T]):
    """An asynchronous iterator, read on this loop."""

    def __init__(self, items: AsyncGenerator[T, None], ahead: int) -> None:
        self._items = items
        self._room = asyncio.Semaphore(ahead)

    def more(self, count: int) -> None:
        for _ in range(count):
            self._room.release()

    def close(self) -> None:
        """Nothing to do: whoever reads closes what it reads."""

    async def __aiter__(self) -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(self._items) as items:
            while True:
                await self._room.acquire()
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                yield item


async def _zipped(iterables: Iterable[Iterable[Any] | AsyncIterable[Any]]) -> AsyncGenerator[tuple[Any, ...], None]:
    """`zip` for iterables of both kinds, at least one of them asynchronous."""
    threaded: list[_Threaded[Any]] = []
    readers: list[AsyncIterator[Any]] = []
    for given in iterables:
        if isinstance(given, AsyncIterable):
            readers.append(aiter(given))
        else:
            threaded.append(_Threaded(given, 1))
            readers.append(aiter(threaded[-1]))
    try:
        while True:
            items: list[Any] = []
            for reader in readers:
                try:
                    items.append(await anext(reader))
                except StopAsyncIteration:
                    return
            yield tuple(items)
            for source in threaded:
                source.more(1)
    finally:
        for source in threaded:
            source.close()
