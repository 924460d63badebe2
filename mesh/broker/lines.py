"""nats-py's client with a short way in and out: what every message pays for, without what none of ours needs.

nats-py connects, authenticates, reconnects and subscribes again. But a message it receives goes through two regular
expressions, a queue and a task, its headers through a parser of their own; one it sends through a queue and a task,
too: four fifths of what a call costs a worker besides the mesh's own work. Here messages are cut out of what was read
in one go and handed to plain functions, headers are parsed where somebody looks at them, and all that is sent in one
turn of the loop is one write. This leans on the inside of nats-py, whose version is therefore bounded above, and
`tests/test_lines.py` holds it to that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.protocol.parser import Parser

_LONGEST_LINE = 1 << 20  # bytes; the server names all its cluster in one
_IN_NO_HURRY = 0.005  # seconds that what nobody waits for may wait for something to share a packet with
_FULL = 64 << 20  # bytes that wait for the socket, above which who sends more waits, too
_VERSION = "NATS/1.0"


class Incoming:
    """A message as it came. `headers` are parsed when they are first asked for."""

    __slots__ = ("_block", "_headers", "data", "reply", "subject")

    def __init__(self, subject: str, reply: str, block: bytes, data: bytes) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self._block = block
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        if self._headers is None:
            self._headers = decode_headers(self._block) if self._block else {}
        return self._headers


def decode_headers(block: bytes) -> dict[str, str]:
    """The headers in a block; what the server says in its first line is `Status` and `Description`."""
    first, *lines = block.decode("utf-8", "replace").split("\r\n")
    headers: dict[str, str] = {}
    if len(first) > len(_VERSION):
        code, _, description = first[len(_VERSION) :].strip().partition(" ")
        headers["Status"] = code
        if description:
            headers["Description"] = description
    for line in lines:
        name, colon, value = line.partition(":")
        if colon and " " not in (name := name.strip()):
            headers[name] = value.strip()
    return headers


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """Headers as they go over the wire, each on one line whatever is in it; without the lines before and after them."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\n") + text.count("\r") != 2 * len(headers):
        text = "".join([f"{_on_one_line(name)}: {_on_one_line(value)}\r\n" for name, value in headers.items()])
    return text.encode()


def _on_one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")


