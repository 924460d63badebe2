"""Deployed code on this machine, and files of images: fetched once, checked, unpacked, and shared by all containers."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from mesh.broker import Broker, translated
from mesh.bundle import Bundle
from mesh.exception import DataLossError
from mesh.records import Code, FunctionRecord


class CodeCache:
    """Source bundles under `<cache>/code/<digest>`, and by-value code in memory only while a container starts."""

    def __init__(self, broker: Broker, directory: Path) -> None:
        self._broker = broker
        self._directory = directory / "code"
        self._locks: dict[str, asyncio.Lock] = {}

    async def prepare(self, record: FunctionRecord) -> tuple[Code, Path | None]:
        """What a container needs to find the function: where its code is, and the bundle's directory.

        Raises:
            NotFoundError, DataLossError, ConnectionError: the code cannot be had.
        """
        code = record.code
        if code.digest and not code.pickled:
            pickled = await self._fetch(record.app, code.digest)
            if hashlib.sha256(pickled).hexdigest() != code.digest:
                raise DataLossError(f"the code of {record.spec.name!r} is damaged in the store; deploy the app again")
            code = dataclasses.replace(code, pickled=pickled)
        return code, await self._bundle(record.app, record.bundle, source=True) if record.bundle else None

    async def files(self, app: str, digests: Sequence[str]) -> list[Path]:
        """The directories of files that images of an app bring.

        Raises:
            NotFoundError, DataLossError, ConnectionError: they cannot be had.
        """
        return [await self._bundle(app, digest, source=False) for digest in digests]

    async def _bundle(self, app: str, digest: str, *, source: bool) -> Path:
        target = self._directory / digest
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if not target.is_dir():
                bundle = Bundle.unpack(await self._fetch(app, digest), digest)
                self._directory.mkdir(parents=True, exist_ok=True)
                await asyncio.to_thread(bundle.write, target, source=source)
        return target

    async def _fetch(self, app: str, digest: str) -> bytes:
        store = self._broker.registry.code
        async with translated(f"fetching the code {digest[:12]}"):
            return await store.get(store.key(app, digest))
