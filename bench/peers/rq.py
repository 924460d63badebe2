"""RQ on Redis, with SimpleWorker: it runs calls in its own process, where the default forks one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from rq import Queue
from rq.results import Result

from peers.peer import URL, Failed, Peer
from peers.work import work

queue = Queue("peers", connection=Redis.from_url(URL or "redis://127.0.0.1"))


class Client(Peer):
    blocking = True

    async def open(self) -> None:
        queue.connection.ping()

    async def close(self) -> None:
        queue.connection.close()

    async def submit(self, kind: str, value: Any) -> Any:
        return queue.enqueue(work, kind, value, result_ttl=3600)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return queue.enqueue_many([Queue.prepare_data(work, (kind, value), result_ttl=3600) for value in values])

    async def result(self, handle: Any, timeout: float) -> Any:
        found = handle.latest_result(timeout=max(1, int(timeout)))
        if found is None:
            raise TimeoutError
        if found.type is not Result.Type.SUCCESSFUL:
            raise Failed(found.exc_string)
        return found.return_value
