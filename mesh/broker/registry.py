"""What is deployed: function records, the heads of apps, and their code."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import nats.js.errors
from nats.aio.msg import Msg

from mesh.background import Background
from mesh.broker.bucket import Bucket
from mesh.broker.connection import (
    WRONG_LAST_SEQUENCE,
    Connection,
    Headers,
    StoreError,
    translated,
)
from mesh.exception import ConflictError, Error, NotFoundError
from mesh.protocol import PoolKey, escape, unescape
from mesh.records import AppHead, FunctionRecord, verify
from mesh.topology import Topology

MAX_FUNCTIONS = 999  # of one app: they and the head are one atomic batch
_INLINE_CODE = 512 << 10  # bytes; larger code is an object
_FRESH = 30.0  # seconds a caller trusts a record it has read, before it reads it again in the background
_STALE = 300.0  # seconds after which it waits for that


class Registry:
    """Deployed functions and apps of an environment."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._bucket = Bucket(connection, topology, "functions")
        self._known: dict[tuple[str, str], tuple[FunctionRecord, float]] = {}
        self._learning: dict[tuple[str, str], asyncio.Future[FunctionRecord | None]] = {}
        self._background = Background()
        self.code = CodeStore(connection, topology)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def function(self, app: str, function: str) -> FunctionRecord | None:
        """The newest record of a function, removed or not; `None` if there never was one."""
        found = await self._bucket.get(self._topology.function_key(app, function))
        return None if found is None else verify(FunctionRecord.decode(found.body))

    async def known(self, app: str, function: str, *, anew: bool = False) -> FunctionRecord | None:
        """`function`, from memory where that is fresh enough (or read `anew`): what a caller needs to submit."""
        record, read = self._known.get((app, function), (None, 0.0))
        age = time.monotonic() - read
        if anew:
            return await self._learn(app, function)
        if record is None or age > _STALE:
            return await self._learn_together(app, function)
        if age > _FRESH:
            self._known[app, function] = (record, time.monotonic() - _FRESH / 2)  # one re-read at a time
            self._background.spawn(self._learn_quietly(app, function))
        return record

    async def _learn_together(self, app: str, function: str) -> FunctionRecord | None:
        """Read it once for all who ask meanwhile: a thousand calls may be the first ones."""
        key = app, function
        if key not in self._learning:
            self._learning[key] = reading = asyncio.ensure_future(self._learn(app, function))
            reading.add_done_callback(lambda _: self._learning.pop(key, None))
        return await asyncio.shield(self._learning[key])

    async def _learn(self, app: str, function: str) -> FunctionRecord | None:
        async with translated(f"looking up function {function!r} of app {app!r}"):
            record = await self.function(app, function)
        if record is None:
            self._known.pop((app, function), None)
        else:
            self._known[app, function] = (record, time.monotonic())
        return record

    async def _learn_quietly(self, app: str, function: str) -> None:
        try:
            await self._learn(app, function)
        except Error:
            pass  # the record at hand goes on serving; the next use tries again

    async def functions(self, app: str, functions: Iterable[str]) -> dict[str, FunctionRecord]:
        """The records of these functions of an app, by name. What cannot be read is left out."""
        found = await self._read({(app, name) for name in functions})
        return {name: record for (_, name), record in found.items()}

    async def _read(self, wanted: Collection[tuple[str, str]]) -> dict[tuple[str, str], FunctionRecord]:
        """Records by app and function."""
        found = await self._bucket.get_many([self._topology.function_key(*path) for path in wanted])
        records = {}
        for key, stored in found.items():
            try:
                records[_path(key)] = verify(FunctionRecord.decode(stored.body))
            except Error:
                continue
        return records

    async def recorded(self, app: str) -> list[str]:
        """Names of all functions of an app that have a record, also of those that were removed."""
        return [_path(key)[1] for key in await self._bucket.keys(f"{escape(app)}.*")]

    async def all_recorded(self) -> dict[str, list[str]]:
        """The same of every app, in one request for thousands of functions."""
        recorded: dict[str, list[str]] = {}
        for app, name in map(_path, await self._bucket.keys("*.*")):
            recorded.setdefault(app, []).append(name)
        return recorded

    async def methods(self, pools: Iterable[PoolKey]) -> dict[PoolKey, tuple[str, ...]]:
        """Those of these pools whose function, or class, is recorded; with the methods of the class."""
        paths = {pool: (pool.app, pool.function) for pool in pools}
        records = await self._read(set(paths.values()))
        return {pool: tuple(records[path].spec.methods or ()) for pool, path in paths.items() if path in records}

    async def head(self, app: str) -> tuple[AppHead | None, int]:
        """The newest deployment of an app, and its sequence (0 if there is none)."""
        found = await self._bucket.get(self._topology.head_key(app))
        return (None, 0) if found is None else (AppHead.decode(found.body), found.sequence)

    async def heads(self) -> dict[str, AppHead]:
        """The newest deployment of every app. Unreadable ones (of a newer mesh) are left out."""
        heads: dict[str, AppHead] = {}
        for key, stored in (await self._bucket.all("*")).items():
            try:
                heads[unescape(key)] = AppHead.decode(stored.body)
            except Error:
                continue
        return heads

    async def history(self, app: str) -> list[AppHead]:
        """The deployments of an app that are remembered, newest first."""
        subject = self._bucket.subject(self._topology.head_key(app))
        found = await self._connection.get_range(self._bucket.stream, 1, 1000, subject)
        return [AppHead.decode(stored.body) for stored in reversed(found)]

    async def watch(self, on_head: Callable[[AppHead], None], on_unreadable: Callable[[str, Exception], None]) -> None:
        """Be told of each new head once it is stored. Pushes can get lost: read `heads` again now and then."""

        async def deliver(message: Msg) -> None:
            try:
                head = AppHead.decode(message.data)
            except Exception as error:  # noqa: BLE001 - a record of a newer mesh, or none at all
                on_unreadable(message.subject, error)
            else:
                on_head(head)

        await self._connection.subscribe(self._topology.deployed_subject(), deliver)

    # --- writing -----------------------------------------------------------------------------------------------------

    async def publish(
        self,
        head: AppHead,
        records: Sequence[FunctionRecord],
        expected: int,
        beside: Sequence[tuple[str, bytes, Headers]] = (),
    ) -> None:
        """Write a deployment: its records, then its head, all or nothing.

        Args:
            expected: sequence of the head this one follows, 0 for none. beside: what is written with them.

        Raises:
            ConflictError: another deployment of the app came in between; nothing was written.
        """
        messages: list[tuple[str, bytes, Headers]] = [
            (self._bucket.subject(self._topology.function_key(r.app, r.spec.name)), r.encode(), {}) for r in records
        ]
        messages += beside
        condition = {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        subject = self._bucket.subject(self._topology.head_key(head.app))
        async with translated(f"deploying {head.name}"):
            try:
                if messages:
                    await self._connection.store_batch([*messages, (subject, head.encode(), condition)])
                else:
                    await self._connection.store(subject, head.encode(), condition)
            except StoreError as error:
                if error.code != WRONG_LAST_SEQUENCE:
                    raise
                raise ConflictError(
                    f"app {head.name!r} was deployed by somebody else at the same moment; nothing of this deployment "
                    "was kept: look at theirs, and deploy again"
                ) from error

    async def erase(self, app: str) -> None:
        """Forget an app, with its history. Only for apps of a single run, and stopped ones long after."""
        await self._bucket.purge(f"{escape(app)}.*")
        await self._bucket.purge(escape(app))

    async def forget(self, app: str, function: str) -> None:
        """Forget a function that was removed."""
        await self._bucket.purge(self._topology.function_key(app, function))


def _path(key: str) -> tuple[str, str]:
    """App and function of a record's key."""
    app, _, function = key.partition(".")
    return unescape(app), unescape(function)


class CodeStore:
    """Source bundles and by-value code under their digests: small ones in a KV bucket, large ones as objects.

    What belongs to an app of a single run is stored under that app's name, so that it can go with it.
    """

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._bucket = Bucket(connection, topology, "code")
        self._objects = topology.bucket("code")

    @staticmethod
    def key(app: str, digest: str) -> str:
        return f"{app}.{digest}" if app.startswith("ap-") else digest

    async def put(self, key: str, data: bytes) -> None:
        """Store code, unless it is there."""
        if await self._bucket.get(key) is not None:
            return
        if len(data) <= _INLINE_CODE:
            await self._bucket.put(key, data)
            return
        store = await self._connection.objects(self._objects)
        await store.put(key, io.BytesIO(data))
        await self._bucket.put(key, b"")  # says that it is an object

    async def get(self, key: str) -> bytes:
        """Stored code. Whoever uses it checks that it matches its digest.

        Raises:
            NotFoundError: it is not stored.
        """
        found = await self._bucket.get(key)
        if found is not None and found.body:
            return found.body
        buffer = io.BytesIO()
        try:
            if found is not None:
                store = await self._connection.objects(self._objects)
                await store.get(key, writeinto=buffer)
                return buffer.getvalue()
        except nats.js.errors.NotFoundError:
            pass
        raise NotFoundError(f"the code {key} is not in the code store; deploy the app again")

    async def erase(self, app: str) -> None:
        """Forget the code that belongs to an app of a single run."""
        for key in await self._bucket.keys(f"{app}.*"):
            found = await self._bucket.get(key)
            if found is not None and not found.body:
                store = await self._connection.objects(self._objects)
                await store.delete(key)
        await self._bucket.purge(f"{app}.*")
