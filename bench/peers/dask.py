"""Dask: a scheduler that keeps everything in its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from distributed import Client as DaskClient

from peers.peer import URL, Failed, Peer
from peers.work import work


class Client(Peer):
    client: DaskClient

    async def open(self) -> None:
        self.client = await DaskClient(URL, asynchronous=True)

    async def close(self) -> None:
        await self.client.close()

    async def submit(self, kind: str, value: Any) -> Any:
        return self.client.submit(work, kind, value, pure=False)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return self.client.map(work, [kind] * len(values), values, pure=False, batch_size=1000)

    async def result(self, handle: Any, timeout: float) -> Any:
        try:
            return await asyncio.wait_for(handle.result(), timeout)
        except ValueError as error:
            raise Failed from error

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        await asyncio.wait_for(asyncio.gather(*(handle._state.wait() for handle in handles)), timeout)
        found = await self.client.gather(list(handles), errors="skip")
        if len(found) == len(handles):
            return found
        return [await self.outcome(handle, timeout) for handle in handles]
