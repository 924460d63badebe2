"""Looking into inputs that may have run before, before they run.

Most deliveries need no look: the first one of an input runs at once. Looked into are later deliveries, inputs whose
publish was repeated, and first deliveries of inputs that were stored before this worker last connected: a server that
is killed forgets its newest deliveries, and counts them from one again, also where the result is stored already. The
same holds for inputs that were stored before their consumer was made: it was deleted, and has forgotten everything.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from enum import Enum, auto

from mesh.background import Background
from mesh.broker import Broker, Lease
from mesh.ends import Ends
from mesh.protocol import Result, State
from mesh.settle import Held, Settler

logger = logging.getLogger("mesh.worker")

_RECENT = 30.0  # seconds in which workers list all they hold, after the server may have forgotten who has what


class Finding(Enum):
    """What a look came to."""

    RUN = auto()
    ENDED = auto()  # it has a result, and is acknowledged
    ELSEWHERE = auto()  # another worker says that it holds it


class Examiner:
    """Looks into inputs, many at a time."""

    def __init__(self, broker: Broker, settler: Settler, ends: Ends, worker: str) -> None:
        self._broker = broker
        self._settler = settler
        self._ends = ends
        self._worker = worker
        self._background = Background()
        self._waiting: list[tuple[Held, Callable[[Held, Finding], None]]] = []
        self._trusted_from = float("inf")
        self._made: dict[str, float] = {}
        self._forgotten = float("-inf")

    def on_disconnected(self) -> None:
        """The server may have been killed: nothing is trusted until its time is known again."""
        self._trusted_from = float("inf")

    def on_reconnected(self) -> None:
        self._forgotten = time.monotonic()

    def on_consumer_remade(self, consumer: str, made: float) -> None:
        """A consumer was made anew at this moment of the server's clock."""
        self._made[consumer] = made
        self._forgotten = time.monotonic()

    def trust_from(self, server_time: float) -> None:
        """First deliveries of what is stored from this moment of the server's clock on need no look."""
        self._trusted_from = server_time

    @property
    def lists_all(self) -> bool:
        """Whether a worker should list all that it holds, and not just what has run for a while."""
        return time.monotonic() - self._forgotten < _RECENT

    def needed(self, lease: Lease) -> bool:
        """Whether an input must be looked into."""
        resubmitted = lease.input is not None and lease.input.resubmit
        trusted_from = max(self._trusted_from, self._made.get(lease.consumer, 0.0))
        return lease.delivery > 1 or resubmitted or lease.stored < trusted_from

    def examine(self, held: Held, then: Callable[[Held, Finding], None]) -> None:
        """Look into an input, together with all that come in the same moment; then call `then`."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._begin)
        self._waiting.append((held, then))

    def _begin(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._background.spawn(self._examine_all(waiting))

    async def _examine_all(self, waiting: list[tuple[Held, Callable[[Held, Finding], None]]]) -> None:
        for held, _ in waiting:
            if held.lease.delivery > 1:  # after a restart such a delivery comes again at once unless it is renewed
                await held.lease.renew()
        stored = await self._settler.insist(lambda: self._broker.results.answers([held.key for held, _ in waiting]))
        for call in {held.call for held, _ in waiting if _is_cancelled(stored.get(held.key))}:
            await self._settler.insist(functools.partial(self._ends.suspect, call))
        unfinished = [held for held, _ in waiting if held.key not in stored]
        elsewhere = await self._held_elsewhere(unfinished)
        await self._settler.recall(unfinished)
        for held, then in waiting:
            self._background.spawn(self._conclude(held, then, stored.get(held.key), held.key in elsewhere))

    async def _held_elsewhere(self, open_inputs: list[Held]) -> set[str]:
        """Inputs that other workers list. Asked only about first deliveries that came too early to be trusted: a
        later delivery means that the other worker has lost its lease."""
        suspects = {held.key for held in open_inputs if held.lease.delivery == 1}
        if not suspects:
            return set()
        workers = await self._settler.insist(self._broker.workers.all)
        return {key for worker in workers if worker.worker != self._worker for key in worker.running if key in suspects}

    async def _conclude(
        self, held: Held, then: Callable[[Held, Finding], None], result: Result | None, elsewhere: bool
    ) -> None:
        if result is not None:
            await self._settler.finish_other(held.lease, result)
            then(held, Finding.ENDED)
            return
        then(held, Finding.ELSEWHERE if elsewhere else Finding.RUN)

    async def close(self) -> None:
        await self._background.cancel()


def _is_cancelled(result: Result | None) -> bool:
    return result is not None and result.state is State.CANCELLED
