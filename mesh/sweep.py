"""What nobody else notices: calls that no consumer has, single runs whose client died, functions long removed.

Any worker may do any of it at any time, and several at once do no harm; a short claim in the store keeps that rare.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh import deploy
from mesh.broker import Broker, Stored
from mesh.exception import InvalidError, NotFoundError
from mesh.protocol import Address, Result, State, call_time, failure
from mesh.records import AppHead, AppState, FunctionRecord
from mesh.settle import end_without_lease, quarantine_stored
from mesh.topology import SHARED_POOL

logger = logging.getLogger("mesh.worker")

ORPHAN_AGE = 60.0  # seconds a call may wait for a function that nobody deployed
KEPT_REMOVED = 86_400.0  # seconds the record and consumer of a removed function stay, to fail what still arrives


@dataclass(slots=True)
class Sweeper:
    """Looks after an environment, in the name of one worker."""

    broker: Broker
    worker: str
    ack_wait: float
    interval: float
    _differed: bool = field(default=False, init=False)

    async def sweep(self) -> None:
        """Everything below, unless another worker has just done it."""
        if not await self.broker.locks.claim("sweep", self.worker, 0.9 * self.interval):
            return
        await self.orphans()
        await self.removed()

    async def runs(self, runs: Sequence[AppHead]) -> None:
        """End apps of a single run whose client has gone, or died while it ended them."""
        alive = await self.broker.runs.alive()
        lost = [head for head in runs if head.app not in alive]
        if not lost or await self.broker.runs.is_new():
            return
        for head in lost:
            if head.state is not AppState.STOPPED:
                logger.info("%s (%s) has lost its client: ending it", head.app, head.name)
            await deploy.end_run(self.broker, head.app)

    async def orphans(self, older_than: float = ORPHAN_AGE) -> int:
        """Find calls that no consumer has: give deployed functions their consumer, and fail the calls of others.

        Only where the queue holds more than the consumers know, twice running: in passing the two always differ.
        Returns how many calls were ended.
        """
        queued, known = await self.broker.registry.queue_sizes()
        differed, self._differed = self._differed, queued > known
        if not (self._differed and differed):
            return 0
        existing = await self.broker.registry.consumers()
        ended = 0
        for app, function, pool in await self.broker.calls.pools():
            if self.broker.topology.consumer(app, function, pool) in existing:
                continue
            record = await self._record(app, function)
            if record is not None:
                await self.broker.registry.add_consumers([(app, function, pool)], self.ack_wait)
            else:
                ended += await self._fail_all(app, function, pool, older_than)
        return ended

    async def _record(self, app: str, function: str) -> FunctionRecord | None:
        try:
            return await self.broker.registry.function(app, function)
        except InvalidError:  # of a newer mesh, or damaged: not ours to judge
            return None

    async def _fail_all(self, app: str, function: str, pool: str, older_than: float) -> int:
        ended = 0
        for stored in await self.broker.calls.of_pool(app, function, pool):
            address = self.broker.calls.address(stored)
            if address is None:
                await quarantine_stored(self.broker, stored, "no call id, and no such function")
                ended += 1
            elif time.time() - call_time(address.call) >= older_than:
                await self._fail(stored, address)
                ended += 1
        return ended

    async def _fail(self, stored: Stored, address: Address) -> None:
        reason = failure(NotFoundError, f"no function {address.function!r} in app {address.app!r}")
        logger.warning("%s: %s", address.key, reason.text)
        result = Result.of_failure(State.FAILED, reason, app=address.app, function=address.function, worker=self.worker)
        await end_without_lease(self.broker, stored, address, result)

    async def removed(self) -> None:
        """Forget functions that were removed long ago and have nothing queued."""
        for app, head in (await self.broker.registry.heads()).items():
            names = await self.broker.registry.recorded(app)
            if len(names) == len(head.functions):
                continue
            records = await self.broker.registry.functions(app, [name for name in names if name not in head.functions])
            for name, record in records.items():
                if record.removed is not None and time.time() - record.removed.at > KEPT_REMOVED:
                    await self._forget(app, name)

    async def _forget(self, app: str, function: str) -> None:
        consumer = self.broker.topology.consumer(app, function, SHARED_POOL)
        if not await self.broker.calls.of_pool(app, function, SHARED_POOL, 1):
            await self.broker.registry.remove_consumer(consumer)
            await self.broker.registry.forget(app, function)
