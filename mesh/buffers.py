"""A pickle and the large buffers it refers to, in one body that can be read where it lies.

The layout: 4 bytes of length, so many bytes of msgpack with the sizes of pickle and buffers, then these, each beginning
at a multiple of 64 bytes. What is read from a mapped file or from writable memory is not copied again: an array lies
where its bytes came to, and can be written to like any other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgpack

from mesh.payload import Buffer, Pieces

LARGE = 64 << 10  # bytes from which a buffer is left out of its pickle: below, finding it costs more than copying

_LENGTH = struct.Struct(">I")
_ALIGNMENT = 64


def lay_out(pickled: bytes, buffers: Sequence[memoryview]) -> Pieces:
    """The body, whose buffers are not copied for it."""
    sizes: bytes = msgpack.packb([len(pickled), *(buffer.nbytes for buffer in buffers)])
    parts: list[Buffer] = [_LENGTH.pack(len(sizes)) + sizes]
    at = len(parts[0])
    for part in (memoryview(pickled), *buffers):
        parts += [bytes(-at % _ALIGNMENT), part]
        at += -at % _ALIGNMENT + part.nbytes
    return Pieces(parts)


def find(body: Buffer) -> list[memoryview]:
    """The pickle in a body, then its buffers. They can be written to, for which a body that cannot be is copied.

    Raises:
        ValueError: it is not laid out so.
    """
    view = memoryview(bytearray(body) if memoryview(body).readonly else body)
    at = _LENGTH.size + _LENGTH.unpack(view[: _LENGTH.size])[0]
    parts: list[memoryview] = []
    for size in msgpack.unpackb(view[_LENGTH.size : at]):
        at += -at % _ALIGNMENT
        parts.append(view[at : at + size])
        at += size
    if not parts or at != len(view):
        raise ValueError("the sizes of its parts do not add up to its own")
    return parts


class Reader:
    """A buffer as a file that is read once, for who reads nothing else. `io.BytesIO` would copy it."""

    def __init__(self, body: Buffer) -> None:
        self._left = memoryview(body)

    def _take(self, size: int) -> memoryview:
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    def read(self, size: int = -1) -> bytes:
        return bytes(self._take(len(self._left) if size < 0 else size))

    def readinto(self, into: memoryview) -> int:
        taken = self._take(len(into))
        into[: len(taken)] = taken
        return len(taken)

    def readline(self) -> bytes:
        at = bytes(self._left[:4096]).find(b"\n")
        return self.read(at + 1 if at >= 0 else -1)
