"""Calls of several inputs: the record of each, and one end for all inputs of it that have none.

The end is a result like any other, under `<call>.cancelled`: where it comes before an input's own in the bucket of
results, it is what the input came to. So cancelling takes one message however many inputs there are, and readers of
results, who wait on one subscription and read one bucket, need no other place to look at.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection, Stored
from mesh.broker.lines import Incoming
from mesh.exception import Error
from mesh.protocol import SEVERAL, Address, Result, parse_time, token_of
from mesh.records import CallRecord
from mesh.topology import Topology

_PAGE = 1000  # messages read at once
_FRESH = 10.0  # seconds a record is taken as written by somebody who is alive


class Several:
    """The calls of several inputs of an environment."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._bucket = Bucket(connection, topology, "calls")
        self._results = Bucket(connection, topology, "results")
        self._clients = Bucket(connection, topology, "clients")

    # --- records -----------------------------------------------------------------------------------------------------

    async def put(self, record: CallRecord) -> None:
        """Write down what a call is, and how far it got."""
        await self._bucket.put(record.call, record.encode(), ttl=_lifetime(record))

    async def get(self, call: str) -> CallRecord | None:
        """What a call is; `None` where it has one input only, or is not known any more."""
        found = await self._bucket.get(call)
        return None if found is None else CallRecord.decode(found.body)

    async def find(self, call: str) -> CallRecord | None:
        """The same; where its record is gone, as far as an input in the queue tells."""
        known = await self.get(call)
        if known is not None:
            return known
        for stored in await self._connection.get_range(
            self._topology.calls, 1, 1, self._topology.call_filter(call=call)
        ):
            address = self._topology.parse_call(stored.subject)
            kind = stored.headers.get("Mesh-Kind", "")
            if address.index or kind in SEVERAL:
                return CallRecord(call=call, app=address.app, function=address.function, pool=address.pool, kind=kind)
        return None

    async def get_many(self, calls: Collection[str]) -> dict[str, CallRecord]:
        """What there is of these."""
        return _decoded((await self._bucket.get_many(list(calls))).values())

    async def newest(self, count: int, before: int | None = None) -> tuple[list[CallRecord], int]:
        """Records that were written last, newest first, with a sequence to go on from; 0 where there are no more."""
        found = await self._connection.get_newest(self._bucket.stream, count, before)
        return list(_decoded(found).values()), found[-1].sequence if len(found) == count else 0

    async def old(self, age: float, now: float) -> AsyncIterator[tuple[CallRecord, Stored]]:
        """Records that were written longer ago than this, with what is stored; `now` by the server's clock."""
        sequence = 1
        while page := await self._connection.get_range(self._bucket.stream, sequence, _PAGE):
            for stored in page:
                if now - parse_time(stored.time) <= age:
                    return
                for record in _decoded([stored]).values():
                    yield record, stored
            sequence = page[-1].sequence + 1

    async def renew(self, record: CallRecord, stored: Stored) -> None:
        """Keep a record for as long again, unless it was written anew meanwhile."""
        await self._bucket.write(record.call, stored.body, last=stored.sequence, ttl=_lifetime(record))

    # --- their inputs ------------------------------------------------------------------------------------------------

    def inputs(self, record: CallRecord | Address) -> str:
        """The filter of the inputs of a call in the queue."""
        return self._topology.call_filter(app=record.app, function=record.function, pool=record.pool, call=record.call)

    async def queued(self, record: CallRecord) -> int:
        """How many inputs are in the queue, or run."""
        return await self._connection.count(self._topology.calls, self.inputs(record))

    async def inputs_of(self, record: CallRecord) -> int:
        """How many inputs a call has, or had when its submitter went half-way."""
        if record.count is not None:
            return record.count
        last = await self._connection.get(self._topology.calls, self.inputs(record))
        behind = int(last.subject.rpartition(".")[2]) + 1 if last else 0
        return max(record.submitted, behind, await self.ended(record.call))

    async def note_inputs(self, record: CallRecord) -> None:
        """Write down how many inputs a call has by now, before they leave the queue, unless its submitter does."""
        stored = await self._bucket.get(record.call)
        if stored is not None and CallRecord.decode(stored.body).count is None:
            noted = replace(record, submitted=await self.inputs_of(record))
            await self._bucket.write(record.call, noted.encode(), last=stored.sequence, ttl=_lifetime(record))

    async def is_being_submitted(self, record: CallRecord) -> bool:
        """Whether somebody who is alive adds inputs to it."""
        if record.count is not None:
            return False
        fresh = time.time() - record.at < _FRESH  # before its client has said that it waits
        return fresh or await self._clients.get(token_of(record.call)) is not None

    async def ended(self, call: str, until: int = 0) -> int:
        """How many inputs of a call have a result; or had one before a sequence of that bucket, which is its end's."""
        filter = self._results.subject(f"{call}.*")
        found = await self._connection.count(self._results.stream, filter)
        return found - (await self._connection.count(self._results.stream, filter, until) if until else 0)

    async def died(self, record: CallRecord) -> int:
        """How many dead letters are kept of a call."""
        filter = self._topology.dead_filter(app=record.app, function=record.function, call=record.call)
        return await self._connection.count(self._topology.dead, filter)

    async def first_ended(self, call: str) -> int:
        """The sequence of the first of its results."""
        found = await self._connection.get_range(self._results.stream, 1, 1, self._results.subject(f"{call}.*"))
        return found[0].sequence if found else 0

    async def first_queued(self, record: CallRecord | Address) -> Stored | None:
        """The first input that has not ended."""
        found = await self._connection.get_range(self._topology.calls, 1, 1, self.inputs(record))
        return found[0] if found else None

    # --- their end ---------------------------------------------------------------------------------------------------

    async def watch(self, on_end: Callable[[str, Result], None]) -> None:
        """Be told of each call that is cancelled as a whole, once that is stored."""

        def deliver(message: Incoming) -> None:
            _, head, token, _ = message.subject.rsplit(".", 3)
            try:
                result = Result.decode(message.headers, message.data)
            except Error:  # of a newer mesh
                return
            on_end(head + token, result)

        await self._connection.listen(self._topology.ended_filter(), deliver)

    async def drop(self, record: CallRecord) -> int:
        """Take all inputs of a call out of the queue, by their sequences; returns how many. Never a purge: that
        strands other calls of the function."""
        sequence = dropped = 0
        while page := await self._connection.get_range(self._topology.calls, sequence + 1, _PAGE, self.inputs(record)):
            dropped += await self._connection.delete_many(self._topology.calls, [stored.sequence for stored in page])
            sequence = page[-1].sequence
        return dropped


def _lifetime(record: CallRecord) -> float | None:
    """Seconds a record is kept: twice as long as its results; `None`: as long as any."""
    return None if record.result_ttl is None else 2 * record.result_ttl


def _decoded(found: Collection[Stored]) -> dict[str, CallRecord]:
    """By call. What cannot be read is left out."""
    records: dict[str, CallRecord] = {}
    for stored in found:
        try:
            record = CallRecord.decode(stored.body)
        except Error:  # of a newer mesh, or a marker of the plain `nats kv del`
            continue
        records[record.call] = record
    return records
