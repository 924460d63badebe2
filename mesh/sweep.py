"""What nobody else notices: calls that no consumer has, single runs whose client died, functions long removed.

Any worker may do any of it at any time, and several at once do no harm; a short claim in the store keeps that rare.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mesh import deploy
from mesh.broker import Broker, Stored
from mesh.exception import NotFoundError
from mesh.payload import parse_name
from mesh.protocol import (
    SHARED_POOL,
    Address,
    PoolKey,
    Result,
    State,
    call_time,
    class_of,
    failure,
    method_of,
    parse_time,
)
from mesh.records import AppHead, AppState, FunctionRecord
from mesh.settle import clear_ended, end_without_lease, quarantine_stored

logger = logging.getLogger("mesh.worker")

ORPHAN_AGE = 60.0  # seconds a call may wait for a function that nobody deployed
RENEWED = 86_400.0  # seconds after which the record of a call is written anew whose inputs are still in the queue
KEPT_UNUSED = 86_400.0  # seconds a pool of its own stays that nobody calls
PAYLOADS_EVERY = 3600.0  # seconds between looks for payloads that nothing names
# Seconds those stay: of arguments the call may just be being submitted, of a result the record is there if it ever is.
KEPT_PAYLOADS = {"in": 86_400.0, "out": 3600.0}
_TOGETHER = 16  # payloads looked into at once
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
        await self.unused_pools()
        if await self.broker.locks.claim("records", self.worker, RENEWED):
            await self.records()
        if await self.broker.locks.claim("payloads", self.worker, 0.9 * PAYLOADS_EVERY):
            await self.payloads()

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
        """Find calls that no consumer has: give deployed functions their consumer, fail the calls of others, and clear
        away those that have ended. A server that was killed may bring back calls whose consumers remember that they
        were acknowledged (nats-server 2.15.1, without fsync): nobody would deliver them again.

        Only where the queue holds more than the consumers know, twice running: in passing the two always differ.
        Returns how many calls were ended.
        """
        queued, known = await self.broker.consumers.queue_sizes()
        differed, self._differed = self._differed, queued > known
        if not (self._differed and differed):
            return 0
        delivered = await self.broker.consumers.delivered()
        ended = 0
        for app, function, pool in await self.broker.calls.called():
            if self.broker.topology.call_filter(app=app, function=function, pool=pool) in delivered:
                ended += await self._clear_ended(app, function, pool)
                continue
            key = PoolKey(app, class_of(function), pool)
            methods = await self._methods(key)
            if methods is not None and method_of(function) in (methods or ("",)):
                await self.broker.consumers.add({key: methods}, self.ack_wait)
            else:
                ended += await self._fail_all(app, function, pool, older_than)
        return ended

    async def _clear_ended(self, app: str, function: str, pool: str) -> int:
        """Of the oldest calls of a function, take those out of the queue that have a result."""
        stored = await self.broker.calls.of_function(app, function, pool)
        addresses = [(s, address) for s in stored if (address := self.broker.calls.address(s)) is not None]
        results = await self.broker.results.get_many(address.key for _, address in addresses)
        ended = [(s, address) for s, address in addresses if address.key in results]
        for message, address in ended:
            await clear_ended(self.broker, message, address, results[address.key])
        return len(ended)

    async def _methods(self, pool: PoolKey) -> tuple[str, ...] | None:
        """The methods of a pool's class, none of a function; `None` where nobody knows such a pool."""
        if pool.pool != SHARED_POOL and await self.broker.pools.get(pool) is None:
            return None
        return (await self.broker.registry.methods([pool])).get(pool)

    async def _fail_all(self, app: str, function: str, pool: str, older_than: float) -> int:
        ended = 0
        for stored in await self.broker.calls.of_function(app, function, pool):
            address = self.broker.calls.address(stored)
            if address is None:
                await quarantine_stored(self.broker, stored, "no call id, and no such function")
                ended += 1
            elif time.time() - call_time(address.call) >= older_than:
                await self._fail(stored, address)
                ended += 1
        return ended

    async def _fail(self, stored: Stored, address: Address) -> None:
        text = f"no function {address.function!r} in app {address.app!r}"
        if address.pool != SHARED_POOL:
            text = f"{text}, or nothing says what its pool {address.pool!r} is"
        reason = failure(NotFoundError, text)
        logger.warning("%s: %s", address.key, reason.text)
        result = Result.of_failure(State.FAILED, reason, app=address.app, function=address.function, worker=self.worker)
        await end_without_lease(self.broker, stored, address, result)

    async def records(self) -> int:
        """Write the records of calls of several inputs anew that still have some in the queue: they would be gone
        before these. Where one that is kept for less than a day is gone, an input tells. Returns how many."""
        renewed = 0
        now = await self.broker.workers.server_time(self.worker)
        async for record, stored in self.broker.several.old(RENEWED, now):
            if await self.broker.several.queued(record):
                await self.broker.several.renew(record, stored)
                renewed += 1
        return renewed

    async def removed(self) -> None:
        """Forget functions that were removed long ago and have nothing queued."""
        recorded = await self.broker.registry.all_recorded()
        for app, head in (await self.broker.registry.heads()).items():
            names = recorded.get(app, [])
            if len(names) == len(head.functions):
                continue
            records = await self.broker.registry.functions(app, [name for name in names if name not in head.functions])
            for record in records.values():
                if record.removed is not None and time.time() - record.removed.at > KEPT_REMOVED:
                    await self._forget(record)

    async def _forget(self, record: FunctionRecord) -> None:
        app, name, methods = record.app, record.spec.name, record.spec.methods or ()
        pools = [PoolKey(app, name), *(pool.key for pool in await self.broker.pools.of(app, [name]))]
        for pool in pools:
            if await self.broker.calls.in_pool(pool, methods):
                return
        for pool in pools:
            await self.broker.consumers.remove(self.broker.topology.consumer(pool))
        await self.broker.registry.forget(app, name)

    async def unused_pools(self) -> None:
        """Forget pools of their own that nobody has called for a day, and that have nothing queued."""
        now = await self.broker.workers.server_time(self.worker)
        unused = await self.broker.pools.older_than(KEPT_UNUSED, now)
        recorded = await self.broker.registry.methods(record.key for record, _ in unused)
        for record, sequence in unused:
            methods = recorded.get(record.key, ())
            if await self.broker.calls.in_pool(record.key, methods) or not await self.broker.pools.forget(sequence):
                continue
            await self.broker.consumers.remove(self.broker.topology.consumer(record.key))
            if await self.broker.calls.in_pool(record.key, methods):  # one slipped in: as if nothing had been
                await self.broker.pools.restore(record)
                await self.broker.consumers.add({record.key: methods}, self.ack_wait)

    async def payloads(self, kept: Mapping[str, float] = KEPT_PAYLOADS) -> int:
        """Remove large payloads that nothing names any more: of results that were kept for their time, of calls whose
        submitter died half-way, and what a worker that died left behind. Returns how many."""
        now = await self.broker.workers.server_time(self.worker)
        together = asyncio.Semaphore(_TOGETHER)

        async def remove(name: str, call: str, index: int, way: str) -> bool:
            async with together:
                if await self._is_named(name, call, index, way):
                    return False
                changed = await self.broker.blobs.changed(name)
                if not changed or now - parse_time(changed) < kept[way]:
                    return False
                await self.broker.blobs.delete(name)
                return True

        ours = [(name, parsed) for name in await self.broker.blobs.names() if (parsed := parse_name(name))]
        removed = sum(await asyncio.gather(*(remove(name, *parsed) for name, parsed in ours)))
        if removed:
            logger.info("removed %d payloads that no call, result or dead letter names", removed)
        return removed

    async def _is_named(self, name: str, call: str, index: int, way: str) -> bool:
        """Whether a payload is needed. Looks in the order in which a call moves, so that it cannot slip past."""
        if await self.broker.calls.find(call, index) is not None:
            return True
        if way == "out":
            result = await self.broker.results.get(f"{call}.{index}")
            return result is not None and result.blob is not None and result.blob.name == name
        letters = await self.broker.dead.of_call(call)
        return any(letter.headers.get("Mesh-Blob", "").partition(" ")[0] == name for letter in letters)
