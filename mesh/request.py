"""HTTP requests on their way through a worker: a request is an input that no queue has.

It comes as a core message to whichever worker listens, and waits for a container beside the inputs of the queue, so
that what counts, starts and ends containers sees both alike. But nothing of it is stored: its answer goes out as a
flow, whose end says how it went, and who asked for it decides what to do if that was not well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.broker import Lease
from mesh.broker.exchanges import Exchange, Receipt
from mesh.broker.web import Arrival, Listening
from mesh.container import Container
from mesh.flow import WINDOW
from mesh.judge import Execution, Kind
from mesh.protocol import SHARED_POOL, Address, CancelRequest, Input, PoolKey
from mesh.runs import Assignment
from mesh.settle import Held

if TYPE_CHECKING:
    from mesh.pool import Pool
    from mesh.worker import Worker

logger = logging.getLogger("mesh.worker")

_LEFT = "its client has gone"
_MOST_WAITING = 1000  # requests that wait for a container here; others are told that it is busy


@dataclass(slots=True, eq=False)
class Request(Held):
    """One request: an input that has no lease to be kept, and no result.

    Attributes:
        exchange: where the rest of it comes from, and its answer goes. on_gone: called when its client has.
        container: that answers it. seq: its number there.
    """

    exchange: Exchange | None = None
    on_gone: Callable[[Request], None] | None = None
    container: Container | None = None
    seq: int = 0
    _granted: int = WINDOW
    _allowed: int = 0
    _fed: int = 0

    def give(self, container: Container, assignment: Assignment) -> None:
        """It goes to a container."""
        self.container, self.seq = container, assignment.work.seq
        assignment.flow, assignment.allow = _Answer(self), self.allow

    def end(self, execution: Execution) -> None:
        """Say how it went, after all of its answer."""
        assert self.exchange is not None
        self.exchange.told = _nothing
        text = execution.failure.summary if execution.failure is not None else execution.text
        self.exchange.end(f"{execution.kind}\n{text}".encode())
        if execution.kind is not Kind.SUCCEEDED:
            at = self.lease.address
            logger.info("✗ request %s to %s %s: %s", self.call, at.path if at else "", execution.kind, text)

    def allow(self, number: int) -> None:
        """The container has room for the body's chunks up to this one."""
        self._allowed = max(self._allowed, number)
        self._feed()

    def on_news(self) -> None:
        """Something came from the gateway, or it does not come any more."""
        exchange = self.exchange
        assert exchange is not None
        if self.container is not None and exchange.granted > self._granted:
            self._granted = exchange.granted
            self.container.grant(self.seq, exchange.granted)
        self._feed()
        if (exchange.gone or exchange.error is not None) and self.on_gone is not None:
            on_gone, self.on_gone = self.on_gone, None
            self.cancelled = self.cancelled or _LEFT
            if self.container is not None:
                self.container.leave(self.seq)
            on_gone(self)

    def _feed(self) -> None:
        """Pass the body on as the container has room for it."""
        while self.container is not None and self.exchange is not None and self._fed < self._allowed:
            chunk = self.exchange.pop()
            if chunk is None:
                return
            self._fed += 1
            self.container.feed(self.seq, chunk)


def _nothing() -> None: ...


class _Answer:
    """Where a container's chunks go. That it has no more to say ends the request only when what came of it is known."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def begin(self) -> None: ...

    def send(self, chunk: bytes) -> None:
        if self._request.exchange is not None:
            self._request.exchange.send(chunk)

    def end(self) -> None: ...


class Door:
    """Lets requests in to the web functions that run on this worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._listening: dict[PoolKey, Listening] = {}
        self._changing = asyncio.Lock()

    def attend(self, pool: Pool) -> None:
        """Listen for a pool from now on, or no more, as it is now."""
        if bool(pool.spec.webs) or pool.key in self._listening:
            self._worker.background.spawn(self._attend(pool))

    async def _attend(self, pool: Pool) -> None:
        async with self._changing:
            wanted = bool(pool.spec.webs) and pool.is_open and pool.key.pool == SHARED_POOL
            wanted = wanted and not self._worker.draining and self._worker.deployed.pools.get(pool.key) is pool
            if wanted and pool.key not in self._listening:
                key = pool.key
                listening = self._worker.broker.web.listen(key.app, key.function, lambda a: self._on_arrival(key, a))
                self._listening[key] = await listening
            elif not wanted and pool.key in self._listening:
                await self._listening.pop(pool.key).close()

    async def close(self) -> None:
        """Listen to nobody any more."""
        async with self._changing:
            for listening in self._listening.values():
                await listening.close()
            self._listening.clear()

    def _on_arrival(self, key: PoolKey, arrival: Arrival) -> None:
        pool = self._worker.deployed.pools.get(key)
        if pool is None or not pool.is_open or self._worker.draining:
            arrival.exchange.refuse(Receipt.AGAIN)
        elif len(pool.intake.waiting) >= _MOST_WAITING:
            arrival.exchange.refuse(Receipt.BUSY)
        else:
            if arrival.has_more:
                arrival.exchange.greet()
            pool.intake.accept(self._request(pool, arrival))

    def _request(self, pool: Pool, arrival: Arrival) -> Request:
        function = f"{pool.key.function}.{arrival.method}" if arrival.method else pool.key.function
        address = Address(pool.key.app, function, pool.key.pool, arrival.call, 0)
        lease = Lease(
            connection=self._worker.broker.connection,
            subject=arrival.subject,
            consumer=pool.consumer,
            reply="",
            delivery=1,
            sequence=0,
            stored=time.time(),
            pending=0,
            headers={},
            body=arrival.body,
            address=address,
            input=Input(address=address, body=arrival.body, kind="web"),
        )
        request = Request(lease, marked=True, exchange=arrival.exchange, on_gone=lambda gone: self._on_gone(pool, gone))
        arrival.exchange.told = request.on_news
        return request

    @staticmethod
    def _on_gone(pool: Pool, request: Request) -> None:
        """The application hears of it; one that waits is not begun."""
        if request in pool.intake.waiting:
            pool.cancel(request, CancelRequest(reason=_LEFT))
