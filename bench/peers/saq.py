"""SAQ on Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from saq import Queue, Status
from saq.job import TERMINAL_STATUSES

from peers.peer import LEASE, URL, Failed, TogetherPeer, gather
from peers.work import work_async

_POLL = 0.01
_READ = 500  # jobs that are looked at together

queue = Queue.from_url(URL or "redis://127.0.0.1")


async def work(context: dict[str, Any], *, kind: str, value: Any) -> Any:
    return await work_async(kind, value)


settings = {"queue": queue, "functions": [work], "concurrency": 10}
if LEASE:
    settings["timers"] = {"sweep": 1}


class Client(TogetherPeer):
    async def open(self) -> None:
        await queue.connect()

    async def close(self) -> None:
        await queue.disconnect()

    async def submit(self, kind: str, value: Any) -> Any:
        # Swept jobs are run again only where they have more than one attempt; those that raise must not have.
        more = {"timeout": LEASE, "retries": 3} if LEASE else {}
        return await queue.enqueue("work", **more, kind=kind, value=value)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return await gather(lambda value: self.submit(kind, value), values)

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        """As `Queue.map` waits. `Job.refresh(until_complete=…)` misses jobs that end before it listens."""
        found: dict[str, Any] = {}
        until = time.monotonic() + timeout
        while remaining := [handle.key for handle in handles if handle.key not in found]:
            for job in await queue.jobs(remaining[:_READ]):
                if job is not None and job.status in TERMINAL_STATUSES:
                    found[job.key] = job.result if job.status is Status.COMPLETE else Failed(job.error)
            if time.monotonic() > until:
                raise TimeoutError
            if remaining[0] not in found:
                await asyncio.sleep(_POLL)
        return [found[handle.key] for handle in handles]
