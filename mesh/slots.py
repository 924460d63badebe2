"""Slots on the worker's side: a pool with `max_containers` starts a container only with a slot, over the whole fleet.

What may be claimed, and when a slot must be given up, is decided without I/O (`claimable`, `Slot`); `Share` acts on it
for one pool, `Slots` for what all of them have in common. The promise: whoever runs a container has renewed its slot
less than two thirds of its time to live ago. The container is told that moment and is killed at it, whatever becomes of
the worker, so nobody else can have the slot before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mesh.background import Background
from mesh.broker import Broker, NoResponders, StoreError, Unanswered
from mesh.exception import Error

if TYPE_CHECKING:
    from mesh.container import Container
    from mesh.pool import Pool

logger = logging.getLogger("mesh.worker")

_RENEWALS = 6  # of a slot in its time to live
_SURE = 2 / 3  # of its time to live after which a slot that was not renewed counts as lost
_TRIES = 60  # to renew or release a slot in its time to live, while the store does not answer
_LAST_RELEASES = 2.0  # seconds a stopping worker waits for the store to take back its slots
_UNAVAILABLE = (Unanswered, NoResponders, StoreError, Error)


# --- deciding --------------------------------------------------------------------------------------------------------


def claimable(cap: int, taken: Collection[int]) -> list[int]:
    """The numbers of slots that may be claimed below a cap.

    All that are free, as a rule. Where the cap was lowered, slots above it are still taken, by containers that finish
    what they have: each of them keeps one below the cap from being claimed, always the highest. So no order in which
    workers claim can bring more containers than the cap.
    """
    limit = cap
    total = limit + sum(number >= limit for number in taken)
    while limit > 0 and total > cap:
        limit -= 1
        total -= limit not in taken
    return [number for number in range(limit) if number not in taken]


@dataclass(slots=True, eq=False)
class Slot:
    """A slot that this worker has.

    Attributes:
        sequence: of its entry, 0 while that is not known. cap: for which it was claimed.
        renewed: monotonic time from before the last request that succeeded.
        container: that runs with it; `None` while it is spare. used: one has. leaving: it is to be released.
    """

    number: int
    cap: int
    sequence: int
    renewed: float
    container: Container | None = None
    used: bool = False
    leaving: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def sure_until(self, ttl: float) -> float:
        """Until when nobody else can have it, with a margin to kill what runs."""
        return self.renewed + _SURE * ttl

    def serves(self, cap: int | None) -> bool:
        """Whether another container may run with it: where the cap has changed since, only what is claimed anew."""
        return self.container is None and self.cap == cap

    def exceeds(self, cap: int | None) -> bool:
        """Whether its container has to go, because the cap was lowered."""
        return self.container is not None and cap is not None and self.number >= cap


# --- one pool --------------------------------------------------------------------------------------------------------


class Share:
    """The slots of one pool that this worker has. Of a pool without `max_containers`, none: everything is allowed."""

    def __init__(self, slots: Slots, pool: Pool, key: str) -> None:
        self.key = key
        self._slots = slots
        self._pool = pool
        self._held: list[Slot] = []
        self.is_claiming = False
        self._full: int | None = None
        self._freed = 0
        self._claim_from = 0.0

    @property
    def is_full(self) -> bool:
        """Whether every slot was taken at the last look."""
        return self._full is not None and self._full == self._pool.spec.max_containers

    @property
    def is_shut_out(self) -> bool:
        """Whether there are slots, but none to be had now: others have them, or it is too early to claim."""
        cap = self._pool.spec.max_containers
        if cap is None or self._spare() is not None or len(self._held) >= cap:
            return False
        return self.is_full or time.monotonic() < max(self._claim_from, self._slots.claim_from)

    @property
    def open(self) -> bool:
        """Whether another container may be started, as far as this worker knows."""
        cap = self._pool.spec.max_containers
        return cap is None or self._spare() is not None or (len(self._held) < cap and not self.is_shut_out)

    @property
    def due(self) -> int:
        """Containers that were wanted when a slot was claimed for them, and are started now that it is there: the input
        that wanted one may have found another place, and so would the next, and no container ever be started."""
        cap = self._pool.spec.max_containers
        return sum(slot.serves(cap) and not slot.used for slot in self._held)

    def reserve(self) -> bool:
        """Whether a container may be started now. If not, but perhaps soon, a slot is claimed; `feed` follows."""
        if self._pool.spec.max_containers is None or self._spare() is not None:
            return True
        if self.open and not self.is_claiming:
            self.is_claiming = True
            self._slots.background.spawn(self._claim())
        return False

    def take(self, container: Container) -> None:
        """A container is started, with the slot that was reserved."""
        slot = self._spare()
        if slot is not None:
            slot.container, slot.used = container, True
            container.live_until(slot.sure_until(self._slots.ttl))

    def ended(self, container: Container) -> None:
        """A container has really ended. Its slot is for the pool's next one, or given up at the end of this turn."""
        for slot in self._held:
            if slot.container is container:
                slot.container = None
                self._pool.feed()

    def tidy(self) -> None:
        """Give up what the pool has no use for, and stop containers above a cap that was lowered."""
        cap = self._pool.spec.max_containers
        for slot in list(self._held):
            if slot.container is None:
                self._give_up(slot)
            elif slot.exceeds(cap):
                slot.container.take_back()
                slot.container.stop()

    def freed(self, backlog: int = 0) -> None:
        """A slot may be free. Where inputs are known to wait, it is claimed first, and then they are asked for: of all
        who hear of it, only one shall get an input."""
        self._freed += 1
        self._full = None
        self._pool.intake.pending = max(self._pool.intake.pending, backlog)
        self._pool.feed()

    def see(self, taken: Collection[int]) -> None:
        """Which slots are taken, as the store has it."""
        cap = self._pool.spec.max_containers
        if cap is None or claimable(cap, taken):
            self.freed()

    def renew_now(self) -> None:
        """Renew everything at once: the connection is back."""
        for slot in self._held:
            slot.changed.set()

    def _spare(self) -> Slot | None:
        cap = self._pool.spec.max_containers
        return next((slot for slot in self._held if slot.serves(cap)), None)

    async def _claim(self) -> None:
        try:
            await self._claim_one()
        except _UNAVAILABLE as error:
            logger.debug("no slot of %s could be claimed: %r", self.key, error)
            self._claim_from = time.monotonic() + self._slots.ttl / _TRIES
            asyncio.get_running_loop().call_later(self._slots.ttl / _TRIES, self._pool.feed)
        finally:
            self.is_claiming = False
            self._pool.feed()

    async def _claim_one(self) -> None:
        cap, freed = self._pool.spec.max_containers, self._freed
        if cap is None:
            return
        taken = await self._slots.store.taken(self.key)
        numbers = claimable(cap, taken.get(self.key, ()))
        for number in random.sample(numbers, len(numbers)):
            before = time.monotonic()
            slot = Slot(number, cap, 0, before)
            try:
                sequence = await self._slots.store.claim(self.key, number, self._slots.owner)
            except _UNAVAILABLE:
                self._give_up(slot)  # it may have been stored all the same
                raise
            if sequence is not None:
                slot.sequence = sequence
                self._held.append(slot)
                self._slots.background.spawn(self._keep(slot))
                return
        if freed == self._freed:
            self._full = cap
            await self._slots.store.mend(self.key)  # the next look finds what that brings back

    def _give_up(self, slot: Slot) -> None:
        slot.leaving = True
        slot.changed.set()
        if slot in self._held:
            self._held.remove(slot)  # whoever keeps it releases it
        else:
            self._slots.background.spawn(self._release(slot))

    async def _keep(self, slot: Slot) -> None:
        """Renew a slot until it is given up, or lost."""
        while await self._rest(slot):
            if not await self._renew(slot):
                self._lose(slot)
                return
        await self._release(slot)

    async def _rest(self, slot: Slot) -> bool:
        """Wait until it is time to renew; false once the slot is given up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._slots.ttl / _RENEWALS):
                await slot.changed.wait()
        slot.changed.clear()
        return not slot.leaving

    async def _renew(self, slot: Slot) -> bool:
        """Whether the slot is still ours; asks until the store answers, or it cannot be any more."""
        while not slot.leaving:
            before = time.monotonic()
            try:
                sequence = await self._slots.store.renew(self.key, slot.number, self._slots.owner, slot.sequence)
            except _UNAVAILABLE as error:
                logger.debug("slot %s.%d could not be renewed: %r", self.key, slot.number, error)
                if time.monotonic() > slot.sure_until(self._slots.ttl):
                    return False
                await asyncio.sleep(self._slots.ttl / _TRIES)
                continue
            if sequence is None:
                return False
            slot.sequence, slot.renewed = sequence, before
            if slot.container is not None:
                slot.container.live_until(slot.sure_until(self._slots.ttl))
            return True
        return True

    def _lose(self, slot: Slot) -> None:
        if slot in self._held:
            self._held.remove(slot)
        logger.warning("slot %s.%d is lost: what ran with it is killed, and handed back", self.key, slot.number)
        if slot.container is not None:
            slot.container.live_until(0.0)
        self._pool.feed()

    async def _release(self, slot: Slot) -> None:
        """Give a slot back, unless the store is away for so long that it has expired."""
        while time.monotonic() < slot.renewed + self._slots.ttl:
            try:
                backlog = self._pool.backlog
                await self._slots.store.release(self.key, slot.number, self._slots.owner, slot.sequence, backlog)
            except _UNAVAILABLE:
                await asyncio.sleep(self._slots.ttl / _TRIES)
            else:
                return


# --- all pools -------------------------------------------------------------------------------------------------------


class Slots:
    """What the shares of one worker have in common: the store, whose they are, and news of free ones.

    Attributes:
        claim_from: monotonic time before which nothing is claimed: after a reconnect, who has a slot renews it first.
    """

    def __init__(self, broker: Broker, owner: str) -> None:
        self.store = broker.slots
        self.owner = owner
        self.ttl = broker.slots.ttl
        self.background = Background()
        self.claim_from = 0.0
        self.look_every = self.ttl / _RENEWALS
        self._topology = broker.topology
        self._shares: dict[str, Share] = {}

    async def start(self) -> None:
        await self.store.listen(self._on_freed)

    def share(self, pool: Pool) -> Share:
        """The share of a pool, from now on told what is new."""
        key = self._topology.pool_key(pool.key)
        share = self._shares[key] = Share(self, pool, key)
        return share

    def forget(self, share: Share) -> None:
        """A pool is gone; the slots it still has go with its containers."""
        if self._shares.get(share.key) is share:
            del self._shares[share.key]

    def _on_freed(self, key: str, backlog: int) -> None:
        share = self._shares.get(key)
        if share is not None:
            share.freed(backlog)

    def on_reconnected(self) -> None:
        """Renew what is held at once; claim after a while."""
        pause = self.ttl / _RENEWALS
        self.claim_from = time.monotonic() + pause
        for share in self._shares.values():
            share.renew_now()
        asyncio.get_running_loop().call_later(pause + 0.01, self._look_anew)

    def _look_anew(self) -> None:
        for share in list(self._shares.values()):
            share.freed()

    async def look(self) -> None:
        """See whether slots have expired that pools here wait for: nobody says so."""
        waiting = [share for share in self._shares.values() if share.is_full]
        if waiting:
            taken = await self.store.taken()
            for share in waiting:
                share.see(taken.get(share.key, ()))

    async def close(self) -> None:
        """Wait until what was given up is released; it is free by itself later, where the store does not answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_RELEASES):
                await self.background.drain()
        await self.background.cancel()
