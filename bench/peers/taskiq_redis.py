"""taskiq on Redis streams, the broker of taskiq-redis that acknowledges."""

from __future__ import annotations

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from peers.peer import LEASE, URL
from peers.taskiq import TaskiqClient, registered

_URL = URL or "redis://127.0.0.1"
broker = RedisStreamBroker(
    url=_URL, idle_timeout=1000 * (LEASE or 600), unacknowledged_lock_timeout=LEASE or None
).with_result_backend(RedisAsyncResultBackend(redis_url=_URL, result_ex_time=3600))
work = registered(broker)


class Client(TaskiqClient):
    def __init__(self) -> None:
        super().__init__(broker)
