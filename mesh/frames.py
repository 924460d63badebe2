"""The conversation between a worker and one container: 4 bytes of length, then msgpack, over a socketpair.

Inputs are named by a number of their own here, new for every delivery, so that a late cancel can never hit the next
try of the same input. User bytes stay opaque; only the executor looks into them.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import msgpack

_LENGTH = struct.Struct(">I")
HEADER_SIZE = _LENGTH.size
MAX_FRAME = 64 << 20  # a length above this is not ours: somebody else wrote to the socket


class BrokenFrameError(Exception):
    """The other side wrote something that is no frame."""


def result_name(seq: int) -> str:
    """The file in which a container leaves a large result. Hidden: what is beside it is the user's."""
    return f".mesh-result-{seq}"


# --- worker to zygote, and back: a datagram each ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fork:
    """Fork a container. Its descriptors come along: sockets for frames and for cancels, page, stdout, stderr."""

    number: int  # that both sides know it by
    until: float  # as in `LiveUntil`; infinite where nothing limits it


@dataclass(frozen=True, slots=True)
class LiveUntil:
    """Kill the container at this moment of the monotonic clock, unless told of a later one before."""

    number: int
    until: float


@dataclass(frozen=True, slots=True)
class Forked:
    """The container's process is there. A pidfd of it comes along."""

    number: int
    pid: int


@dataclass(frozen=True, slots=True)
class NotForked:
    """The system refused another process."""

    number: int
    error: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The container's process has ended, and what it left behind was killed."""

    number: int
    status: int  # as of `wait`
    peak: int  # the most memory it used, in bytes
    lapsed: bool  # killed at the moment until which it was to live


# --- worker to container ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Home:
    """What the process finds around it: the first frame, once. Its variables may be secrets; no zygote sees them."""

    title: str  # that `ps` shows
    directory: str
    variables: dict[str, str]


@dataclass(frozen=True, slots=True)
class Start:
    """Become a container of this function: the second frame, once."""

    app: str  # name on the wire
    function: str
    version: str
    environment: str
    worker: str
    container: str
    code: dict[str, Any]
    construction: dict[str, Any]  # what the constructor of a class is called with
    bundle: str  # directory of the unpacked source, or empty
    result_limit: int  # bytes a result may have in a frame; a larger one is left in a file
    max_inputs: int  # runs at once
    web: bool = False  # it answers requests
    image: str = ""  # its mark
    directory: str = ""  # where it leaves large results
    payload_limit: int = 0  # bytes that these may have
    payload_reason: str = ""  # where that comes from


@dataclass(frozen=True, slots=True)
class Work:
    """Run one input."""

    seq: int
    call: str
    index: int
    attempt: int
    last_error: str
    format: str
    body: bytes
    keep_result: bool
    method: str  # of a class; empty for a function
    generator: bool = False  # its items go out as chunks, and their count is its value
    batch: int = 0  # members of its batch still to come, itself included; 0 for an input that runs alone
    file: str = ""  # that holds the body, where it is large


@dataclass(frozen=True, slots=True)
class Credit:
    """The reader of a generator, or of an answer, allows chunks up to this one; from a container: of a request."""

    seq: int
    number: int


@dataclass(frozen=True, slots=True)
class Feed:
    """The next bytes of what a request brings after its beginning. They come as its container gives `Credit`."""

    seq: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """Whoever made this request reads no answer any more."""

    seq: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what runs, then exit."""


# --- container to worker ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The user's code is imported; inputs may come. `modules`: what another container may have before its own code."""

    modules: str = ""  # with spaces between


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The user's code could not be imported or set up; the container exits. `for_good`: the same code never can be."""

    failure: bytes
    for_good: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an input came to: `succeeded`, `failed`, or `cancelled` (for a timeout, too: the worker knows which).

    `large`: its value, or the pickle of what it raised, is in the file `result_name` says.
    """

    seq: int
    state: str
    format: str
    body: bytes
    large: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next bytes of the flow that a generator yields."""

    seq: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Log:
    """Output of one input, or of the container alone where `seq` is 0. `stream` is 1 for stdout, 2 for stderr."""

    seq: int
    stream: int
    text: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """An input waits inside mesh (`remote`, `get`), or goes on."""

    seq: int
    waiting: bool


