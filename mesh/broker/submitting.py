"""Submitting inputs: one at a time, or as many as somebody has, each stored once whatever happens on the way."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from dataclasses import replace

from mesh.broker.blobs import Blobs
from mesh.broker.connection import (
    EXHAUSTED,
    WRONG_LAST_SEQUENCE,
    Connection,
    NoResponders,
    StoreError,
    Unanswered,
    translated,
)
from mesh.broker.lines import encode_headers
from mesh.broker.publishing import Message, Publisher
from mesh.broker.room import Room
from mesh.exception import ConnectionError, Error, RequestSizeError
from mesh.payload import Pieces
from mesh.protocol import Input
from mesh.topology import Topology

_ONE_TRY = 5.0  # seconds one publish waits for its answer before it is repeated
_ONE_OF_MANY = 15.0  # the same where thousands are before it: a slow disk answers so many in that time
_PAUSE = 0.05  # seconds before a repetition
_HEADERS = 4096  # bytes kept free of a message's limit for its headers
_STRETCH = 64  # inputs submitted before anything else gets its turn

Tell = Callable[[Input, Exception | None], None]


class Submitter:
    """Stores inputs. A publish without an answer is repeated, marked, because a restarted server forgets which ids it
    knew: the worker then looks for a result before it runs a marked input."""

    def __init__(self, connection: Connection, topology: Topology, blobs: Blobs, timeout: float) -> None:
        self.connection = connection
        self.topology = topology
        self.blobs = blobs
        self.timeout = timeout
        self.room = Room(connection, topology)
        self.publisher = Publisher(connection)

    async def submit(self, input: Input) -> None:
        """Store one input; see `Calls.submit`."""
        await self.room.check(f"submitting {input.address.path}")
        if self.is_large(input):
            input = await self.put_aside(input)
        subject = self.topology.call_subject(input.address)
        until = time.monotonic() + self.timeout
        while True:
            timeout = max(0.1, min(_ONE_TRY, until - time.monotonic()))
            try:
                await self.publisher.store(subject, input.body, self.headers(input), timeout)
                return
            except (StoreError, Unanswered, NoResponders) as error:
                if is_queued(error):
                    return
                if not isinstance(error, Unanswered) or time.monotonic() >= until:
                    raise await self.explained(input, error) from error
            input = replace(input, resubmit=True)
            await asyncio.sleep(_PAUSE)

    def is_large(self, input: Input) -> bool:
        """Whether its arguments are, or may be, too large for a message; then `put_aside` comes first."""
        return input.pieces is not None or len(input.body) > self.connection.inline_limit - _HEADERS

    async def put_aside(self, input: Input) -> Input:
        """The input as it is submitted, with its arguments in the object store, or in one piece after all. A broken
        connection makes their way there begin anew.

        Raises:
            RequestSizeError, ResourceExhaustedError: there is no room for them.
            ConnectionError: it could not be done within the timeout.
        """
        source = input.pieces or Pieces([input.body])
        if len(source) <= self.connection.inline_limit - _HEADERS:
            return replace(input, body=bytes(source), pieces=None)
        what = f"the arguments of this call to {input.address.path} take"
        until = math.inf
        async with translated(f"submitting {input.address.path}"):
            await self.blobs.check(what, len(source))
            while True:
                try:
                    blob = await self.blobs.put(input.address.key, "in", source)
                    return replace(input, body=b"", pieces=None, blob=blob)
                except StoreError as error:
                    if error.code in EXHAUSTED:  # it filled up meanwhile
                        await self.blobs.check(what, len(source))
                    raise
                except Unanswered:
                    until = min(until, time.monotonic() + self.timeout)
                    if time.monotonic() >= until:
                        raise
                await asyncio.sleep(_PAUSE)

    def headers(self, input: Input) -> bytes:
        """The headers of an input's message.

        Raises:
            RequestSizeError: it does not fit into a message.
        """
        values = input.headers()
        values["Nats-Msg-Id"] = input.address.key
        values["Nats-Expected-Last-Subject-Sequence"] = "0"
        headers = encode_headers(values)
        limit = self.connection.inline_limit
        if len(input.body) + len(headers) > limit:
            raise RequestSizeError(
                f"the arguments of this call to {input.address.path} take {len(input.body):,} bytes; the limit is "
                f"{limit:,}: pass a path or a key to where the data is"
            )
        return headers

    async def explained(self, input: Input, error: Exception) -> Exception:
        """What to raise where an input was not accepted."""
        doing = f"submitting {input.address.path}"
        if isinstance(error, Unanswered):
            return ConnectionError(
                f"call {input.address.call} to {input.address.path}: no answer from the server within "
                f"{self.timeout:g} s ({error}); it may have been accepted"
            )
        if isinstance(error, StoreError) and error.code in EXHAUSTED:
            return await self.room.refused(doing, error)
        try:
            async with translated(doing):
                raise error
        except Exception as translation:  # noqa: BLE001 - it is returned
            return translation


def is_queued(error: Exception) -> bool:
    """Whether an input was refused because it is queued already: an earlier try of it arrived."""
    return isinstance(error, StoreError) and error.code == WRONG_LAST_SEQUENCE


class _Submitted(Message):
    """One of many inputs on its way."""

    __slots__ = ("input", "submission", "until")

    def __init__(self, submission: Submission, subject: str, input: Input, headers: bytes, until: float) -> None:
        super().__init__(subject, input.body, headers, _ONE_OF_MANY)
        self.submission = submission
        self.input = input
        self.until = until

    def done(self, error: Exception | None) -> None:
        self.submission.on_done(self, error)


class Submission:
    """Many inputs, read and submitted as there is room for them; see `Calls.submit_many`.

    One task reads and submits. What does not get through comes to `run`, which submits it again or tells why not.
    """

    def __init__(self, submitter: Submitter, tell: Tell | None) -> None:
        self._submitter = submitter
        self._tell = tell
        self._accepted = 0
        self._under_way = 0
        self._troubled: deque[tuple[_Submitted, Exception]] = deque()
        self._smooth = asyncio.Event()  # nothing is troubled
        self._smooth.set()
        self._news = asyncio.Event()
        self._error: Exception | None = None  # what ended it
        self._over = False

    async def run(self, inputs: Iterable[Input] | AsyncIterable[Input]) -> int:
        reading = asyncio.create_task(self._submit_all(inputs))
        reading.add_done_callback(lambda _: self._news.set())
        try:
            while self._under_way or not reading.done():
                await self._news.wait()
                self._news.clear()
                await self._mend()
                if self._error is not None:
                    reading.cancel()
        finally:
            self._over = True
            reading.cancel()
            await asyncio.wait([reading])
        if self._error is not None:
            raise self._error
        reading.result()  # raises what the iterable raised
        return self._accepted

    async def _submit_all(self, inputs: Iterable[Input] | AsyncIterable[Input]) -> None:
        number = 0
        async with contextlib.aclosing(_read(inputs)) as read:
            async for input in read:
                if not number % _STRETCH and not await self._may_go_on(input):
                    return
                number += 1
                if self._submitter.is_large(input):
                    await self._submit_large(input)
                else:
                    self._submit(input, time.monotonic() + self._submitter.timeout)

    async def _submit_large(self, input: Input) -> None:
        """One at a time: what is read before it is stored would have to be kept."""
        try:
            aside = await self._submitter.put_aside(input)
        except Error as error:
            self._refuse(input, error)
        else:
            self._submit(aside, time.monotonic() + self._submitter.timeout)

    async def _may_go_on(self, input: Input) -> bool:
        """Wait until there is room for this input and some more."""
        try:
            await asyncio.sleep(0)
            await self._smooth.wait()
            await self._submitter.publisher.room()
            await self._submitter.room.check(f"submitting {input.address.path}")
        except Error as error:
            self._refuse(input, error)
        except asyncio.CancelledError:
            if self._error is not None:
                self._refuse(input, self._error)
            raise
        return self._error is None

    def _submit(self, input: Input, until: float) -> None:
        subject = self._submitter.topology.call_subject(input.address)
        try:
            message = _Submitted(self, subject, input, self._submitter.headers(input), until)
            self._submitter.publisher.publish(message)
        except RequestSizeError as error:
            self._refuse(input, error)
        else:
            self._under_way += 1

    def on_done(self, message: _Submitted, error: Exception | None) -> None:
        """It is known what came of a try."""
        if error is None or is_queued(error):
            self._under_way -= 1
            self._accepted += 1
            self._call(message.input, None)
        else:
            self._troubled.append((message, error))
            self._smooth.clear()
        if self._troubled or not self._under_way:
            self._news.set()

    async def _mend(self) -> None:
        """See to what did not get through: submit it again, or tell why not."""
        if any(isinstance(error, Unanswered) for _, error in self._troubled):
            await asyncio.sleep(_PAUSE)
        while self._troubled:
            message, error = self._troubled.popleft()
            again = await self._again(message, error)
            self._under_way -= 1
            if again is None:
                self._submit(replace(message.input, resubmit=True), message.until)
            else:
                self._refuse(message.input, again)
        self._smooth.set()

    async def _again(self, message: _Submitted, error: Exception) -> Exception | None:
        """`None` once it can be submitted again; what to tell where it cannot."""
        try:
            if not isinstance(error, Unanswered) or message.until <= time.monotonic():
                raise error
            await self._submitter.connection.wait_able(message.until - time.monotonic())
        except Exception as found:  # noqa: BLE001 - it is told
            return await self._submitter.explained(message.input, found)
        return None

    def _refuse(self, input: Input, error: Exception) -> None:
        if self._error is None and (self._tell is None or not isinstance(error, RequestSizeError)):
            self._error = error
            self._news.set()
        self._call(input, error)

    def _call(self, input: Input, error: Exception | None) -> None:
        if self._tell is not None and not self._over:
            try:
                self._tell(input, error)
            except Exception as raised:  # noqa: BLE001 - it is the submitter's, not that of whoever reads answers
                self._error = self._error or raised
                self._news.set()


async def _read(inputs: Iterable[Input] | AsyncIterable[Input]) -> AsyncGenerator[Input, None]:
    if isinstance(inputs, AsyncIterable):
        async for input in inputs:
            yield input
    else:
        for input in inputs:
            yield input
