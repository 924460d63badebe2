"""The inside of a container, for generators: their items go out as they are yielded, no faster than they are read.

The first item goes at once, and so does each that comes a moment after the last; what comes faster is put together,
and waits a millisecond at most. A generator that is ahead of its reader by as much as the flow allows is not asked for
another item until there is room.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

from mesh import serialization
from mesh.exception import InputCancellation, InvalidError
from mesh.flow import Outflow, pack_item
from mesh.frames import Chunk, Credit, Work
from mesh.wire import Wire

_TOGETHER = 0.001  # seconds items are put together for, where they come that fast
_LOOK_AGAIN = 0.2  # seconds between looks of a thread whether its input was cancelled


class Generators:
    """The generators that run in this container. `is_cancelled` tells of an input by its number."""

    def __init__(self, wire: Wire, is_cancelled: Callable[[int], bool]) -> None:
        self._wire = wire
        self._is_cancelled = is_cancelled
        self._outlets: dict[int, _Outlet] = {}
        wire.on_credit = self._on_credit

    def _on_credit(self, credit: Credit) -> None:
        outlet = self._outlets.get(credit.seq)
        if outlet is not None:
            outlet.grant(credit.number)

    def send(self, work: Work, items: Any) -> int:
        """Send all items of what a function returned; returns how many. What it raises comes after those before it."""
        if not isinstance(items, Iterator):
            raise _not_items(items)
        with self._outlet(work) as outlet:
            try:
                with _closing(items):
                    for item in items:
                        outlet.put(item)
                        outlet.wait(outlet.has_room)
            except InputCancellation:
                raise
            except BaseException:
                outlet.finish()
                outlet.wait(outlet.is_done)
                raise
            outlet.finish()
            outlet.wait(outlet.is_done)
            return outlet.count

    async def send_from_loop(self, work: Work, items: Any) -> int:
        """The same, where the function runs on an event loop."""
        if isinstance(items, Iterator):
            items = _on_loop(items)
        elif not isinstance(items, AsyncIterator):
            raise _not_items(items)
        with self._outlet(work) as outlet:
            try:
                async with _closing_on_loop(items):
                    async for item in items:
                        outlet.put(item)
                        await outlet.wait_on_loop(outlet.has_room)
            except (InputCancellation, asyncio.CancelledError):
                raise
            except BaseException:
                outlet.finish()
                await outlet.wait_on_loop(outlet.is_done)
                raise
            outlet.finish()
            await outlet.wait_on_loop(outlet.is_done)
            return outlet.count

    @contextlib.contextmanager
    def _outlet(self, work: Work) -> Generator[_Outlet]:
        outlet = _Outlet(self._wire, work.seq, lambda: self._is_cancelled(work.seq))
        self._outlets[work.seq] = outlet
        try:
            yield outlet
        finally:
            del self._outlets[work.seq]
            outlet.close()


def _not_items(value: object) -> InvalidError:
    return InvalidError(f"it was called with remote_gen, and returned no generator but a {type(value).__name__}")


async def _on_loop(items: Iterator[Any]) -> AsyncGenerator[Any, None]:
    with _closing(items):
        for item in items:
            yield item


@contextlib.contextmanager
def _closing(items: Any) -> Generator[None]:
    """Let a generator that is left early run its `finally`. Other iterators have nothing to close."""
    try:
        yield
    finally:
        if hasattr(items, "close"):
            items.close()


@contextlib.asynccontextmanager
async def _closing_on_loop(items: Any) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        if hasattr(items, "aclose"):
            await items.aclose()


class _Outlet:
    """One generator's way out.

    Items are added where the generator runs; credit comes in where frames are read; a thread of its own sends what has
    waited long enough. So everything is done under one lock, and never interrupted half-way.
    """

    def __init__(self, wire: Wire, seq: int, is_cancelled: Callable[[], bool]) -> None:
        self.count = 0
        self._wire = wire
        self._seq = seq
        self._is_cancelled = is_cancelled
        self._flow = Outflow()
        self._lock = threading.RLock()
        self._granted = threading.Condition(self._lock)
        self._room: asyncio.Future[None] | None = None
        self._sent = float("-inf")
        self._sending = False
        self._finishing = False
        self._closed = False
        self._late = threading.Event()
        self._sender: threading.Thread | None = None

    # --- what goes out -----------------------------------------------------------------------------------------------

    def put(self, item: object) -> None:
        """Add an item. It is encoded before the generator goes on, which may change it."""
        data = pack_item(*serialization.encode(item))
        with self._wire.undisturbed(), self._lock:
            self._flow.write(data)
            self.count += 1
            self._send(whole=time.monotonic() - self._sent < _TOGETHER)
            if not self._flow.is_empty:
                self._send_later()

    def finish(self) -> None:
        """No items will come any more; what there is goes as soon as it may."""
        with self._wire.undisturbed(), self._lock:
            self._finishing = True
            self._send(whole=False)

    def grant(self, number: int) -> None:
        """The reader has room for more."""
        with self._wire.undisturbed(), self._lock:
            self._flow.grant(number)
            self._send(whole=not self._finishing)
            if not self._flow.is_empty:
                self._send_later()
            self._granted.notify_all()
            if self._room is not None and not self._room.done():
                self._room.set_result(None)

    def close(self) -> None:
        """The generator has ended; what may still go, goes."""
        with self._wire.undisturbed(), self._lock:
            if not self._sending:
                self._send(whole=False)
            self._closed = True
            self._late.set()

    def _send(self, *, whole: bool) -> None:
        self._sending = True  # stays so where a thread is interrupted in the middle: then nothing may follow
        while (chunk := self._flow.take(whole=whole)) is not None:
            self._wire.send(Chunk(self._seq, chunk))
            self._sent = time.monotonic()
        self._sending = False

    def _send_later(self) -> None:
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_late, name="mesh-items", daemon=True)
            self._sender.start()
        self._late.set()

    def _send_late(self) -> None:
        while True:
            self._late.wait()
            self._late.clear()
            time.sleep(_TOGETHER)
            with self._lock:
                if self._closed:
                    return
                self._send(whole=False)

    # --- waiting for credit ------------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        return not self._flow.is_full

    def is_done(self) -> bool:
        return self._flow.is_empty

    def wait(self, reached: Callable[[], bool]) -> None:
        """Until credit has made something true, or the input is cancelled. The main thread reads the frames itself."""
        if reached():
            return
        main = threading.current_thread() is threading.main_thread()
        while not reached() and not self._is_cancelled():
            if not main:
                with self._granted:
                    if not reached():
                        self._granted.wait(_LOOK_AGAIN)
            elif not self._wire.wait():
                os._exit(1)  # the worker is gone

    async def wait_on_loop(self, reached: Callable[[], bool]) -> None:
        """The same on an event loop, which reads the frames meanwhile."""
        while not reached() and not self._is_cancelled():
            self._room = asyncio.get_running_loop().create_future()
            await self._room
