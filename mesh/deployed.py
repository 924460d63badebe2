"""What is deployed, as one worker knows it: pools come, change and go with the heads of apps and with what callers ask.

Heads and pools are pushed once they are stored; pushes can get lost, so everything is read again now and then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mesh.pool import Pool
from mesh.protocol import SHARED_POOL, PoolKey
from mesh.records import AppHead, AppState, FunctionRecord, PoolRecord
from mesh.variant import Variant

if TYPE_CHECKING:
    from mesh.worker import Worker

logger = logging.getLogger("mesh.worker")


class Deployed:
    """The pools of one worker.

    Attributes:
        pools: all of them, by key.
    """

    def __init__(self, worker: Worker) -> None:
        self.pools: dict[PoolKey, Pool] = {}
        self._worker = worker
        self._by_consumer: dict[str, Pool] = {}
        self._heads: dict[str, AppHead] = {}
        self._asked_for: dict[PoolKey, PoolRecord] = {}
        self._autoscalers: dict[PoolKey, Mapping[str, Any]] = {}

    @property
    def runs(self) -> list[AppHead]:
        """Apps of a single run, those included that have ended."""
        return [head for head in self._heads.values() if head.app.startswith("ap-")]

    def pool_of(self, consumer: str) -> Pool | None:
        """The pool that a consumer delivers to; closed ones for a while, too, since something may be on its way."""
        return self._by_consumer.get(consumer)

    async def watch(self) -> None:
        """Be told of changes from now on; `read` what is there."""
        broker = self._worker.broker
        await broker.registry.watch(self._on_head, self._on_unreadable)
        await broker.pools.watch(self._on_pool)
        await broker.autoscalers.watch(self._on_autoscaler)

    async def read(self) -> None:
        """All apps and pools, as the store has them; what vanished there vanishes here."""
        broker = self._worker.broker
        before = set(self._asked_for)
        asked_for = {record.key: record for record in await broker.pools.all()}
        heads = await broker.registry.heads()
        await self._add_missing(heads.values(), asked_for)
        for key in before - set(asked_for):  # what was pushed meanwhile stays
            del self._asked_for[key]
        self._asked_for |= asked_for
        for app in set(self._heads) - set(heads):
            self._forget_app(app)
        await asyncio.gather(*map(self._take_head, heads.values()))
        for key in asked_for:
            self._set_own(key)
        self._forget_unasked()
        await self._read_autoscalers()

    async def _read_autoscalers(self) -> None:
        found = await self._worker.broker.autoscalers.all()
        for pool in set(self._autoscalers) | set(found):
            self._on_autoscaler(pool, found.get(pool, {}))

    def _on_autoscaler(self, key: PoolKey, options: Mapping[str, Any]) -> None:
        """Somebody has changed the bounds of a pool, or deployed it anew."""
        if options:
            self._autoscalers[key] = options
        else:
            self._autoscalers.pop(key, None)
        pool = self.pools.get(key)
        if pool is not None and pool.bounds_set != options:
            pool.set_bounds(options)

    async def _add_missing(self, heads: Iterable[AppHead], asked_for: Iterable[PoolKey]) -> None:
        """Make the consumers that there should be, and are not."""
        broker = self._worker.broker
        existing = await broker.consumers.names()
        shared = {PoolKey(head.app, name) for head in heads for name in head.functions}
        wanted = shared | {key for key in asked_for if PoolKey(key.app, key.function) in shared}
        missing = [key for key in wanted if broker.topology.consumer(key) not in existing]
        if missing:
            await self._add_consumers(missing)

    async def _add_consumers(self, keys: Iterable[PoolKey]) -> None:
        broker = self._worker.broker
        methods = await broker.registry.methods(keys)
        for consumer, made in (await broker.consumers.add(methods, self._worker.ack_wait)).items():
            self._worker.on_consumer_made(consumer, made)

    # --- apps --------------------------------------------------------------------------------------------------------

    def _on_head(self, head: AppHead) -> None:
        self._worker.background.spawn(self._take_head(head))

    def _on_unreadable(self, subject: str, error: Exception) -> None:
        logger.error("%s was deployed by a mesh this one does not understand: %s", subject, error)

    async def _take_head(self, head: AppHead) -> None:
        """Make the pools what a deployment says."""
        known = self._heads.get(head.app)
        if known is not None and known.version >= head.version and self._has_pools(head):
            return
        if head.state is AppState.STOPPED and head.app.startswith("ap-"):
            self._heads[head.app] = head
            self._forget_app(head.app, "its app has ended")
            return
        names = set(head.functions)
        names.update(key.function for key in self.pools if key.app == head.app)
        registry = self._worker.broker.registry
        if known is None:
            names.update(await registry.recorded(head.app))
        records = await registry.functions(head.app, names)
        current = self._heads.get(head.app)
        if current is not None and current.version > head.version:
            return  # a newer one came while this one was read
        self._heads[head.app] = head
        for name, record in records.items():
            shared = PoolKey(head.app, name)
            self._set(shared, record, Variant())
            for key in [key for key in self._asked_for if PoolKey(key.app, key.function) == shared]:
                self._set_own(key)

    def _has_pools(self, head: AppHead) -> bool:
        return all(PoolKey(head.app, name) in self.pools for name in head.functions)

    def _set(self, key: PoolKey, record: FunctionRecord, variant: Variant) -> None:
        pool = self.pools.get(key)
        if pool is None:
            pool = self.pools[key] = Pool(self._worker, key, record, variant)
            self._by_consumer[pool.consumer] = pool
            if key in self._autoscalers:
                pool.set_bounds(self._autoscalers[key])
            unfit = f", not run here: {pool.unfit}" if pool.unfit else ""
            logger.info("%s version %s%s", key, record.version[:12], unfit)
            pool.feed()
        elif pool.record != record:
            pool.update(record)
            logger.info("%s %s", key, "is removed" if record.removed else f"is now version {record.version[:12]}")

    def _forget_app(self, app: str, reason: str = "its app is gone") -> None:
        for key in [key for key in self.pools if key.app == app]:
            self._forget(key, reason)
        if reason == "its app is gone":
            self._heads.pop(app, None)

    def _forget(self, key: PoolKey, reason: str) -> None:
        self.pools[key].close(reason)
        self._drop(key)

    def _drop(self, key: PoolKey) -> None:
        """What is still on its way here is the old pool's to settle, for a while."""
        pool = self.pools.pop(key)
        asyncio.get_running_loop().call_later(2 * self._worker.ack_wait, self._drop_consumer, pool)

    def _drop_consumer(self, pool: Pool) -> None:
        if self._by_consumer.get(pool.consumer) is pool:
            del self._by_consumer[pool.consumer]

    # --- pools of their own ------------------------------------------------------------------------------------------

    def _on_pool(self, record: PoolRecord) -> None:
        self._asked_for[record.key] = record
        if record.key not in self.pools:
            self._worker.background.spawn(self._begin_own(record.key))

    async def _begin_own(self, key: PoolKey) -> None:
        """Somebody calls a pool that is new here. Its function may be, too: then its head brings both."""
        if PoolKey(key.app, key.function) in self.pools:
            await self._worker.settler.insist(lambda: self._add_consumers([key]))
            self._set_own(key)

    def _set_own(self, key: PoolKey) -> None:
        shared = self.pools.get(PoolKey(key.app, key.function))
        if shared is not None and key in self._asked_for:
            self._set(key, shared.record, self._asked_for[key].variant)

    def _forget_unasked(self) -> None:
        """Nobody has called these for a day."""
        for key, pool in list(self.pools.items()):
            if key.pool != SHARED_POOL and key not in self._asked_for and not pool.running and not pool.intake.waiting:
                for container in pool.containers:
                    container.stop()
                self._drop(key)
