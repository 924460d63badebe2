"""Submitting calls and finding them again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import replace

from mesh.broker.connection import (
    EXHAUSTED,
    WRONG_LAST_SEQUENCE,
    Connection,
    Stored,
    StoreError,
    Unanswered,
    translated,
)
from mesh.broker.room import Room
from mesh.exception import ConnectionError, InvalidError, RequestSizeError, VersionError
from mesh.protocol import Address, Input, PoolKey, parse_time, token_of
from mesh.topology import Topology

_ONE_TRY = 5.0  # seconds one publish waits for its answer before it is repeated
_LISTED = 256  # messages in one read of a listing


class Calls:
    """The stream of inputs, as clients see it."""

    def __init__(self, connection: Connection, topology: Topology, submit_timeout: float) -> None:
        self._connection = connection
        self._topology = topology
        self._submit_timeout = submit_timeout
        self._room = Room(connection, topology)

    async def submit(self, input: Input) -> None:
        """Store one input; returns once the server has it.

        A publish without an answer is repeated, marked, because a restarted server forgets which ids it knew: the
        worker then looks for a result before it runs a marked input.

        Raises:
            ResourceExhaustedError: the queue, the results or the account are 90 % full; nothing was stored.
            RequestSizeError: it is too large for a message.
            ConnectionError: no answer within `submit_timeout`; it may have been accepted.
        """
        self._check_size(input)
        subject = self._topology.call_subject(input.address)
        deadline = time.monotonic() + self._submit_timeout
        doing = f"submitting {input.address.path}"
        async with translated(doing):
            await self._room.check(doing)
            while True:
                try:
                    await self._publish(subject, input, min(_ONE_TRY, deadline - time.monotonic()))
                    return
                except StoreError as error:
                    if error.code in EXHAUSTED:
                        raise await self._room.refused(doing, error) from error
                    raise
                except Unanswered as error:
                    if time.monotonic() >= deadline:
                        raise ConnectionError(
                            f"call {input.address.call} to {input.address.path}: no answer from the server within "
                            f"{self._submit_timeout:g} s ({error}); it may have been accepted"
                        ) from error
                    input = replace(input, resubmit=True)
                    await asyncio.sleep(0.05)

    async def _publish(self, subject: str, input: Input, timeout: float) -> None:
        headers = input.headers()
        headers["Nats-Msg-Id"] = input.address.key
        headers["Nats-Expected-Last-Subject-Sequence"] = "0"
        try:
            await self._connection.store(subject, input.body, headers, timeout=max(timeout, 0.1))
        except StoreError as error:
            if error.code != WRONG_LAST_SEQUENCE:  # which says that it is queued already: an earlier try arrived
                raise

    def _check_size(self, input: Input) -> None:
        limit = self._connection.inline_limit
        size = len(input.body) + sum(len(k) + len(v) + 4 for k, v in input.headers().items())
        if size > limit:
            raise RequestSizeError(
                f"the arguments of this call to {input.address.path} take {len(input.body):,} bytes; the limit is "
                f"{limit:,}: pass a path or a key to where the data is"
            )

    async def find(self, call: str, index: int = 0, *, at: Address | None = None) -> Stored | None:
        """The message of an input that has not ended; `None` if there is none. Faster where its address is known."""
        stream = self._topology.calls
        if at is not None:
            return await self._connection.get(stream, self._topology.call_subject(at))
        found = await self._connection.get_many(stream, [self._topology.call_filter(call=call, index=str(index))])
        return found[0] if found else None

    async def of_call(self, call: str) -> list[Address]:
        """The inputs of a call that have not ended, in their order."""
        subjects = await self._connection.subjects(self._topology.calls, self._topology.call_filter(call=call))
        addresses = [address for subject in subjects if (address := self._parsed(subject)) is not None]
        return sorted(addresses, key=lambda address: address.index)

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

    async def called(self) -> set[tuple[str, str, str]]:
        """App, function or method, and pool of everything queued. Reads every subject: not for everyday use."""
        subjects = await self._connection.subjects(self._topology.calls, self._topology.call_filter())
        return {self._topology.parse_called(subject) for subject in subjects}

    async def awaited_by(self, tokens: Collection[str]) -> dict[Address, float]:
        """Inputs that end with these clients, who wait for them, with the times they were stored, in seconds since
        1970 by the server's clock. Reads every subject: not for everyday use."""
        queued = await self._connection.subjects(self._topology.calls, self._topology.call_filter())
        theirs = [subject for subject in queued if token_of(subject.rpartition(".")[0]) in tokens]
        found = await self._connection.get_many(self._topology.calls, theirs)
        return {address: parse_time(s.time) for s in found if (address := self._awaited(s)) is not None}

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
