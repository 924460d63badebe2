"""Huey on Redis, waking whoever waits for a result (`notify_result`), where polling is the default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huey import RedisHuey
from huey.exceptions import ResultTimeout, TaskException

from peers.peer import URL, Failed, Peer
from peers.work import work as run

huey = RedisHuey("peers", url=URL or "redis://127.0.0.1", notify_result=True)


@huey.task()
def work(kind: str, value: Any) -> Any:
    return run(kind, value)


class Client(Peer):
    blocking = True

    async def open(self) -> None:
        huey.storage.conn.ping()

    async def close(self) -> None: ...

    async def submit(self, kind: str, value: Any) -> Any:
        return work(kind, value)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return list(work.map([(kind, value) for value in values]))

    async def result(self, handle: Any, timeout: float) -> Any:
        try:
            return handle.get(blocking=True, timeout=timeout)
        except ResultTimeout as error:
            raise TimeoutError from error
        except TaskException as error:
            raise Failed from error
