"""What a container's processes print past Python: C code, and what they start. It comes through two pipes."""

from __future__ import annotations

import asyncio
import codecs
import os
import time
from collections.abc import Callable
from typing import Any

_SIZE = 1 << 16  # bytes of a pipe, and of one read
_READS = 4  # reads of a pipe at once: as much as it holds, and a little; the loop has other things to do
_LIMIT = 1 << 20  # bytes that an input prints so, and are passed on
_WINDOW = 60.0  # seconds after which a container that runs long may print as much again


class Pipes:
    """The worker's ends of both.

    Args:
        on_text: called with the stream (1 or 2) and what was printed.
    """

    def __init__(self, on_text: Callable[[int, str], None]) -> None:
        self._on_text = on_text
        self._pipes: dict[int, tuple[int, Any]] = {}
        self._printed, self._since = 0, 0.0

    def open(self, loop: asyncio.AbstractEventLoop) -> list[int]:
        """Make them, and read them from now on. Returns the other ends, which become the caller's."""
        self._loop = loop
        theirs: list[int] = []
        for stream in (1, 2):
            read, write = os.pipe()
            os.set_blocking(read, False)
            self._pipes[read] = stream, codecs.getincrementaldecoder("utf-8")("replace")
            loop.add_reader(read, self._drain, read)
            theirs.append(write)
        return theirs

    def drain(self) -> None:
        """Read what there is: it comes before what is done next."""
        for pipe in self._pipes:
            self._drain(pipe)

    def forget(self) -> None:
        """An input has ended: the next one may print as much again."""
        self._printed, self._since = 0, time.monotonic()

    def close(self) -> None:
        """Read no more."""
        for pipe in self._pipes:
            self._loop.remove_reader(pipe)
            os.close(pipe)
        self._pipes.clear()

    def _drain(self, pipe: int) -> None:
        stream, decoder = self._pipes[pipe]
        for _ in range(_READS):
            try:
                data = os.read(pipe, _SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(pipe)
                return
            text = decoder.decode(self._allowed(data))
            if text:
                self._on_text(stream, text)

    def _allowed(self, data: bytes) -> bytes:
        """What of this output is passed on: 1 MiB an input, or a minute. The rest is read all the same, and dropped:
        a program that cannot write would stop, and one that writes without pause must not fill everything."""
        if time.monotonic() - self._since > _WINDOW:
            self.forget()
        before, self._printed = self._printed, self._printed + len(data)
        if before >= _LIMIT:
            return b""
        if self._printed < _LIMIT:
            return data
        return data[: _LIMIT - before] + "\n… output cut: the limit is 1 MiB an input\n".encode()
