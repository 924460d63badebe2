"""The workers together, as one of them knows them: it says what it does, hears of the others, and takes its share.

No leader: each worker computes the same shares from the same list of who is alive and fit. What they hear differs for
seconds at most, and then somebody has a container too many, never too few for long: idle ones stay until others have
theirs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import mesh
from mesh.broker.fleet import RENEW_WORKER
from mesh.placement import Size
from mesh.records import WorkerRecord

if TYPE_CHECKING:
    from mesh.pool import Pool
    from mesh.worker import Worker

_SEEN_AFTER = 1.0  # seconds after which a running input is announced, so that short ones cost nothing
_SILENCE = 2.5 * RENEW_WORKER  # seconds after which others take over the share of a worker that says nothing
_FIGURES = 2.0  # seconds that what is said of loads, for people and statistics, may be old


def share(total: int, rooms: Sequence[int], place: int) -> int:
    """How many of `total` the worker at `place` takes: one each by turns, while they have room.

    What fits nowhere is dealt out all the same: it may fit by the time it is needed.
    """
    left, taken = total, [0] * len(rooms)
    while left and (open_places := [i for i, room in enumerate(rooms) if taken[i] < room]):
        each, rest = divmod(left, len(open_places))
        for turn, i in enumerate(open_places):
            part = min(each + (turn < rest), rooms[i] - taken[i])
            taken[i] += part
            left -= part
    each, rest = divmod(left, len(rooms))
    return taken[place] + each + (place < rest)


class Fleet:
    """What a worker says to the others, and hears of them.

    Args:
        on_change: called when somebody joined, went, or does something else than before.
    """

    def __init__(self, worker: Worker, on_change: Callable[[], None]) -> None:
        self._worker = worker
        self._on_change = on_change
        self._others: dict[str, WorkerRecord] = {}
        self._heard: dict[str, float] = {}
        self._started = time.time()
        self._said: object = None
        self._figures: object = None
        self._announced = 0.0
        self._entry = 0
        self._by_pool: dict[str, list[WorkerRecord | None]] = {}

    # --- saying ------------------------------------------------------------------------------------------------------

    async def announce(self) -> None:
        """Say that this worker is alive, and what it does."""
        self._said, self._figures, self._announced = self._news(), self._loads(), time.monotonic()
        self._entry = await self._worker.broker.workers.announce(self._record())

    async def withdraw(self) -> None:
        """Say that it has ended."""
        if self._entry:
            await self._worker.broker.workers.withdraw(self._entry)

    async def tick(self) -> None:
        """Say what is new; notice who has fallen silent."""
        self._forget_silent()
        age = time.monotonic() - self._announced
        changed = age > _FIGURES and self._figures != self._loads()
        if changed or age > RENEW_WORKER or self._said != self._news():
            await self.announce()

    @property
    def _awake(self) -> Collection[Pool]:
        return self._worker.awake.values()

    def _news(self) -> object:
        """What others act on, and so must hear of at once."""
        pools = [pool for pool in self._awake if pool.scaling.is_bounded]
        bounded = {str(pool.key): (len(pool.serving), pool.scaling.in_use) for pool in pools}
        return self._running(), self._troubles(), bool(self._worker.settler.trouble), bounded

    def _loads(self) -> object:
        return [(pool.key, len(pool.serving), pool.running) for pool in self._awake if pool.containers]

    def _running(self) -> tuple[str, ...]:
        """What is announced as running: inputs that began a while ago; for a while after a reconnect, all held."""
        if self._worker.examiner.lists_all:
            return tuple(held.key for held in self._worker.held if held.lease.address is not None)
        return tuple(
            assignment.owner.key
            for pool in self._awake
            for container in pool.containers
            for assignment in container.assignments
            if assignment.began and time.monotonic() - assignment.began > _SEEN_AFTER
        )

    def _troubles(self) -> dict[str, str]:
        troubles = {
            str(pool.key): pool.trouble or (pool.refusal.summary if pool.refusal else "") for pool in self._worker.pools
        }
        return {pool: trouble for pool, trouble in troubles.items() if trouble}

    def _record(self) -> WorkerRecord:
        worker, name = self._worker, self._worker.name
        size, used, trouble = worker.offer.size, worker.capacity.used, worker.settler.trouble
        pools = {str(pool.key): pool for pool in self._awake if pool.containers}
        return WorkerRecord(
            worker=name,
            host=socket.gethostname(),
            pid=os.getpid(),
            python=platform.python_version(),
            mesh_version=mesh.__version__,
            started=self._started,
            containers=size.containers,
            used=used.containers,
            draining=worker.draining,
            running=self._running(),
            functions={key: len(pool.serving) for key, pool in pools.items()},
            inputs={key: pool.running for key, pool in pools.items() if pool.running},
            headroom={key: room for key, pool in pools.items() if (room := pool.scaling.headroom)},
            in_use=tuple(str(pool.key) for pool in self._awake if pool.scaling.is_bounded and pool.scaling.in_use),
            unfit=self._troubles(),
            trouble=trouble and f"worker {name} begins nothing until the store takes results: {trouble}",
            cpus=size.cpus,
            used_cpus=used.cpus,
            memory=size.memory,
            used_memory=used.memory,
            labels=worker.offer.labels,
            pythons=worker.offer.pythons,
        )

    # --- hearing -----------------------------------------------------------------------------------------------------

    async def listen(self) -> None:
        """Hear of the others from now on, and read who is there."""
        await self._worker.broker.workers.watch(self._hear)
        for record in await self._worker.broker.workers.all():
            self._hear(record)

    def on_reconnected(self) -> None:
        """Nobody could be heard: silence counts from now."""
        self._heard = dict.fromkeys(self._heard, time.monotonic())

    def _hear(self, record: WorkerRecord) -> None:
        if record.worker == self._worker.name:
            return
        known = self._others.get(record.worker)
        if known is not None and record.at < known.at:
            return
        self._heard[record.worker] = time.monotonic()
        self._others[record.worker] = record
        self._changed()

    def _forget_silent(self) -> None:
        if not self._worker.broker.connection.is_up:
            return  # who is not heard may be well all the same
        limit = time.monotonic() - _SILENCE
        silent = [name for name, heard in self._heard.items() if heard < limit]
        for name in silent:
            del self._heard[name], self._others[name]
        if silent:
            self._changed()

    def _changed(self) -> None:
        self._by_pool.clear()
        self._on_change()

    # --- shares ------------------------------------------------------------------------------------------------------

    @property
    def others(self) -> list[WorkerRecord]:
        """The other workers that take inputs."""
        return [record for record in self._others.values() if not record.draining and not record.trouble]

    def share(self, pool: Pool, total: int) -> int:
        """How many of so many containers, or inputs, of a pool are this worker's to see to."""
        places = self._places(pool) if total else [None]
        if len(places) == 1:
            return total
        rooms = [self._own_room(pool) if record is None else _room(pool, record) for record in places]
        return share(total, rooms, places.index(None))

    def kept(self, pool: Pool) -> int:
        """Containers of the pool's minimum that the others do not have."""
        minimum = pool.spec.min_containers
        return max(0, minimum - sum(r.functions.get(str(pool.key), 0) for r in self.others)) if minimum else 0

    def in_use_elsewhere(self, pool: Pool) -> bool:
        """Whether another worker has inputs of a pool."""
        key = str(pool.key)
        return any(key in record.in_use for record in self.others)

    def _places(self, pool: Pool) -> list[WorkerRecord | None]:
        """Who runs a pool, in the order of their turns, which is another one for each pool; `None` is this worker."""
        key = str(pool.key)
        if key not in self._by_pool:
            fit: dict[str, WorkerRecord | None] = {r.worker: r for r in self.others if key not in r.unfit}
            fit[self._worker.name] = None
            self._by_pool[key] = [fit[name] for name in sorted(fit, key=lambda name: _turn(key, name))]
        return self._by_pool[key]

    def _own_room(self, pool: Pool) -> int:
        return len(pool.serving) + pool.size.times(self._worker.capacity.free)


def _turn(key: str, worker: str) -> bytes:
    return hashlib.sha256(f"{key} {worker}".encode()).digest()


def _room(pool: Pool, record: WorkerRecord) -> int:
    """Containers of a pool that another worker has, or has room for."""
    return record.functions.get(str(pool.key), 0) + pool.size.times(Size.free_at(record))
