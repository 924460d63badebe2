"""Celery on Redis: late acknowledgements, so that calls of a killed worker are run again."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeout

from peers.peer import LEASE, URL, Failed, Peer
from peers.work import work as run

app = Celery("peers", broker=URL, backend=URL)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=64,
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)
if LEASE:
    options = {"visibility_timeout": LEASE, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    app.conf.broker_transport_options = options


@app.task(name="work")
def work(kind: str, value: Any) -> Any:
    return run(kind, value)


class Client(Peer):
    blocking = True

    async def open(self) -> None:
        app.connection_for_write().ensure_connection(max_retries=5)

    async def close(self) -> None:
        app.close()

    async def submit(self, kind: str, value: Any) -> Any:
        return work.delay(kind, value)

    async def result(self, handle: Any, timeout: float) -> Any:
        try:
            return handle.get(timeout=timeout)
        except CeleryTimeout as error:
            raise TimeoutError from error
        except ValueError as error:
            raise Failed from error
