"""Names of hosts that lead to web functions: keys in the bucket of functions, so that a deploy takes them with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection, Headers
from mesh.exception import Error
from mesh.protocol import unescape
from mesh.records import HostRecord
from mesh.topology import Topology


class Hosts:
    """The names of hosts of an environment."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._topology = topology
        self._bucket = Bucket(connection, topology, "functions")

    async def read(self, hosts: Iterable[str]) -> dict[str, tuple[HostRecord, int]]:
        """What is recorded of these names, with the sequences of the records."""
        return await self._read([self._topology.host_key(host) for host in hosts])

    async def all(self) -> dict[str, HostRecord]:
        """What is recorded of all of them."""
        keys = await self._bucket.keys(self._topology.host_key("*"))
        return {host: record for host, (record, _) in (await self._read(keys)).items()}

    async def _read(self, keys: list[str]) -> dict[str, tuple[HostRecord, int]]:
        found = {}
        for key, stored in (await self._bucket.get_many(keys)).items() if keys else ():
            try:
                found[unescape(key.rpartition(".")[2])] = (HostRecord.decode(stored.body), stored.sequence)
            except Error:  # a record of a newer mesh
                continue
        return found

    def messages(self, wanted: Mapping[str, tuple[HostRecord, int]]) -> list[tuple[str, bytes, Headers]]:
        """What writes these records, if each follows the sequence that it is given with; for a deploy to publish."""
        return [
            (
                self._bucket.subject(self._topology.host_key(host)),
                record.encode(),
                {"Nats-Expected-Last-Subject-Sequence": str(last)},
            )
            for host, (record, last) in wanted.items()
        ]

    async def erase(self, app: str) -> None:
        """Forget those of an app."""
        for record, sequence in (await self._read(await self._bucket.keys(self._topology.host_key("*")))).values():
            if record.app == app:
                await self._bucket.delete(sequence)
