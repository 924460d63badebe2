"""arq on Redis. Its workers and its waiting clients poll: every 10 ms here, where half a second is the default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from arq import create_pool, func
from arq.connections import ArqRedis, RedisSettings

from peers.peer import LEASE, URL, Failed, Peer, gather
from peers.work import work_async

_POLL = 0.01


async def work(context: dict[str, Any], kind: str, value: Any) -> Any:
    return await work_async(kind, value)


class WorkerSettings:
    functions: ClassVar = [func(work, name="work")]
    redis_settings = RedisSettings.from_dsn(URL or "redis://127.0.0.1")
    max_jobs = 10
    poll_delay = _POLL
    job_timeout = LEASE or 300
    log_results = False


class Client(Peer):
    pool: ArqRedis

    async def open(self) -> None:
        self.pool = await create_pool(WorkerSettings.redis_settings)

    async def close(self) -> None:
        await self.pool.aclose()

    async def submit(self, kind: str, value: Any) -> Any:
        return await self.pool.enqueue_job("work", kind, value)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return await gather(lambda value: self.submit(kind, value), values)

    async def result(self, handle: Any, timeout: float) -> Any:
        try:
            return await handle.result(timeout=timeout, poll_delay=_POLL)
        except ValueError as error:
            raise Failed from error

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        return await gather(lambda handle: self.outcome(handle, timeout), handles)
