"""Exchanges: a request on its way to a worker, its answer on the way back, and credit for both, over two subjects.

Each process has one subscription for all of them, `<inbox>.<call>`; a message names in its reply where its own sender
is found. So a request costs no subscriptions, and a short one two messages: itself, and its answer. Beyond what
`mesh.flow` notices, an exchange learns within a second that the process at its other end has gone: nobody listens.

A message is a byte for its kind, a number, and bytes. It has no version: that of the request that began the exchange
holds.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum, StrEnum

from mesh.broker.connection import Connection, NoResponders, Unanswered, status
from mesh.broker.lines import Incoming
from mesh.exception import ClientClosed, Error, InternalFailure, InvalidError
from mesh.flow import ALIVE, SILENCE, WINDOW, Alive, Chunk, End, Inflow

_HEAD = struct.Struct(">BI")
_GRANT = struct.Struct(">I")
_TICK = 0.5  # seconds between looks at all exchanges
_FIRST = 5.0  # seconds in which whoever gets a request says so
_GREET = 0.02  # seconds that this may wait for the answer, which says it, too
_PROBE = 2.0  # seconds for an answer of the process at the other end
_PROBED = "alive"  # in place of a call


class Receipt(StrEnum):
    """Why a request goes to nobody."""

    NOBODY = "nobody"  # nobody listens
    AGAIN = "again"  # the worker does not run this function any more: another one may
    BUSY = "busy"  # too many wait


class _Kind(IntEnum):
    CHUNK = 1  # number of the chunk; the chunk
    ALIVE = 2  # chunks sent so far; the last chunk that the sender grants
    END = 3  # chunks sent; the word
    LAST = 4  # number of the chunk; length of the word, the word, and the last chunk
    GRANT = 5  # the last chunk that may be sent
    GONE = 6  # the sender reads no more
    REFUSED = 7  # the receipt


class Exchange:
    """One request, as one of its ends has it. Close it in the end.

    Attributes:
        refused: why nobody took the request. error: why nothing more will come; what came before can be read.
        granted: the last chunk that the other end allows. gone: it reads no more.
        begun: something has come from there. told: called after anything has changed here.
    """

    def __init__(self, exchanges: Exchanges, call: str, told: Callable[[], object], peer: str) -> None:
        self.refused: Receipt | None = None
        self.error: Error | None = None
        self.granted = WINDOW
        self.gone = False
        self.begun = bool(peer)
        self.told = told
        self.call = call
        self.peer = peer
        self.heard = time.monotonic()
        self.spoken = False
        self._exchanges = exchanges
        self._inflow = Inflow()
        self._out: deque[bytes] = deque()
        self._word: bytes | None = None
        self._sent = 0

    # --- in ----------------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether all has come that there is."""
        return self._inflow.ended

    @property
    def word(self) -> bytes:
        """What was said at the end."""
        return self._inflow.word

    def pop(self) -> bytes | None:
        """The next chunk; `None` if there is none now. Reading is what gives credit for more."""
        chunk = self._inflow.pop()
        due = self._inflow.grant_due() if chunk is not None else None
        if due is not None:
            self._exchanges.say(self, _HEAD.pack(_Kind.GRANT, due))
        return chunk

    def take(self, data: bytes) -> None:
        """A message has come."""
        self.heard, self.begun = time.monotonic(), True
        try:
            self._understand(data)
        except Error as error:
            self.error = self.error or error
        except (struct.error, ValueError) as error:
            self.error = self.error or InvalidError(f"not a message of a exchange: {error!r}")
        self.told()

    def _understand(self, data: bytes) -> None:
        kind, number = _HEAD.unpack_from(data)
        rest = data[_HEAD.size :]
        match _Kind(kind):
            case _Kind.CHUNK:
                self._inflow.receive(Chunk(number, rest))
            case _Kind.LAST:
                end = _GRANT.size + _GRANT.unpack_from(rest)[0]
                self._inflow.receive(Chunk(number, rest[end:]))
                self._inflow.receive(End(number, rest[_GRANT.size : end]))
            case _Kind.END:
                self._inflow.receive(End(number, rest))
            case _Kind.ALIVE:
                self._inflow.receive(Alive(number))
                self.granted = max(self.granted, _GRANT.unpack(rest)[0])
            case _Kind.GRANT:
                self.granted = max(self.granted, number)
            case _Kind.GONE:
                self.gone = True
            case _Kind.REFUSED:
                self.refused = Receipt(rest.decode())

    def fail(self, error: Error) -> None:
        """Nothing more will come."""
        if self.error is None and not self.ended:
            self.error = error
            self.told()

    # --- out ---------------------------------------------------------------------------------------------------------

    def send(self, chunk: bytes) -> None:
        """Send a chunk, for which there is credit."""
        self._out.append(chunk)
        self._exchanges.wake(self)

    def end(self, word: bytes = b"") -> None:
        """Nothing more will come from here; it is closed when that is said."""
        self._word = word
        self._exchanges.wake(self)

    def greet(self) -> None:
        """Say that there is somebody at this end, unless that was said."""
        if not self.spoken:
            self.say_alive()

    def say_alive(self) -> None:
        if self.peer and self._word is None and not self._out:
            grant = _GRANT.pack(self._inflow.grant)
            self._exchanges.say(self, _HEAD.pack(_Kind.ALIVE, self._sent) + grant)

    def leave(self) -> None:
        """Tell the other end that nobody reads on."""
        if self.peer:
            self._exchanges.say(self, _HEAD.pack(_Kind.GONE, 0))

    def refuse(self, receipt: Receipt) -> None:
        """Do not take the request."""
        self._exchanges.say(self, _HEAD.pack(_Kind.REFUSED, 0) + receipt.encode())
        self.close()

    def messages(self) -> Iterator[bytes]:
        """What is to be sent now, and then is."""
        while self._out:
            chunk = self._out.popleft()
            self._sent += 1
            if self._out or self._word is None:
                yield _HEAD.pack(_Kind.CHUNK, self._sent) + chunk
            else:
                word, self._word = self._word, None
                yield _HEAD.pack(_Kind.LAST, self._sent) + _GRANT.pack(len(word)) + word + chunk
                self.close()
        if self._word is not None:
            word, self._word = self._word, None
            yield _HEAD.pack(_Kind.END, self._sent) + word
            self.close()

    def close(self) -> None:
        """Listen no more."""
        self._exchanges.forget(self)