class Line(Client):
    """A connection whose messages can be taken by plain functions, and sent without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.takers: dict[bytes, Callable[[Incoming], None]] = {}
        self._ps = _Cutter(self)
        self._writing = False
        self._later: asyncio.TimerHandle | None = None

    # --- in ----------------------------------------------------------------------------------------------------------

    async def listen(self, subject: str, taker: Callable[[Incoming], None], queue: str = "") -> Subscription:
        """Call `taker` with each message at once, in the order they come; subscribed again after a reconnect. Of those
        who listen with the name of one `queue`, one gets each."""
        subscription = await self.subscribe(subject, queue)
        self.takers[b"%d" % subscription._id] = taker
        return subscription

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        self.takers.pop(b"%d" % sid, None)

    async def report(self, error: Exception) -> None:
        """What a taker raises is reported as what goes wrong elsewhere in nats-py."""
        await self._error_cb(error)

    # --- out ---------------------------------------------------------------------------------------------------------

    def send(
        self, subject: str, body: bytes = b"", headers: bytes = b"", reply: str = "", *, in_no_hurry: bool = False
    ) -> None:
        """Send at the end of this turn of the loop. While disconnected it is kept, and sent after.

        Args:
            headers: encoded. in_no_hurry: with what is sent next, or a moment later where that is nothing.

        Raises:
            nats.errors.Error: the connection is closed; or what is kept, or the message, is too large.
        """
        if self._status != Client.CONNECTED:
            self._check_kept(len(body))
        if len(body) > self._max_payload:  # the server would close the connection
            raise nats.errors.MaxPayloadError
        if headers:
            size = len(headers) + 12  # with the lines before and after them
            first = f"HPUB {subject} {reply} {size} {size + len(body)}\r\n{_VERSION}\r\n"
            command = b"".join((first.encode(), headers, b"\r\n", body, b"\r\n"))
        else:
            command = b"".join((f"PUB {subject} {reply} {len(body)}\r\n".encode(), body, b"\r\n"))
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._writing:
            return
        if in_no_hurry:
            if self._later is None:
                self._later = asyncio.get_running_loop().call_later(_IN_NO_HURRY, self._write)
        else:
            self._writing = True
            asyncio.get_running_loop().call_soon(self._write)

    def _check_kept(self, size: int) -> None:
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        if self.is_draining_pubs:
            raise nats.errors.ConnectionDrainingError
        if self._pending_data_size + size > self._max_pending_size:
            raise nats.errors.OutboundBufferLimitError

    def _write(self) -> None:
        """Everything that waits, in one system call. Where the connection is not there, nats-py does it when it is."""
        self._writing = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._status == Client.CONNECTED and self._pending and self._transport is not None:
            writer = self._writer
            if writer is not None and writer.is_closing():
                return  # nats-py has not noticed yet; uvloop would raise
            pending, self._pending = self._pending, []
            self._pending_data_size = 0
            self._transport.write(b"".join(pending))

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        self._write()  # nats-py would send the ping before what waits, and a flush would prove nothing
        await super()._send_ping(future)

    @property
    def _writer(self) -> asyncio.StreamWriter | None:
        """What nats-py writes with, where that is a socket."""
        return getattr(self._transport, "_io_writer", None)

    @property
    def is_full(self) -> bool:
        """Whether so much waits for the socket that who sends more should wait."""
        writer = self._writer
        return writer is not None and writer.transport.get_write_buffer_size() > _FULL

    async def make_room(self) -> None:
        """Wait until the socket has taken what waits for it. Ends with the connection, too."""
        if self._transport is not None:
            await self._transport.drain()  # type: ignore[no-untyped-call]


class _Cutter(Parser):
    """Cuts messages out of what was read; everything else the server says is nats-py's to understand."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._resets = 0
        super().__init__(line)

    def reset(self) -> None:
        super().reset()
        self._rest = bytearray()
        self._wanted = 0  # bytes there must be before it is worth looking again
        self._resets += 1

    async def parse(self, data: bytes = b"") -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data = bytes(self._rest)
        resets = self._resets
        at = self._wanted = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            if data.startswith((b"MSG ", b"HMSG "), at):
                words = data[at:end].split()
                begin = end + 2
                stop = begin + int(words[-1])
                if len(data) < stop + 2:
                    self._wanted = stop + 2 - at
                    break
                at = stop + 2
                await self._take(words, data, begin, stop)
            else:
                line, at = data[at : end + 2], end + 2
                await super().parse(line)
            if self._resets != resets:
                return  # the connection broke, or is given up: what follows is void
        self._rest = bytearray(data[at:])
        if not self._wanted and len(self._rest) > _LONGEST_LINE:
            raise nats.errors.ProtocolError("nats: a line without an end")

    async def _take(self, words: list[bytes], data: bytes, begin: int, stop: int) -> None:
        """One message: to its taker, or the long way through nats-py. `words` are the line before it."""
        if words[0] == b"MSG":
            block, reply = b"", words[3] if len(words) == 5 else b""
        else:
            middle = begin + int(words[-2])
            block, reply = data[begin:middle], words[3] if len(words) == 6 else b""
            begin = middle
        taker = self._line.takers.get(words[2])
        if taker is None:
            await self._line._process_msg(int(words[2]), words[1], reply, data[begin:stop], block)
            return
        try:
            taker(Incoming(words[1].decode(), reply.decode(), block, data[begin:stop]))
        except Exception as error:  # noqa: BLE001 - whatever it is, the next message is another one's
            await self._line.report(error)
