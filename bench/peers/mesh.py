"""mesh itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh import client
from peers.mesh_app import app
from peers.mesh_app import work as function
from peers.peer import Failed, Peer, gather


class Client(Peer):
    async def open(self) -> None:
        await app.deploy.aio()

    async def close(self) -> None:
        await client.close()

    async def submit(self, kind: str, value: Any) -> Any:
        return await function.spawn.aio(kind, value), 0

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        call = await function.spawn_map.aio([kind] * len(values), values)
        return [(call, index) for index in range(len(values))]

    async def result(self, handle: Any, timeout: float) -> Any:
        call, index = handle
        try:
            return await call.get.aio(timeout=timeout, index=index)
        except ValueError as error:
            raise Failed from error

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        return await gather(lambda handle: self.outcome(handle, timeout), handles, at_once=1000)

    async def run_many(self, kind: str, values: Sequence[Any], timeout: float) -> list[Any]:
        """By single calls: results of one call are found by its record and the index, which costs a little more."""
        handles = await gather(lambda value: self.submit(kind, value), values, at_once=1000)
        return await self.results(handles, timeout)
