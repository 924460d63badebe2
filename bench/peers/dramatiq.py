"""Dramatiq on Redis, with its Results middleware."""

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import ResultFailure, Results, ResultTimeout
from dramatiq.results.backends import RedisBackend

from peers.peer import LEASE, URL, Failed, Peer
from peers.work import work as run

# Maintenance, which finds lost workers, comes with so many of a million commands: more where few commands are sent.
broker = RedisBroker(url=URL, heartbeat_timeout=1000 * (LEASE or 60), maintenance_chance=50_000 if LEASE else 1000)
broker.add_middleware(Results(backend=RedisBackend(url=URL), result_ttl=3_600_000))
dramatiq.set_broker(broker)


@dramatiq.actor(max_retries=0, store_results=True)
def work(kind: str, value: Any) -> Any:
    return run(kind, value)


class Client(Peer):
    blocking = True

    async def open(self) -> None:
        broker.client.ping()

    async def close(self) -> None:
        broker.close()

    async def submit(self, kind: str, value: Any) -> Any:
        return work.send(kind, value)

    async def result(self, handle: Any, timeout: float) -> Any:
        try:
            return handle.get_result(block=True, timeout=max(1000, int(1000 * timeout)))
        except ResultTimeout as error:
            raise TimeoutError from error
        except ResultFailure as error:
            raise Failed from error
