"""One async body, two faces: `f.spawn()` blocks, `f.spawn.aio()` awaits.

`.aio` runs on the caller's own loop. The blocking face runs the same body on one loop in one daemon thread of the
process, and never on a loop of the caller: it also works where one is running (with a warning, since it stops it).
"""

from __future__ import annotations

import atexit
import concurrent.futures
import os
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from mesh.exception import AsyncUsageWarning, ExecutionError

if TYPE_CHECKING:
    import asyncio

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

_CLOSING_LIMIT = 2.0  # seconds that the end of the process waits for what is still being sent


class Bridge:
    """The loop that blocking calls run on, in a thread of its own, started at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            with self._lock:
                if self._loop is None:
                    self._start()
        assert self._loop is not None
        return self._loop

    def _start(self) -> None:
        import asyncio  # takes 40 ms, which `import mesh` must not

        loop = asyncio.new_event_loop()
        # A daemon: a program must be able to end while something waits here.
        self._thread = threading.Thread(target=loop.run_forever, name="mesh", daemon=True)
        self._thread.start()
        self._loop = loop

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Wait for `work`. Ctrl-C cancels it, gives it a moment to clean up, and goes on."""
        import asyncio

        if threading.current_thread() is self._thread:
            work.close()
            raise ExecutionError("a blocking call was made from mesh's own thread, which it would stop: await .aio")
        _warn_of_running_loop()
        future = asyncio.run_coroutine_threadsafe(work, self.loop())
        try:
            return future.result()
        except KeyboardInterrupt:
            ending = asyncio.run_coroutine_threadsafe(_end(work), self.loop())
            concurrent.futures.wait([ending], _CLOSING_LIMIT)
            raise

    def close(self, work: Coroutine[Any, Any, None]) -> None:
        """At the end of the process: wait a moment for `work`, then let everything go."""
        import asyncio

        if self._loop is None or threading.current_thread() is self._thread:
            work.close()
            return
        concurrent.futures.wait([asyncio.run_coroutine_threadsafe(work, self._loop)], _CLOSING_LIMIT)


async def _end(work: Coroutine[Any, Any, Any]) -> None:
    """Cancel the task that runs `work`, and wait until it has cleaned up. Its future would say at once that it has."""
    import asyncio

    tasks = [task for task in asyncio.all_tasks() if task.get_coro() is work]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


_bridge = Bridge()
_abandoned: list[Bridge] = []
_at_exit: list[Callable[[], Coroutine[Any, Any, None]]] = []


def bridge() -> Bridge:
    """The process's bridge."""
    return _bridge


def before_exit(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `work` on the bridge's loop when the process ends, if anything ever ran there."""
    _at_exit.append(work)


def _close() -> None:
    for work in _at_exit:
        _bridge.close(work())


def _after_fork() -> None:
    """In the child the thread is gone. The old loop is kept: to destroy it would disturb the parent's sockets."""
    global _bridge
    _abandoned.append(_bridge)
    _bridge = Bridge()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _warn_of_running_loop() -> None:
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        warnings.warn(
            "a blocking call of mesh inside a running event loop stops the loop meanwhile; "
            "await the .aio form instead, for example `await f.remote.aio()`",
            AsyncUsageWarning,
            stacklevel=4,
        )


class Face(Generic[P, R]):
    """A method with two faces: call it and wait, or await its `.aio`."""

    __slots__ = ("aio",)

    def __init__(self, body: Callable[P, Coroutine[Any, Any, R]]) -> None:
        self.aio = body

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return _bridge.run(self.aio(*args, **kwargs))


class both(Generic[S, P, R]):  # noqa: N801 - reads as a decorator
    """Gives an async method its two faces."""

    def __init__(self, body: Callable[Concatenate[S, P], Coroutine[Any, Any, R]]) -> None:
        self._body = body
        self.__doc__ = body.__doc__

    @overload
    def __get__(self, instance: None, owner: type[S]) -> Self: ...
    @overload
    def __get__(self, instance: S, owner: type[S]) -> Face[P, R]: ...
    def __get__(self, instance: S | None, owner: type[S]) -> Self | Face[P, R]:
        if instance is None:
            return self
        return Face(self._body.__get__(instance, owner))


class both_static(Generic[P, R]):  # noqa: N801 - reads as a decorator
    """Gives an async static method its two faces; goes above `@staticmethod`."""

    def __init__(self, body: Callable[P, Coroutine[Any, Any, R]]) -> None:
        self._face: Face[P, R] = Face(getattr(body, "__func__", body))
        self.__doc__ = body.__doc__

    def __get__(self, instance: object, owner: type[Any]) -> Face[P, R]:
        return self._face
