"""Notices what was deleted or changed in the store by hand; mends what nothing can be lost by, and says the rest.

Each worker looks once a minute, and at once when an answer says that a stream or consumer is gone. What takes many
requests, the comparison of every setting, one worker of the fleet does.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from mesh.background import Background
from mesh.broker import Broker, NoResponders, StoreError, Unanswered
from mesh.broker.audit import Finding, is_missing
from mesh.exception import Error
from mesh.protocol import SHARED_POOL, PoolKey
from mesh.records import AppState

logger = logging.getLogger("mesh.worker")

_PAUSE = 5.0  # seconds between looks, however many requests fail meanwhile
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds between tries to make consumers again


@dataclass(slots=True)
class Upkeep:
    """Looks after the store, in the name of one worker.

    Attributes:
        on_made: called with the name of a consumer that was made again or set right, and when it was made.
    """

    broker: Broker
    worker: str
    ack_wait: float
    interval: float
    on_made: Callable[[str, float], None]
    background: Background
    _said: dict[str, Finding] = field(default_factory=dict[str, Finding], init=False)
    _lost: set[str] = field(default_factory=set[str], init=False)
    _looking: asyncio.Task[None] | None = field(default=None, init=False)
    _restoring: asyncio.Task[None] | None = field(default=None, init=False)

    # --- streams and settings ----------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Make again what can be; compare the rest, unless another worker has just done it."""
        await self._mend()
        if await self.broker.locks.claim("audit", self.worker, 0.9 * self.interval):
            await self._compare()

    def suspect(self, error: Exception) -> None:
        """Something failed: look now where it may be that something is gone."""
        if is_missing(error) and (self._looking is None or self._looking.done()):
            self._looking = self.background.spawn(self._look_now())

    async def _look_now(self) -> None:
        try:
            await self._mend()
            await self._compare()
        except (Unanswered, NoResponders, StoreError, Error) as error:
            logger.debug("looking at the store: %r", error)
        await asyncio.sleep(_PAUSE)

    async def _mend(self) -> None:
        made = await self.broker.mend(self.ack_wait)
        if made:
            logger.warning("%s had been deleted, and is made again, empty", ", ".join(made))

    async def _compare(self) -> None:
        found = {str(finding): finding for finding in await self.broker.audit()}
        for text in found.keys() - self._said.keys():
            logger.error("%s", text)
        for text in self._said.keys() - found.keys():
            logger.info("%s is as it should be again", self._said[text].name)
        self._said = found
        changed = {finding.pool for finding in found.values() if finding.pool is not None}
        await self._make(changed)

    async def _make(self, pools: Collection[PoolKey]) -> None:
        wanted = await self.broker.registry.methods(pools)
        for consumer, made in (await self.broker.consumers.add(wanted, self.ack_wait)).items():
            self.on_made(consumer, made)

    # --- consumers ---------------------------------------------------------------------------------------------------

    def is_lost(self, consumer: str) -> bool:
        """Whether a consumer is gone, so that nothing can be asked of it."""
        return consumer in self._lost

    def found(self, consumer: str) -> None:
        """A consumer is there, whoever made it."""
        self._lost.discard(consumer)

    def lost(self, consumer: str) -> None:
        """A consumer is gone: make it again, where its function is still there."""
        self._lost.add(consumer)
        if self._restoring is None or self._restoring.done():
            self._restoring = self.background.spawn(self._restore())

    async def _restore(self) -> None:
        """All that are lost together, and slower each time that it fails."""
        pause = _FIRST_PAUSE
        while self._lost:
            await asyncio.sleep(pause * random.uniform(1.0, 2.0))
            lost = set(self._lost)
            try:
                wanted = await self._still_wanted(lost)
                await self._make(wanted.values())
                self._lost -= lost
                if wanted:
                    logger.warning("the consumer %s had been deleted, and is made again", ", ".join(sorted(wanted)))
            except (Unanswered, NoResponders, StoreError, Error) as error:
                self.suspect(error)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _still_wanted(self, lost: set[str]) -> dict[str, PoolKey]:
        """Those of functions that are recorded, in apps that are not being ended, and of pools that are known."""
        pools = {name: pool for name in lost if (pool := self.broker.topology.parse_consumer(name))}
        wanted = dict(pools)
        for name, pool in pools.items():
            if pool.pool != SHARED_POOL and await self.broker.pools.get(pool) is None:
                del wanted[name]
        for app in {pool.app for pool in pools.values()}:
            head, _ = await self.broker.registry.head(app)
            if head is None or (head.state is AppState.STOPPED and app.startswith("ap-")):
                wanted = {name: pool for name, pool in wanted.items() if pool.app != app}
        recorded = await self.broker.registry.methods(wanted.values())
        return {name: pool for name, pool in wanted.items() if pool in recorded}
