"""What stands in for sys.stdout and sys.stderr in a container: each line goes to the worker with its input."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from mesh import context
from mesh.frames import Log
from mesh.wire import Wire

_MAX_LINE = 8 << 10  # characters of one line of output
_MAX_OUTPUT = 1 << 20  # characters of output of one input


class Output(io.TextIOBase):
    """What stands in for sys.stdout and sys.stderr: lines go to the worker with the input that printed them.

    Attributes:
        alone: the number of the input that runs alone, to which threads that it started belong; 0 if there is none.
    """

    def __init__(self, wire: Wire, stream: int, descriptor: int) -> None:
        self._wire = wire
        self._stream = stream
        self._descriptor = descriptor
        self._partial: dict[int, str] = {}
        self._sent: dict[int, int] = {}
        self.alone: Callable[[], int] = lambda: 0
        self.buffer = _Bytes(self)

    encoding = "utf-8"
    errors = "replace"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        """Stays open: the next input prints here too."""
        self.flush()

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # user code writes anything
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        seq = self._seq()
        whole = self._partial.pop(seq, "") + text
        lines, newline, rest = whole.rpartition("\n")
        if newline:
            self._send(seq, lines + newline)
        if len(rest) > _MAX_LINE:
            self._send(seq, rest)
        elif rest:
            self._partial[seq] = rest
        return len(text)

    def flush(self) -> None:
        """Send a line that has no end yet: a program that flushes wants it seen."""
        seq = self._seq()
        rest = self._partial.pop(seq, "")
        if rest:
            self._send(seq, rest)

    def _seq(self) -> int:
        running = context.current.get()
        return running.seq if running else self.alone()

    def reconfigure(self, **_: object) -> None:
        """Nothing to configure: what code calls to have UTF-8, which this is."""

    def end(self, seq: int) -> None:
        """The input has ended: what is left of its output goes before its outcome."""
        rest = self._partial.pop(seq, "")
        if rest:
            self._send(seq, rest + "\n")
        self._sent.pop(seq, None)

    def _send(self, seq: int, text: str) -> None:
        if self._wire.is_copy:  # what a process that user code forked prints goes where a subprocess's goes
            os.write(self._descriptor, text.encode("utf-8", "replace"))
            return
        sent = self._sent.get(seq, 0)
        if seq:
            if sent >= _MAX_OUTPUT:
                return
            self._sent[seq] = sent + len(text)
            if sent + len(text) >= _MAX_OUTPUT:
                text = text[: _MAX_OUTPUT - sent] + "\n… output cut: the limit is 1 MiB an input\n"
        if len(text) > _MAX_LINE:
            text = "".join(_cut(line) for line in text.splitlines(keepends=True))
        self._wire.send(Log(seq, self._stream, text))


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, text: Output) -> None:
        self._text = text

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._text.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} … line cut\n"


def replace_output(wire: Wire) -> tuple[Output, Output]:
    """From now on prints go to the worker."""
    streams: list[TextIO] = [sys.stdout, sys.stderr]
    for stream in streams:
        with contextlib.suppress(Exception):
            stream.flush()
    outputs = Output(wire, 1, 1), Output(wire, 2, 2)
    sys.stdout, sys.stderr = outputs
    return outputs


def flush_c_output() -> None:
    """What C code printed must not come after the outcome."""
    if _libc is not None:
        _libc.fflush(None)


_libc: ctypes.CDLL | None = ctypes.CDLL(None) if sys.platform == "linux" else None
