"""The slots of capped pools: permission, over the fleet, to run one container. Keys that expire unless renewed.

A slot is `<app>.<function>.<pool>.<number>`, and holds the name of the worker that has it. Deletes go by sequence: a
delete marker would keep the slot taken, and what somebody else has by now has another sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from nats.aio.msg import Msg

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection
from mesh.topology import Topology


class Slots:
    """The slots of an environment, as one worker sees them.

    Args:
        ttl: seconds after which a slot that is not renewed is free; the same for all workers.
    """

    def __init__(self, connection: Connection, topology: Topology, ttl: int) -> None:
        self._connection = connection
        self._topology = topology
        self._bucket = Bucket(connection, topology, "slots")
        self.ttl = ttl
        self._timeout = min(5.0, ttl / 6)

    async def taken(self, pool: str = "*.*.*") -> dict[str, set[int]]:
        """Numbers of the slots that somebody has, by pool (a key of `Topology.pool_key`)."""
        found = defaultdict[str, set[int]](set)
        for key in await self._bucket.keys(f"{pool}.*"):  # four parts: locks have fewer
            name, _, number = key.rpartition(".")
            if number.isdigit():
                found[name].add(int(number))
        return found

    async def mend(self, pool: str) -> None:
        """Make claimable again what somebody deleted by hand."""
        await self._bucket.drop_markers(f"{pool}.*")

    async def claim(self, pool: str, number: int, owner: str) -> int | None:
        """Take a slot. Returns its sequence; `None` if somebody has it."""
        return await self._write(pool, number, owner, 0)

    async def renew(self, pool: str, number: int, owner: str, sequence: int) -> int | None:
        """Keep a slot for another `ttl`. Returns its new sequence; `None` if it is not the owner's any more."""
        renewed = await self._write(pool, number, owner, sequence)
        if renewed is None:
            # It is still the owner's where an earlier renewal was stored, and its answer lost.
            latest = await self._own(pool, number, owner)
            renewed = await self._write(pool, number, owner, latest) if latest else None
        return renewed

    async def release(self, pool: str, number: int, owner: str, sequence: int, backlog: int = 0) -> None:
        """Give a slot up, and say so to whoever waits for one. Harmless where it is not the owner's any more.

        Args:
            sequence: the newest that is known; 0 where the answer to a claim was lost.
            backlog: inputs that are known to wait for it.
        """
        if not (sequence and await self._bucket.delete(sequence)):
            latest = await self._own(pool, number, owner)
            if latest:
                await self._bucket.delete(latest)
        await self._connection.publish(self._topology.freed_subject(pool), b"%d" % backlog)

    async def listen(self, on_freed: Callable[[str, int], None]) -> None:
        """Be told of each slot that is given up: its pool, and the backlog. What expires is told by nobody, and core
        messages get lost: look again now and then."""
        prefix = self._topology.freed_subject("")

        async def deliver(message: Msg) -> None:
            on_freed(message.subject.removeprefix(prefix), int(message.data) if message.data.isdigit() else 0)

        await self._connection.subscribe(self._topology.freed_subject(">"), deliver)

    async def _write(self, pool: str, number: int, owner: str, last: int) -> int | None:
        key = f"{pool}.{number}"
        return await self._bucket.write(key, owner.encode(), last=last, ttl=self.ttl, timeout=self._timeout)

    async def _own(self, pool: str, number: int, owner: str) -> int:
        """The sequence of a slot if it is the owner's, else 0."""
        found = await self._bucket.get(f"{pool}.{number}")
        return found.sequence if found is not None and found.body == owner.encode() else 0
