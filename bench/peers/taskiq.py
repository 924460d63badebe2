"""What taskiq is on either store: a broker makes tasks, and waiting for a result is polling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from taskiq import AsyncBroker
from taskiq.exceptions import ResultGetError, ResultIsReadyError, TaskiqResultTimeoutError

from peers.peer import Failed, Peer, gather
from peers.work import work_async

_POLL = 0.01


class TaskiqClient(Peer):
    """A client of a broker whose one task is `work`."""

    def __init__(self, broker: AsyncBroker) -> None:
        self.broker = broker
        self.work = registered(broker)

    async def open(self) -> None:
        await self.broker.startup()

    async def close(self) -> None:
        await self.broker.shutdown()

    async def submit(self, kind: str, value: Any) -> Any:
        return await self.work.kiq(kind, value)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return await gather(lambda value: self.submit(kind, value), values)

    async def result(self, handle: Any, timeout: float) -> Any:
        until = time.monotonic() + timeout
        while True:
            try:
                done = await handle.wait_result(timeout=max(_POLL, until - time.monotonic()), check_interval=_POLL)
            except TaskiqResultTimeoutError as error:
                raise TimeoutError from error
            except (ResultIsReadyError, ResultGetError):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(_POLL)  # it was being written
                continue
            if done.is_err:
                raise Failed(done.error)
            return done.return_value

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        return await gather(lambda handle: self.outcome(handle, timeout), handles)


def registered(broker: AsyncBroker) -> Any:
    """`work` as a task of a broker."""

    async def work(kind: str, value: Any) -> Any:
        return await work_async(kind, value)

    return broker.task(task_name="work")(work)
