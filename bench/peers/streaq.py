"""streaq on Redis streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streaq import Worker

from peers.peer import LEASE, URL, Failed, Peer, gather
from peers.work import work_async

worker = Worker(
    redis_url=URL or "redis://127.0.0.1", concurrency=10, idle_timeout=LEASE or 60, anyio_kwargs={"use_uvloop": True}
)


@worker.task(ttl=3600)
async def work(kind: str, value: Any) -> Any:
    return await work_async(kind, value)


class Client(Peer):
    async def open(self) -> None:
        await worker.__aenter__()

    async def close(self) -> None:
        await worker.__aexit__(None, None, None)

    async def submit(self, kind: str, value: Any) -> Any:
        return await work.enqueue(kind, value)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        handles = [work.enqueue(kind, value) for value in values]
        await worker.enqueue_many(handles)
        return handles

    async def result(self, handle: Any, timeout: float) -> Any:
        done = await handle.result(timeout=max(1, int(timeout)))
        if not done.success:
            raise Failed(done.exception)
        return done.result

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        return await gather(lambda handle: self.outcome(handle, timeout), handles, at_once=50)
