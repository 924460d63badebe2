"""Flows on the wire: core messages on subjects of their own, `mesh.flow.<call>.<n>.{out,credit}`.

What these promise, and what they do not, is `mesh.flow`'s: a lost message is noticed, not made good.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from mesh.background import Background
from mesh.broker.connection import Connection
from mesh.exception import ClientClosed, Error
from mesh.flow import ALIVE, Alive, Chunk, End, Inflow, Message, decode, encode
from mesh.topology import Topology


class Flows:
    """The flows of an environment, for those who write and those who read."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._background = Background()

    def write(self, call: str, index: int, on_grant: Callable[[int], None]) -> Writer:
        """The flow out of an input. `on_grant` is called with the number of the last chunk that may be sent."""
        return Writer(self._connection, self._background, *self._subjects(call, index), on_grant)

    async def read(self, call: str, index: int) -> Reader:
        """Begin to listen to the flow out of an input: submit it after this."""
        reader = Reader(self._connection, self._background, *self._subjects(call, index))
        await reader.open()
        return reader

    def _subjects(self, call: str, index: int) -> tuple[str, str]:
        flow_subject = self._topology.flow_subject
        return flow_subject(call, index, "out"), flow_subject(call, index, "credit")

    async def close(self) -> None:
        """End all of them."""
        await self._background.cancel()


class Writer:
    """Sends the chunks of one flow, in their order, and signs of life between them. Waits for no credit: it is given
    what has some."""

    def __init__(
        self,
        connection: Connection,
        background: Background,
        subject: str,
        credit: str,
        on_grant: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._background = background
        self._subject = subject
        self._credit = credit
        self._on_grant = on_grant
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sent = 0
        self._begun = False

    def begin(self) -> None:
        """Whoever writes has begun, and can be taken as lost from now on if it falls silent."""
        if not self._begun:
            self._begun = True
            self._background.spawn(self._run())

    def send(self, chunk: bytes) -> None:
        self._queue.put_nowait(chunk)

    def end(self) -> None:
        """Nothing more will come."""
        self._queue.put_nowait(None)

    async def _run(self) -> None:
        subscription = await self._connection.subscribe(self._credit, self._on_credit)
        try:
            await self._say(Alive(0))
            while (body := await self._next()) is not None:
                self._sent += 1
                await self._say(Chunk(self._sent, body))
            await self._say(End(self._sent))
        finally:
            await _unsubscribe(subscription)

    async def _next(self) -> bytes | None:
        while True:
            try:
                async with asyncio.timeout(ALIVE):
                    return await self._queue.get()
            except TimeoutError:
                await self._say(Alive(self._sent))

    async def _say(self, message: Message) -> None:
        headers, body = encode(message)
        with contextlib.suppress(Error):  # the connection broke, and too much waits for it: the reader finds a gap
            await self._connection.publish(self._subject, body, headers)

    async def _on_credit(self, message: Msg) -> None:
        if message.data.isdigit():
            self._on_grant(int(message.data))


class Reader:
    """One flow as its reader has it. Close it in a `finally`.

    Attributes:
        error: why it cannot go on; what came before that can be read. begun: its writer has been heard of.
        heard: monotonic time at which anything came last. news: set when something has come.
    """

    def __init__(self, connection: Connection, background: Background, subject: str, credit: str) -> None:
        self.error: Error | None = None
        self.begun = False
        self.heard = 0.0
        self.news = asyncio.Event()
        self._connection = connection
        self._background = background
        self._subject = subject
        self._credit = credit
        self._inflow = Inflow()

    async def open(self) -> None:
        self._subscription = await self._connection.subscribe(self._subject, self._on_message)
        self._connection.events.closed.append(self._on_closed)
        self._reminding = self._background.spawn(self._remind())

    @property
    def ended(self) -> bool:
        """Whether all of it has come."""
        return self._inflow.ended

    def pop(self) -> bytes | None:
        """The next chunk; `None` if there is none now. Reading is what gives credit for more."""
        chunk = self._inflow.pop()
        if self._inflow.grant_due():
            self._background.spawn(self._grant())
        return chunk

    def close(self) -> None:
        """Listen no more."""
        self._connection.events.closed.remove(self._on_closed)
        self._reminding.cancel()
        self._background.spawn(_unsubscribe(self._subscription))

    async def _on_message(self, message: Msg) -> None:
        self.begun = True
        self.heard = time.monotonic()
        try:
            if self.error is None:
                self._inflow.receive(decode(message.headers or {}, message.data))
        except Error as error:
            self.error = error
        self.news.set()

    def _on_closed(self) -> None:
        self.error = self.error or ClientClosed("the connection was closed before all of them were there")
        self.news.set()

    async def _grant(self) -> None:
        with contextlib.suppress(Error):  # it is said again
            await self._connection.publish(self._credit, str(self._inflow.grant).encode())

    async def _remind(self) -> None:
        """Say again what is granted: a message may have been lost, and a writer without credit waits for ever."""
        while True:
            await asyncio.sleep(ALIVE)
            if self.begun and not self.ended:
                await self._grant()


async def _unsubscribe(subscription: Subscription) -> None:
    with contextlib.suppress(nats.errors.Error):  # the connection is closed
        await subscription.unsubscribe()
