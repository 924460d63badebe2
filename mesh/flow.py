"""A flow: bytes on their way to one reader, in numbered chunks, no faster than they are read. Pure: no I/O, no clock.

Core messages may get lost, and nobody may be there to read. So each chunk has a number, signs of life in between say
how many have been sent, and the last message says how many there were: what is missing is noticed, and is an error at
the reader. Who writes is never more than `WINDOW` chunks ahead of what has been read. A grant names the last chunk that
may be sent, so one that is lost is made good by the next.

What a generator yields is a flow of items: each is a msgpack pair, whatever chunks it comes to lie in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgpack

from mesh.exception import InternalFailure, InvalidError
from mesh.protocol import Format

MAX_CHUNK = 128 << 10  # bytes of a chunk
MAX_ITEMS = 64  # items that begin in one chunk
WINDOW = 16  # chunks that may be under way, or lie unread: 2 MiB, and 1,024 items
ALIVE = 3.0  # seconds between signs of life of either side
SILENCE = 10.0  # seconds without any sign of the writer after which the reader takes it as lost

_FORMATS = tuple(Format)


# --- messages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of the flow. `number` counts from 1."""

    number: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life: so many chunks have been sent."""

    count: int


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more will come; there were so many chunks. `word` says how it ended, where that is to be known."""

    count: int
    word: bytes = b""


Message = Chunk | Alive | End

_HEADERS: dict[type[Message], str] = {Chunk: "Mesh-Chunk", Alive: "Mesh-Sent", End: "Mesh-End"}


def encode(message: Message) -> tuple[dict[str, str], bytes]:
    """A message as headers and body. It has no version: that of its call holds."""
    if isinstance(message, Chunk):
        return {_HEADERS[Chunk]: str(message.number)}, message.body
    return {_HEADERS[type(message)]: str(message.count)}, message.word if isinstance(message, End) else b""


def decode(headers: Mapping[str, str], body: bytes) -> Message:
    """The inverse of `encode`.

    Raises:
        InvalidError: it is no message of a flow.
    """
    for kind, name in _HEADERS.items():
        number = headers.get(name, "")
        if number.isdecimal():
            return Alive(int(number)) if kind is Alive else kind(int(number), body)  # type: ignore[call-arg]
    raise InvalidError(f"not a message of a flow: {dict(headers)}")


# --- writing ---------------------------------------------------------------------------------------------------------


class Outflow:
    """Cuts what is written into chunks, and lets them go as credit allows."""

    def __init__(self) -> None:
        self._whole: deque[bytes] = deque()
        self._open = bytearray()
        self._items = 0
        self._sent = 0
        self._granted = WINDOW

    def write(self, data: bytes) -> None:
        """Add one item, or some bytes."""
        rest = memoryview(data)
        while len(self._open) + len(rest) > MAX_CHUNK:
            room = MAX_CHUNK - len(self._open)
            self._open += rest[:room]
            rest = rest[room:]
            self._close_chunk()
        self._open += rest
        self._items += 1
        if self._items >= MAX_ITEMS:
            self._close_chunk()

    def _close_chunk(self) -> None:
        self._whole.append(bytes(self._open))
        self._open.clear()
        self._items = 0

    def grant(self, number: int) -> None:
        """The reader allows chunks up to this one."""
        self._granted = max(self._granted, number)

    def take(self, *, whole: bool) -> bytes | None:
        """The next chunk that may be sent, which is then taken as sent; `None` if there is none, or no credit.

        Args:
            whole: only a chunk that is full; else also what there is of the last one.
        """
        if self._sent >= self._granted:
            return None
        if self._whole:
            chunk = self._whole.popleft()
        elif self._open and not whole:
            chunk = bytes(self._open)
            self._open.clear()
            self._items = 0
        else:
            return None
        self._sent += 1
        return chunk

    @property
    def is_full(self) -> bool:
        """Whether a whole chunk waits for credit: whoever writes should wait, too."""
        return bool(self._whole)

    @property
    def is_empty(self) -> bool:
        """Whether everything that was written has been sent."""
        return not self._whole and not self._open


# --- reading ---------------------------------------------------------------------------------------------------------


class Inflow:
    """Puts the messages of a flow together, and counts what the reader may grant.

    Attributes:
        count: chunks that have come. ended: nothing more will come. word: what was said at the end.
    """

    def __init__(self) -> None:
        self.count = 0
        self.ended = False
        self.word = b""
        self._unread: deque[bytes] = deque()
        self._granted = WINDOW

    def receive(self, message: Message) -> None:
        """Take a message.

        Raises:
            InternalFailure: chunks are missing before it.
        """
        if isinstance(message, Chunk):
            if message.number != self.count + 1 or self.ended:
                raise InternalFailure(f"chunk {message.number} came after chunk {self.count}: what was between is lost")
            self.count += 1
            self._unread.append(message.body)
        elif message.count != self.count:
            raise InternalFailure(f"{message.count} chunks were sent, and {self.count} came: the others are lost")
        elif isinstance(message, End):
            self.ended, self.word = True, message.word

    def pop(self) -> bytes | None:
        """The next chunk to read; `None` if there is none now."""
        return self._unread.popleft() if self._unread else None

    @property
    def grant(self) -> int:
        """The last chunk that may be sent: so far ahead of what was read as the window allows."""
        return self.count - len(self._unread) + WINDOW

    def grant_due(self) -> int | None:
        """The number to grant now, if it is worth a message: when half of the window has been read since the last."""
        if self.ended or self.grant - self._granted < WINDOW // 2:
            return None
        self._granted = self.grant
        return self._granted


# --- items -----------------------------------------------------------------------------------------------------------


def pack_item(format: Format, body: bytes) -> bytes:
    """One item of a generator as bytes of a flow."""
    packed: bytes = msgpack.packb((_FORMATS.index(format), body))
    return packed


class Items:
    """Finds the items in the chunks of a flow.

    Attributes:
        whole: nothing of a further item has come.
    """

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)
        self._fed = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[Format, bytes]]:
        """The items that are complete now that `chunk` has come.

        Raises:
            InternalFailure: there are none in it.
        """
        self._fed += len(chunk)
        self._unpacker.feed(chunk)
        try:
            for format, body in self._unpacker:
                yield _FORMATS[format], body
        except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
            raise InternalFailure(f"what came is no item: {error!r}") from None

    @property
    def whole(self) -> bool:
        return bool(self._unpacker.tell() == self._fed)
