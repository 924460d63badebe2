"""Submitting calls and finding them again."""

from __future__ import annotations

from collections.abc import AsyncIterable, Collection, Iterable

from mesh.broker.blobs import Blobs
from mesh.broker.connection import Connection, Stored
from mesh.broker.submitting import Submission, Submitter, Tell
from mesh.exception import InvalidError, VersionError
from mesh.protocol import Address, Input, PoolKey, parse_time, token_of
from mesh.topology import Topology

_LISTED = 256  # messages in one read of a listing


class Calls:
    """The stream of inputs, as clients see it."""

    def __init__(self, connection: Connection, topology: Topology, blobs: Blobs, submit_timeout: float) -> None:
        self._connection = connection
        self._topology = topology
        self._submitter = Submitter(connection, topology, blobs, submit_timeout)

    async def submit(self, input: Input) -> None:
        """Store one input; returns once the server has it.

        A publish without an answer is repeated, marked, because a restarted server forgets which ids it knew: the
        worker then looks for a result before it runs a marked input.

        Raises:
            ResourceExhaustedError: the queue, the results or the account are 90 % full; nothing was stored.
            RequestSizeError: its arguments are larger than a payload may be.
            ConnectionError: no answer within `submit_timeout`; it may have been accepted.
        """
        await self._submitter.submit(input)

    async def submit_many(self, inputs: Iterable[Input] | AsyncIterable[Input], tell: Tell | None = None) -> int:
        """Store many inputs, some thousands of them under way at once; returns how many were accepted.

        Inputs are read as there is room for them, so memory stays flat however many there are, and the iterable may be
        endless; one that blocks belongs in a thread, behind an asynchronous iterator. They need not be of one call.

        Args:
            tell: called for each input that was read, once, in no order: with `None` when the server has it, else with
                what `submit` would have raised. Without it the first such error ends everything.

        What concerns one input only, such as its size, goes to `tell` alone. Everything else, such as a full queue,
        also ends the submission: no more is read, what is under way is waited for and told, and then it is raised.
        What was not accepted can be submitted again, marked `resubmit` where `tell` was given a `ConnectionError`.

        Raises:
            As `submit`; and what the iterable raises. If cancelled, what was read may still be accepted.
        """
        return await Submission(self._submitter, tell).run(inputs)

    async def find(self, call: str, index: int = 0, *, at: Address | None = None) -> Stored | None:
        """The message of an input that has not ended; `None` if there is none. Faster where its address is known."""
        stream = self._topology.calls
        if at is not None:
            return await self._connection.get(stream, self._topology.call_subject(at))
        found = await self._connection.get_many(stream, [self._topology.call_filter(call=call, index=str(index))])
        return found[0] if found else None

    async def of_app(self, app: str, count: int = _LISTED) -> list[Stored]:
        """Up to `count` inputs of an app that have not ended, the oldest first."""
        return await self._connection.get_range(self._topology.calls, 1, count, self._topology.call_filter(app=app))

    async def of_function(self, app: str, function: str, pool: str, count: int = _LISTED) -> list[Stored]:
        """The same, of one pool of one function or method."""
        filter = self._topology.call_filter(app=app, function=function, pool=pool)
        return await self._connection.get_range(self._topology.calls, 1, count, filter)

    async def in_pool(self, pool: PoolKey, methods: Collection[str]) -> bool:
        """Whether any input of a pool is queued, be it of a function or of a method of a class."""
        for filter in self._topology.filters(pool, methods):
            if await self._connection.get_range(self._topology.calls, 1, 1, filter):
                return True
        return False

    async def count(self, filter: str = "") -> int:
        """How many inputs have not ended, or those that match."""
        return await self._connection.count(self._topology.calls, filter or self._topology.call_filter())

    async def called(self) -> set[tuple[str, str, str]]:
        """App, function or method, and pool of everything queued. Reads every subject: not for everyday use."""
        pages = self._connection.subject_pages(self._topology.calls, self._topology.call_filter())
        return {self._topology.parse_called(subject) async for page in pages for subject in page}

    async def awaited_by(self, tokens: Collection[str]) -> dict[str, float]:
        """Calls that end with these clients, who wait for them, with the time that one input of each was stored, in
        seconds since 1970 by the server's clock. Reads every subject: not for everyday use."""
        theirs: dict[str, str] = {}  # one subject for each call: all of a call are awaited, or none
        async for page in self._connection.subject_pages(self._topology.calls, self._topology.call_filter()):
            for subject in page:
                if token_of(call := subject.rsplit(".", 2)[1]) in tokens:
                    theirs[call] = subject
        found = await self._connection.get_many(self._topology.calls, list(theirs.values()))
        return {address.call: parse_time(s.time) for s in found if (address := self._awaited(s)) is not None}

    def _awaited(self, stored: Stored) -> Address | None:
        try:
            address = self._topology.parse_call(stored.subject)
            return address if Input.decode(address, stored.headers, b"").awaited else None
        except (InvalidError, VersionError):
            return None

    async def newest(self, count: int, before: int | None = None, filter: str = "") -> list[Stored]:
        """The newest inputs that have not ended, newest first; `before` a sequence, to go on from there."""
        return await self._connection.get_newest(self._topology.calls, count, before, filter or ">")

    async def delete(self, sequence: int) -> bool:
        """Take one input out of the queue; false if it was gone. Never a purge: that strands other calls."""
        return await self._connection.delete(self._topology.calls, sequence)

    async def replicas(self) -> int:
        """Copies of the queue that the server keeps."""
        info = await self._connection.api(f"STREAM.INFO.{self._topology.calls}")
        return int(info["config"]["num_replicas"])

    def address(self, stored: Stored) -> Address | None:
        """Whose input a message is; `None` if it is nobody's."""
        return self._parsed(stored.subject)

    def _parsed(self, subject: str) -> Address | None:
        try:
            return self._topology.parse_call(subject)
        except InvalidError:
            return None