# --- the control socket: cancels and their answers -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cancel:
    """Interrupt this input, or never begin it. `force`: also where it blocks its event loop and cannot see a cancel."""

    seq: int
    force: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Give this input back if it has not begun; answered by `Dropped`."""

    seq: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """The answer to `Drop`: given back, or already begun."""

    seq: int
    given_back: bool


Frame = (
    Start
    | Work
    | Stop
    | Ready
    | StartFailed
    | Outcome
    | Log
    | Waiting
    | Cancel
    | Drop
    | Dropped
    | Chunk
    | Credit
    | Home
    | Fork
    | LiveUntil
    | Forked
    | NotForked
    | Ended
    | Feed
    | Gone
)

_KINDS: tuple[type[Any], ...] = (
    Start,
    Work,
    Stop,
    Ready,
    StartFailed,
    Outcome,
    Log,
    Waiting,
    Cancel,
    Drop,
    Dropped,
    Chunk,
    Credit,
    Home,
    Fork,
    LiveUntil,
    Forked,
    NotForked,
    Ended,
    Feed,
    Gone,
)


def _reader(kind: type[Any]) -> Callable[[Any], tuple[Any, ...]]:
    names = [field.name for field in fields(kind)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda frame: tuple(getattr(frame, name) for name in names)


_TAGS = {kind: (tag, _reader(kind)) for tag, kind in enumerate(_KINDS)}
_BY_TAG = dict(enumerate(_KINDS))  # a tuple would take a negative number, too


def encode(frame: Frame) -> bytes:
    """The bytes of one frame, length included."""
    tag, read = _TAGS[type(frame)]
    body = msgpack.packb((tag, *read(frame)), unicode_errors="surrogatepass")
    return _LENGTH.pack(len(body)) + body


def body_length(header: bytes | bytearray) -> int:
    """The length that a frame's first four bytes announce.

    Raises:
        BrokenFrameError: it cannot be a frame's.
    """
    length: int = _LENGTH.unpack(header)[0]
    if length > MAX_FRAME:
        raise BrokenFrameError(f"a frame of {length} bytes was announced; the limit is {MAX_FRAME}")
    return length


def decode(body: bytes | bytearray | memoryview) -> Frame:
    """The frame in `body`, which comes without its length.

    Raises:
        BrokenFrameError: it is none.
    """
    try:
        tag, *values = msgpack.unpackb(body, unicode_errors="surrogatepass")
        frame: Frame = _BY_TAG[tag](*values)
    except Exception as error:  # noqa: BLE001 - the bytes may be anybody's
        raise BrokenFrameError(f"not a frame: {error!r}") from None
    return frame


class Buffer:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now that `data` has come."""
        self._bytes += data
        start = 0
        try:
            while len(self._bytes) - start >= HEADER_SIZE:
                end = start + HEADER_SIZE + body_length(self._bytes[start : start + HEADER_SIZE])
                if end > len(self._bytes):
                    break
                body = bytes(self._bytes[start + HEADER_SIZE : end])
                start = end
                yield decode(body)
        finally:
            del self._bytes[:start]


# --- a page that both sides see --------------------------------------------------------------------------------------


class BeginMarks:
    """When the container began what it runs. A busy machine may begin an input long after it was sent, and a frame for
    each would be a tenth of what a short call costs; this the worker reads only when an input seems late.

    Args:
        descriptor: of the file behind the page; `memfd` makes one. It may be closed afterwards.
    """

    _BEGUN = struct.Struct("dq")  # in this order: a moment without its number is taken for that of an older input

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, 0)
        self._free = list(range(0, len(self._page), self._BEGUN.size))

    @classmethod
    def memfd(cls, runs: int) -> int:
        """A file for a page, in memory alone, for as many runs at once."""
        descriptor = os.memfd_create("mesh-begin-marks")
        os.ftruncate(descriptor, cls._BEGUN.size * runs)
        return descriptor

    def note(self, seq: int) -> int:
        """The container begins this input. Returns a place, to be given to `end`."""
        place = self._free.pop()
        self._BEGUN.pack_into(self._page, place, time.monotonic(), seq)
        return place

    def end(self, place: int) -> None:
        """The input has ended."""
        self._free.append(place)

    def began(self, seq: int) -> float | None:
        """The monotonic time at which this input began; `None` if it has not, or has ended and others have begun."""
        begun = (moment for moment, noted in self._BEGUN.iter_unpack(self._page) if noted == seq)
        return next(begun, None)

    def close(self) -> None:
        self._page.close()
