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
        return await function.spawn.aio(kind, value)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return await gather(lambda value: self.submit(kind, value), values, at_once=1000)

    async def result(self, handle: Any, timeout: float) -> Any:
        try:
            return await handle.get.aio(timeout=timeout)
        except ValueError as error:
            raise Failed from error

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        return await gather(lambda handle: self.outcome(handle, timeout), handles, at_once=1000)
