"""Reading what a call of several inputs is made of: plain and asynchronous iterables, which may be slow or endless.

They are read only as far ahead as there is room, plain ones in a thread of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sized
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from mesh.exception import ExecutionError, InvalidError
from mesh.protocol import Input

T = TypeVar("T")

_TOGETHER = 500  # items given at once at most

Make = Callable[[int, tuple[Any, ...], dict[str, Any]], Input]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a caller asked for.

    Attributes:
        method: map, starmap, for_each or spawn_map. iterables: read together, the shortest ends; of starmap there is
            one, whose items hold all positional arguments. kwargs: given to each input.
        ordered: outputs come in the order of the inputs, else as they are there.
        return_exceptions: what a failed input raised is its output, instead of the end of everything.
    """

    method: str
    iterables: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ordered: bool = True
    return_exceptions: bool = False

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

    @property
    def total(self) -> int | None:
        """How many inputs there are, where that is known before they are read."""
        sizes = [len(given) for given in self.iterables if isinstance(given, Sized)]
        return min(sizes) if len(sizes) == len(self.iterables) else None


class Source(Protocol[T]):
    """Items that are read as far ahead as there is room: so many at first, and for each of `more` another."""

    def batches(self) -> AsyncGenerator[list[T], None]:
        """The items, as many at a time as have been read."""
        ...

    def more(self, count: int) -> None: ...
    def close(self) -> None: ...


def open_source(wanted: Wanted, make: Make, ahead: int) -> Source[Input]:
    """The inputs. Each is made before the next is read, which may be the same object with another content."""
    iterables = wanted.iterables
    plain = [given for given in iterables if isinstance(given, Iterable) and not isinstance(given, AsyncIterable)]
    if len(plain) == len(iterables):
        return _Threaded(_made(wanted, plain, make), ahead)
    return _Awaited(_made_as_they_come(wanted, make), ahead)


def _made(wanted: Wanted, iterables: Iterable[Iterable[Any]], make: Make) -> Iterator[Input]:
    for index, items in enumerate(zip(*iterables, strict=False)):
        yield make(index, wanted.arguments(items), dict(wanted.kwargs))


async def _made_as_they_come(wanted: Wanted, make: Make) -> AsyncGenerator[Input, None]:
    async with contextlib.aclosing(_zipped(wanted.iterables)) as read:
        index = 0
        async for items in read:
            yield make(index, wanted.arguments(items), dict(wanted.kwargs))
            index += 1


class _Threaded(Generic[T]):
    """A plain iterable, read in a thread of its own, since its next item may take as long as it likes."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self._items = items
        self._room = threading.Semaphore(ahead)
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._read: deque[tuple[T] | BaseException] = deque()
        self._news = asyncio.Event()
        self._told = False  # the loop is about to look: one hop between threads does for all that is read meanwhile
        # A daemon: a program must be able to end while its iterable waits for something.
        threading.Thread(target=copy_context().run, args=(self._run,), name="mesh-inputs", daemon=True).start()

    def more(self, count: int) -> None:
        if count:
            self._room.release(count)

    def close(self) -> None:
        """Read no more. What is being read now is left to end by itself."""
        self._closed = True
        self._room.release()

    async def batches(self) -> AsyncGenerator[list[T], None]:
        while True:
            await self._news.wait()
            self._news.clear()
            self._told = False
            items: list[T] = []
            while self._read and len(items) < _TOGETHER and isinstance(self._read[0], tuple):
                items += self._read.popleft()  # type: ignore[arg-type]
            if items:
                yield items
            if self._read and isinstance(end := self._read[0], BaseException):
                if isinstance(end, StopIteration):
                    return
                raise end
            if self._read:
                self._news.set()

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
        self._read.append(item)
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever wanted the items
                self._loop.call_soon_threadsafe(self._news.set)


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

    async def batches(self) -> AsyncGenerator[list[T], None]:
        async with contextlib.aclosing(self._items) as items:
            while True:
                await self._room.acquire()
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                yield [item]


async def _one_by_one(batches: AsyncGenerator[list[T], None]) -> AsyncGenerator[T, None]:
    async for items in batches:
        for item in items:
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
            readers.append(_one_by_one(threaded[-1].batches()))
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
