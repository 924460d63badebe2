"""A KV bucket as the mesh uses one: reads that ask the store, writes that say what they expect, deletes by sequence."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.broker.connection import REQUEST_TIMEOUT, WRONG_LAST_SEQUENCE, Connection, Headers, Stored, StoreError
from mesh.topology import Topology


class Bucket:
    """One KV bucket of an environment. Keys are what `nats kv ls` shows."""

    def __init__(self, connection: Connection, topology: Topology, name: str) -> None:
        self._connection = connection
        self.stream = topology.bucket_stream(name)
        self._prefix = topology.key_subject(name, "")

    def subject(self, key: str) -> str:
        return self._prefix + key

    def key(self, stored: Stored) -> str:
        """The key of what was read."""
        return stored.subject.removeprefix(self._prefix)

    async def get(self, key: str) -> Stored | None:
        found = await self._connection.get(self.stream, self.subject(key))
        return None if found is None or _deleted(found) else found

    async def get_many(self, keys: Sequence[str]) -> dict[str, Stored]:
        """What there is of these keys. A key may be a filter such as `app.*`."""
        found = await self._connection.get_many(self.stream, [self.subject(key) for key in keys])
        return {self.key(stored): stored for stored in found if not _deleted(stored)}

    async def keys(self, filter: str = ">") -> list[str]:
        """The keys that match, in no order. Asks for subjects by pages, since a wildcard read ends at 1,024."""
        subjects = await self._connection.subjects(self.stream, self.subject(filter))
        return [subject.removeprefix(self._prefix) for subject in subjects]

    async def all(self, filter: str = ">") -> dict[str, Stored]:
        """Every entry that matches, however many."""
        return await self.get_many(await self.keys(filter))

    async def put(self, key: str, body: bytes, *, ttl: float | None = None) -> int:
        """Write, whatever stands there. Returns the entry's sequence."""
        return int((await self._connection.store(self.subject(key), body, condition(None, ttl)))["seq"])

    async def write(
        self,
        key: str,
        body: bytes,
        *,
        last: int,
        ttl: float | None = None,
        headers: Headers | None = None,
        timeout: float = REQUEST_TIMEOUT,
    ) -> int | None:
        """Write if the key's newest sequence is `last` (0: there is none). Returns the new one; `None` if it is not."""
        try:
            ack = await self._connection.store(
                self.subject(key), body, {**(headers or {}), **condition(last, ttl)}, timeout=timeout
            )
        except StoreError as error:
            if error.code == WRONG_LAST_SEQUENCE:
                return None
            raise
        return int(ack["seq"])

    async def delete(self, sequence: int) -> bool:
        """Delete one entry; false if it was gone, or replaced."""
        return await self._connection.delete(self.stream, sequence)

    async def drop_markers(self, filter: str) -> None:
        """Delete what the plain `nats kv del` leaves where an entry was, and which keeps its key from being created."""
        for stored in await self._connection.get_many(self.stream, [self.subject(filter)]):
            if _deleted(stored):
                await self.delete(stored.sequence)

    async def discard(self, sequence: int) -> None:
        """Delete one entry without an answer: for ends, when nobody reads one any more."""
        await self._connection.publish(
            f"$JS.API.STREAM.MSG.DELETE.{self.stream}", b'{"seq": %d, "no_erase": true}' % sequence
        )

    async def purge(self, filter: str) -> None:
        """Delete all entries that match, with their history."""
        await self._connection.api(f"STREAM.PURGE.{self.stream}", {"filter": self.subject(filter)})


def condition(last: int | None, ttl: float | None) -> Headers:
    """Headers of a write that is made only where the key's newest sequence is `last`, and that is kept for `ttl`."""
    headers: Headers = {}
    if last is not None:
        headers["Nats-Expected-Last-Subject-Sequence"] = str(last)
    if ttl is not None:
        headers["Nats-TTL"] = f"{max(1, round(ttl))}s"
    return headers


def _deleted(stored: Stored) -> bool:
    """A marker that the plain `nats kv del` leaves behind."""
    return stored.headers.get("KV-Operation") in ("DEL", "PURGE")