class Exchanges:
    """All exchanges of this process, and the other processes that they are with."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox = ""
        self._exchanges: dict[str, Exchange] = {}
        self._heard: dict[str, float] = {}  # when anything came from another process, by its inbox
        self._asked: set[str] = set()
        self._dirty: dict[Exchange, None] = {}
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """Listen, once and for all."""
        async with self._opening:
            if not self._inbox:
                inbox = self._connection.new_inbox()
                await self._connection.listen(f"{inbox}.*", self._on_message)
                self._connection.events.closed.append(self._on_closed)
                self._connection.spawn(self._tick())
                self._inbox = inbox

    def begin(self, call: str, told: Callable[[], object]) -> tuple[Exchange, str]:
        """That of a request to be made, and the reply subject to send it with."""
        return self._add(Exchange(self, call, told, "")), f"{self._inbox}.{call}"

    def answer(self, call: str, told: Callable[[], object], peer: str) -> Exchange:
        """That of a request that came with this reply subject."""
        exchange = self._add(Exchange(self, call, told, peer))
        self._heard[_process(peer)] = exchange.heard
        asyncio.get_running_loop().call_later(_GREET, exchange.greet)
        return exchange

    def _add(self, exchange: Exchange) -> Exchange:
        self._exchanges[exchange.call] = exchange
        return exchange

    def forget(self, exchange: Exchange) -> None:
        if self._exchanges.get(exchange.call) is exchange:
            del self._exchanges[exchange.call]

    # --- messages ----------------------------------------------------------------------------------------------------

    def _on_message(self, message: Incoming) -> None:
        call = message.subject.rpartition(".")[2]
        exchange = self._exchanges.get(call)
        if exchange is None:
            if call == _PROBED:
                self._connection.send(message.reply)
        elif status(message) == "503":
            exchange.refused = Receipt.NOBODY
            exchange.told()
        else:
            if message.reply and exchange.peer != message.reply:
                exchange.peer = message.reply
                self.wake(exchange)
            exchange.take(message.data)
            self._heard[_process(exchange.peer)] = exchange.heard

    def say(self, exchange: Exchange, message: bytes) -> None:
        """Send this before anything that waits to be sent."""
        exchange.spoken = True
        try:
            self._connection.send(exchange.peer, message, reply=f"{self._inbox}.{exchange.call}")
        except Error as error:  # the connection broke, and too much waits for it
            exchange.fail(error)

    def wake(self, exchange: Exchange) -> None:
        """It has something to send: at the end of this turn of the loop, since its end may be the next it says."""
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._flush)
        self._dirty[exchange] = None

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for exchange in dirty:
            if exchange.peer:
                for message in exchange.messages():
                    self.say(exchange, message)

    # --- what does not come ------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        since = 0.0
        while True:
            await asyncio.sleep(_TICK)
            since += _TICK
            now, remind = time.monotonic(), since >= ALIVE
            since = 0.0 if remind else since
            for exchange in list(self._exchanges.values()):
                if now - exchange.heard > (SILENCE if exchange.begun else _FIRST):
                    exchange.fail(InternalFailure("nothing was heard of the other end for too long"))
                elif remind:
                    exchange.say_alive()
            self._look_for_others(now)

    def _look_for_others(self, now: float) -> None:
        live = {_process(exchange.peer) for exchange in self._exchanges.values() if exchange.peer}
        self._heard = {process: self._heard.get(process, 0.0) for process in live}
        for process in live - self._asked:
            if now - self._heard[process] > _TICK:
                self._asked.add(process)
                self._connection.spawn(self._ask(process))

    async def _ask(self, process: str) -> None:
        """End the exchanges to a process that is not there any more. One that is there and slow may take its time."""
        try:
            await self._connection.request(f"{process}.{_PROBED}", timeout=_PROBE)
            self._heard[process] = time.monotonic()
        except NoResponders:
            for exchange in [exchange for exchange in self._exchanges.values() if _process(exchange.peer) == process]:
                exchange.fail(InternalFailure("the process at the other end has gone"))
        except (Unanswered, Error):
            pass
        finally:
            self._asked.discard(process)

    def _on_closed(self) -> None:
        for exchange in list(self._exchanges.values()):
            exchange.fail(ClientClosed("the connection was closed before all of it was there"))


def _process(peer: str) -> str:
    """The inbox of the process that a exchange leads to."""
    return peer.rpartition(".")[0]
