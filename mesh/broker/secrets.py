"""Secrets as they are stored, sealed; and the public key that they are sealed to."""

from __future__ import annotations

from collections.abc import Collection

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection, translated
from mesh.exception import Error
from mesh.records import SecretRecord
from mesh.secretref import SecretRef
from mesh.topology import Topology

_PUBLIC_KEY = "secret_key"  # in `mesh_meta`


class Secrets:
    """The secrets of an environment. Nothing here can read them."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._topology = topology
        self._bucket = Bucket(connection, topology, "secrets")
        self._meta = Bucket(connection, topology, "meta")

    async def public_key(self) -> tuple[str, int]:
        """What to seal to, empty if there is none; and its sequence."""
        async with translated("reading the public key of secrets"):
            found = await self._meta.get(_PUBLIC_KEY)
        return ("", 0) if found is None else (found.body.decode(), found.sequence)

    async def publish_key(self, public: str, last: int) -> bool:
        """Have values sealed to this key from now on; false if somebody has changed it since sequence `last`."""
        async with translated("writing the public key of secrets"):
            return await self._meta.write(_PUBLIC_KEY, public.encode(), last=last) is not None

    def key(self, ref: SecretRef) -> str:
        """Where a secret is stored."""
        return self._topology.secret_key(ref.name, ref.digest)

    async def get(self, key: str) -> tuple[SecretRecord | None, int]:
        """A secret, and its sequence (0 if there is none)."""
        async with translated("reading a secret"):
            found = await self._bucket.get(key)
        return (None, 0) if found is None else (SecretRecord.decode(found.body), found.sequence)

    async def get_many(self, refs: Collection[SecretRef]) -> dict[str, SecretRecord]:
        """What there is of these, by where it is stored."""
        async with translated("reading secrets"):
            found = await self._bucket.get_many(sorted({self.key(ref) for ref in refs}))
        return {key: SecretRecord.decode(stored.body) for key, stored in found.items()}

    async def put(self, key: str, record: SecretRecord, last: int | None = None) -> bool:
        """Store a secret; false if what is there is not that of sequence `last`, where one is given."""
        async with translated("storing a secret"):
            if last is None:
                await self._bucket.put(key, record.encode())
                return True
            return await self._bucket.write(key, record.encode(), last=last) is not None

    async def delete(self, sequence: int) -> bool:
        """Forget one; false if it was gone, or replaced."""
        async with translated("deleting a secret"):
            return await self._bucket.delete(sequence)

    async def keys(self) -> list[str]:
        """Where all of them are stored, those included that came with source."""
        async with translated("listing secrets"):
            return await self._bucket.keys()

    async def named(self) -> list[SecretRecord]:
        """Those with a name, sorted by it. What cannot be read is left out."""
        async with translated("listing secrets"):
            found = await self._bucket.all("named.*")
        records = []
        for stored in found.values():
            try:
                records.append(SecretRecord.decode(stored.body))
            except Error:
                continue
        return sorted(records, key=lambda record: record.name)
