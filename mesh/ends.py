"""Calls of several inputs that were cancelled as a whole: a worker refuses what is delivered of them, ends what it has,
and takes out of the queue what nobody has.

It hears of them once they are stored. What was missed is found with the results that are looked for anyway: before an
input is run that may have run before, and when leases are renewed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping

from mesh.background import Background
from mesh.broker import Broker
from mesh.protocol import CancelRequest, Result
from mesh.settle import Held, Settler

logger = logging.getLogger("mesh.worker")

_KEPT = 100_000  # calls that are remembered; what is left of them in the queue is gone in minutes
_CLAIM = 20.0  # seconds one worker takes inputs of a call out of the queue before another may help
_PAUSE = 5.0  # seconds between looks whether it is done


class Ends:
    """The calls that were cancelled as a whole, as far as one worker has heard.

    Args:
        held: by subject, everything the worker holds. stop: ends one of them, wherever it is in the worker.
    """

    def __init__(
        self,
        broker: Broker,
        settler: Settler,
        worker: str,
        held: Mapping[str, Held],
        stop: Callable[[Held, CancelRequest], None],
        background: Background,
    ) -> None:
        self._broker = broker
        self._settler = settler
        self._worker = worker
        self._held = held
        self._stop = stop
        self._background = background
        self._ended: dict[str, str] = {}

    async def start(self) -> None:
        """Hear of them from now on."""
        await self._broker.several.watch(self.learn)

    def __contains__(self, call: str) -> bool:
        return call in self._ended

    def learn(self, call: str, end: Result) -> None:
        """A call was cancelled as a whole."""
        if call in self._ended:
            return
        self._ended[call] = end.error
        while len(self._ended) > _KEPT:
            del self._ended[next(iter(self._ended))]
        request = CancelRequest(reason=end.error.rpartition("cancelled: ")[2])
        for held in [held for held in self._held.values() if held.lease.address is not None and held.call == call]:
            self._stop(held, request)
        self._background.spawn(self._settler.insist(lambda: self._clear(call)))

    async def suspect(self, call: str) -> None:
        """An input was found to be cancelled: perhaps with all of its call."""
        if call not in self._ended and (found := await self._broker.results.end(call)) is not None:
            self.learn(call, found[1])

    async def _clear(self, call: str) -> None:
        """See to it that the inputs of a call leave the queue, which one worker does for all."""
        await asyncio.sleep(random.random())
        while True:
            record = await self._broker.several.find(call)
            if record is None or not await self._broker.several.queued(record):
                return
            if await self._broker.locks.claim(f"clear-{call}", self._worker, _CLAIM):
                while dropped := await self._broker.several.drop(record):  # until nothing more comes, either
                    logger.info("%s was cancelled: %d inputs taken out of the queue", call, dropped)
            else:
                await asyncio.sleep(_PAUSE)
