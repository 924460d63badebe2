"""Payloads in the object store. Laid out as any client of NATS expects it, so `nats object ls` and `get` show them.

Written and read with our own messages: nats-py's object store waits for each chunk before it sends the next, and takes
0.4 s to read 16 MiB into a file, five times what a direct read of the chunks takes. Who reads or writes holds a few
chunks at a time; hashing and files are left to a thread.

The chunks of an object have its name in their subject, so that what was left half-way tells whose it was.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from mesh.broker.connection import Connection, NoResponders, Stored, StoreError, Unanswered
from mesh.broker.room import FULL, Level
from mesh.exception import DataLossError, Error, NotFoundError, ResourceExhaustedError
from mesh.payload import CHUNK, Blob, Ceiling, InFile, Way, new_name
from mesh.protocol import format_time
from mesh.topology import Topology

_TOGETHER = 8  # chunks hashed, sent or read at once: more was no faster, with and without fsync
_LARGEST_SHARE = 2  # payloads that the store must have room for at once: one in and one out
_AT_ONCE = 4  # payloads on their way at once; others wait, so that many of them need no more memory than few
_FRESH = 60.0  # seconds for which the size of the store is taken as known
_LAG = 2.0  # seconds by which a replica that answers reads may be behind the one that said what is stored


class Source(Protocol):
    """A payload that is to be stored."""

    def __len__(self) -> int: ...
    def chunks(self) -> Iterator[bytes]: ...


class Blobs:
    """The payloads of an environment.

    Args:
        limit: bytes a payload may have, as this process is set.
    """

    def __init__(self, connection: Connection, topology: Topology, limit: int) -> None:
        self._connection = connection
        self._topology = topology
        self._stream = topology.objects_stream("blobs")
        self._limit = limit
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._ceiling: Ceiling | None = None
        self._read_at = float("-inf")

    # --- limits ------------------------------------------------------------------------------------------------------

    async def ceiling(self) -> Ceiling:
        """What a payload may have at most: the setting, or what fits the store."""
        if self._ceiling is None or time.monotonic() - self._read_at > _FRESH:
            self._ceiling = self._ceiling_of(await self._info())
            self._read_at = time.monotonic()
        return self._ceiling

    def _ceiling_of(self, info: Any) -> Ceiling:
        largest = int(info["config"]["max_bytes"]) // _LARGEST_SHARE
        if 0 < largest < self._limit:
            return Ceiling(
                largest,
                f"half of what the store of payloads has, so that a result has room, too; more: {self._raising}",
            )
        return Ceiling(self._limit, "the setting payload_limit (MESH_PAYLOAD_LIMIT)")

    async def level(self) -> Level:
        """How full the store is."""
        return self._level_of(await self._info())

    def _level_of(self, info: Any) -> Level:
        advice = f"wait until calls have ended, or keep results shorter; more room: {self._raising}"
        used, size = int(info["state"]["bytes"]), max(0, int(info["config"]["max_bytes"]))
        what = f"the store of payloads, {self._stream},"
        return Level(self._stream, what, used, size, advice, refuses="calls with large arguments")

    @property
    def _raising(self) -> str:
        """How an operator gives the store more room."""
        return f"`nats stream edit {self._stream} --max-bytes SIZE` (of a new environment: the setting blobs_size)"

    async def check(self, what: str, size: int) -> None:
        """Refuse arguments that are too large, or that would take the room that results need.

        Raises:
            RequestSizeError, ResourceExhaustedError: the text says what helps.
        """
        info = await self._info()
        self._ceiling_of(info).check(what, size)
        level = self._level_of(info)
        if 0 < FULL * level.size < level.used + size:
            raise ResourceExhaustedError(f"{what} {size:,} bytes; nothing was stored, because {level}: {level.advice}")

    async def _info(self) -> Any:
        return await self._connection.api(f"STREAM.INFO.{self._stream}")

    # --- writing -----------------------------------------------------------------------------------------------------

    async def put(self, key: str, way: Way, source: Source) -> Blob:
        """Store the arguments (`in`) or the result (`out`) of an input; returns once all of it is stored.

        Raises:
            StoreError, Unanswered, NoResponders, PermissionDeniedError: it is not, and what was, is being removed.
        """
        name = new_name(key, way)
        try:
            async with self._turn:
                return await self._put(name, source)
        except BaseException:
            if not self._connection.is_closed:
                self._connection.spawn(self.delete(name))
            raise

    async def _put(self, name: str, source: Source) -> Blob:
        digest = hashlib.sha256()
        count, size = await self._put_chunks(self._chunks(name), source, digest.update)
        info = {
            "name": name,
            "bucket": self._topology.bucket("blobs"),
            "nuid": name,
            "size": size,
            "mtime": format_time(time.time()),
            "chunks": count,
            "digest": f"SHA-256={base64.urlsafe_b64encode(digest.digest()).decode()}",
            "options": {"max_chunk_size": CHUNK},
        }
        await self._connection.store(self._meta(name), json.dumps(info).encode())
        return Blob(name, size, digest.hexdigest())

    async def copy(self, blob: Blob, key: str) -> Blob:
        """Store the arguments of an input as those of another one, too.

        Raises:
            OSError: there is no room for them on this machine, where they pass through.
            What `get` and `put` raise.
        """
        with tempfile.NamedTemporaryFile(buffering=0) as file:
            await self.get(blob, file.write)
            return await self.put(key, "in", InFile(Path(file.name)))

    async def _put_chunks(self, subject: str, source: Source, update: Callable[[bytes], object]) -> tuple[int, int]:
        """Store the chunks in their order, a few under way at a time. Returns how many there are, and their bytes."""
        chunks = source.chunks()

        def some() -> list[bytes]:
            batch = list(itertools.islice(chunks, _TOGETHER))
            for chunk in batch:
                update(chunk)
            return batch

        count, size, last = 0, 0, 0
        sending: deque[asyncio.Task[dict[str, Any]]] = deque()
        try:
            while (batch := await asyncio.to_thread(some)) or sending:
                while sending and (len(sending) >= _TOGETHER or not batch):
                    last = _after(last, await sending.popleft())
                sending.extend(asyncio.create_task(self._connection.store(subject, chunk)) for chunk in batch)
                count, size = count + len(batch), size + sum(map(len, batch))
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        return count, size

    async def delete(self, name: str) -> None:
        """Remove an object, or what there is of it. What cannot be removed now is swept away later."""
        with contextlib.suppress(StoreError, Unanswered, NoResponders, Error):
            for subject in (self._meta(name), self._chunks(name)):
                await self._connection.api(f"STREAM.PURGE.{self._stream}", {"filter": subject})

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get(self, blob: Blob, write: Callable[[bytes], object]) -> None:
        """Give a payload to `write`, which is called in another thread, chunk by chunk. What it was given is the
        payload only if this returns.

        Raises:
            NotFoundError: it is not there, or not all of it.
            DataLossError: it is not what was stored.
            StoreError, Unanswered, NoResponders, PermissionDeniedError: it could not be read.
        """
        digest, size = hashlib.sha256(), 0

        def take(chunks: list[Stored]) -> int:
            came = size + sum(len(chunk.body) for chunk in chunks)
            for chunk in chunks if came <= blob.size else ():
                digest.update(chunk.body)
                write(chunk.body)
            return came

        async with self._turn, contextlib.aclosing(self._pages(self._chunks(blob.name))) as pages:
            async for page in pages:
                size = await asyncio.to_thread(take, page)
                if size >= blob.size:
                    break
        if size < blob.size:
            raise NotFoundError(f"of the payload {blob.name} {size:,} of {blob.size:,} bytes are in {self._stream}")
        if size > blob.size or digest.hexdigest() != blob.digest:
            raise DataLossError(f"the payload {blob.name} in {self._stream} does not match its digest, {blob.digest}")

    async def _pages(self, subject: str) -> AsyncGenerator[list[Stored]]:
        """The chunks of an object, the next ones being read while these are looked at."""

        def read(start: int) -> asyncio.Task[list[Stored]]:
            return asyncio.create_task(self._connection.get_range(self._stream, start, _TOGETHER, subject))

        reading, came = read(1), time.monotonic()
        last = 0
        try:
            while (page := await reading) or time.monotonic() - came < _LAG:
                if page:
                    last, came = page[-1].sequence, time.monotonic()
                else:
                    await asyncio.sleep(_LAG / 20)
                reading = read(last + 1)
                if page:
                    yield page
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    # --- looking -----------------------------------------------------------------------------------------------------

    async def names(self) -> set[str]:
        """Every object, also what is there of those that are not whole. Reads every subject: not for everyday use."""
        chunks = await self._connection.subjects(self._stream, self._chunks(">"))
        metas = await self._connection.subjects(self._stream, self._meta(""))
        return {self._name(subject) for subject in (*chunks, *metas)}

    async def changed(self, name: str) -> str:
        """When something of an object was last stored, by the server's clock; empty if there is nothing of it."""
        found = await self._connection.get_many(self._stream, [self._meta(name), self._chunks(name)])
        return max((stored.time for stored in found), default="")

    # --- subjects ----------------------------------------------------------------------------------------------------

    def _chunks(self, name: str) -> str:
        return self._topology.object_subject("blobs", f"C.{name}")

    def _meta(self, name: str) -> str:
        """Where an object is described; of no name: a filter for all of them."""
        encoded = base64.urlsafe_b64encode(name.encode()).decode() or "*"
        return self._topology.object_subject("blobs", f"M.{encoded}")

    def _name(self, subject: str) -> str:
        kind, _, name = subject.removeprefix(self._topology.object_subject("blobs", "")).partition(".")
        return name if kind == "C" else base64.urlsafe_b64decode(name).decode("utf-8", "replace")


def _after(last: int, ack: dict[str, Any]) -> int:
    """The sequence of a chunk, which must lie behind the one before it."""
    sequence = int(ack["seq"])
    if sequence <= last:
        raise Unanswered("the connection broke, and chunks of a payload were sent in another order")
    return sequence
