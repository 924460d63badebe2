"""A TCP proxy in front of the server, whose connections can be cut, and which can swallow everything for a while."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

_CHUNK = 1 << 16


class Proxy:
    """Forwards to a port of this machine. Runs in a thread of its own; `port` is where it listens."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.port = self._do(self._listen)

    def _do(self, work: Callable[[], Any]) -> Any:
        async def done() -> Any:
            result = work()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(10)

    async def _listen(self) -> int:
        self._open = asyncio.Event()
        self._open.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    # --- faults ------------------------------------------------------------------------------------------------------

    def cut(self) -> int:
        """Break every connection, losing what is under way. Returns how many there were."""
        return int(self._do(self._abort))

    def _abort(self) -> int:
        count = len(self._writers)
        for writer in self._writers:
            writer.transport.abort()
        return count // 2

    def swallow(self) -> None:
        """From now on accept, and forward nothing."""
        self._do(self._open.clear)

    def forward(self) -> None:
        """Forward again, what was sent meanwhile first."""
        self._do(self._open.set)

    def close(self) -> None:
        """End it. Doing it twice is harmless."""
        if self._thread.is_alive():
            self._do(self._end)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        self._abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- forwarding --------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._open.wait()
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(there_writer)
            try:
                pumps = [self._pump(reader, there_writer), self._pump(there_reader, writer)]
                await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                self._writers.discard(there_writer)
        except OSError:
            pass  # the server is away
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction; when it ends, the other one ends with it."""
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
