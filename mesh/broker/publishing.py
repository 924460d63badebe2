"""Publishing into a stream: many messages under way at once, each with its own answer.

Messages go out as they come. Where the server writes to disk before it confirms, that would cost a write each, so there
they go in group commits: what comes while one is under way makes the next, an atomic batch that costs one write. A
message alone never waits. A batch is stored whole or not at all, and does not say for whose sake it was refused, so a
refused one is sent again message by message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from mesh.broker.connection import (
    REQUEST_TIMEOUT,
    Connection,
    NoResponders,
    StoreError,
    Unanswered,
    Waiting,
    checked,
    status,
)
from mesh.broker.lines import Incoming
from mesh.exception import ClientClosed

_WINDOW = 2_000  # messages under way, beyond which whoever has many waits
_WINDOW_BYTES = 16 << 20
_LARGEST_BATCH = 500
_SMALLEST_BATCH = 20  # a batch costs 2 to 3 ms however small it is: below this, as much as its messages one by one
_BATCH_BYTES = 4 << 20
_FINE = b'{"stream":'  # how an answer begins that is no refusal


class Message(Waiting):
    """A message on its way into a stream. `done` is called once it is known what came of it."""

    __slots__ = ("body", "headers", "publisher")

    publisher: Publisher

    def __init__(self, subject: str, body: bytes, headers: bytes, timeout: float = REQUEST_TIMEOUT) -> None:
        super().__init__(subject, timeout)
        self.body = body
        self.headers = headers

    @property
    def size(self) -> int:
        return len(self.body) + len(self.headers)

    def done(self, error: Exception | None) -> None:
        """Stored; or StoreError: refused; Unanswered: not known; NoResponders: no stream takes its subject;
        PermissionDeniedError."""
        raise NotImplementedError

    def answered(self, message: Incoming) -> bool:
        self.publisher.landed(self, _refusal(message, self.subject))
        return True

    def failed(self, error: Exception) -> None:
        self.publisher.landed(self, error)


class _Awaited(Message):
    """A message that somebody waits for."""

    __slots__ = ("future",)

    def __init__(self, subject: str, body: bytes, headers: bytes, timeout: float) -> None:
        super().__init__(subject, body, headers, timeout)
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(self, error: Exception | None) -> None:
        if self.future.done():
            return  # whoever waited has gone
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class _Batch(Waiting):
    """An atomic batch: the answer to its last message is for all of them."""

    __slots__ = ("members",)

    def __init__(self, members: list[Message]) -> None:
        super().__init__(members[-1].subject, 2 * max(member.timeout for member in members))
        self.members = members

    def answered(self, message: Incoming) -> bool:
        error = _refusal(message, self.subject)
        if error is None:
            for member in self.members:
                member.publisher.landed(member, None)
        else:  # nothing of it was stored
            self.members[0].publisher.send_each(self.members)
        return True

    def failed(self, error: Exception) -> None:
        for member in self.members:
            member.failed(error)


class Publisher:
    """Publishes into one stream."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: deque[Message] = deque()  # for the next group commit
        self._flying = 0  # messages without an answer
        self._held = 0  # messages without an answer and in the queue; and their bytes
        self._held_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._pumping = False

    async def store(self, subject: str, body: bytes, headers: bytes, timeout: float = REQUEST_TIMEOUT) -> None:
        """Publish one message, its headers encoded; returns once it is stored.

        Raises:
            StoreError: refused. Unanswered: not known. NoResponders: no stream takes this subject.
            RequestSizeError: it is above what the server takes. PermissionDeniedError: this user may not.
        """
        if not self._connection.is_able:
            timeout = await self._connection.wait_able(timeout)
        message = _Awaited(subject, body, headers, timeout)
        self.publish(message)
        await message.future

    def publish(self, message: Message) -> None:
        """Send a message, now or in the next group commit. See `room`.

        Raises:
            RequestSizeError: it is above what the server takes.
        """
        self._connection.check_encoded(message.size)
        message.publisher = self
        self._held += 1
        self._held_bytes += message.size
        if self._held >= _WINDOW or self._held_bytes >= _WINDOW_BYTES:
            self._room.clear()
        if self._flying and self._connection.writes_always:
            self._queue.append(message)
        else:
            self._flying += 1
            self.send_each((message,))

    async def room(self) -> None:
        """Wait until there is room for another one: whoever has many asks this between them."""
        await self._room.wait()

    def landed(self, message: Message, error: Exception | None) -> None:
        """It is known what came of a message."""
        self._flying -= 1
        self._held -= 1
        self._held_bytes -= message.size
        if self._held < _WINDOW and self._held_bytes < _WINDOW_BYTES:
            self._room.set()
        message.done(error)
        if self._queue:
            self._pump()

    def _pump(self) -> None:
        """Send the next group commit, where none is under way."""
        if self._pumping:
            return  # below us on the stack
        self._pumping = True
        while self._queue and not self._flying:
            group = self._next_group()
            self._flying += len(group)
            if len(group) < _SMALLEST_BATCH:
                self.send_each(group)
            else:
                self._send_batch(group)
        self._pumping = False

    def _next_group(self) -> list[Message]:
        group: list[Message] = []
        size = 0
        while self._queue and len(group) < _LARGEST_BATCH and size < _BATCH_BYTES:
            group.append(self._queue.popleft())
            size += group[-1].size
        return group

    def send_each(self, messages: Iterable[Message]) -> None:
        """Send messages that are under way one by one, each with an answer of its own."""
        connection = self._connection
        for message in messages:
            if connection.is_able:
                reply = connection.expect(message)
                connection.send(message.subject, message.body, message.headers, reply)
            else:
                message.failed(_unable(connection))

    def _send_batch(self, members: list[Message]) -> None:
        connection = self._connection
        if not connection.is_able:
            for member in members:
                member.failed(_unable(connection))
            return
        reply = connection.expect(_Batch(members))
        batch = reply.rpartition(".")[0][-22:] + reply.rpartition(".")[2]
        for number, member in enumerate(members, 1):
            last = number == len(members)
            mark = f"Nats-Batch-Id: {batch}\r\nNats-Batch-Sequence: {number}\r\n"
            mark += "Nats-Batch-Commit: 1\r\n" if last else ""
            connection.send(member.subject, member.body, member.headers + mark.encode(), reply if last else "")


def _refusal(answer: Incoming, subject: str) -> Exception | None:
    """Why a message was not stored; `None` if it was."""
    if answer.data.startswith(_FINE):
        return None
    if status(answer) == "503":
        return NoResponders(subject)
    try:
        checked(answer)
    except StoreError as error:
        return error
    return None


def _unable(connection: Connection) -> Exception:
    if connection.is_closed:
        return ClientClosed("the connection is closed")
    return Unanswered("the connection broke")
