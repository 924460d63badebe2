"""What a worker must not go on with: inputs that are cancelled, that have ended elsewhere, or whose caller has died.

A cancel comes as a request. One that was missed is found out when leases are renewed: their inputs' results are looked
for, and one that is there means stop. Short inputs, which are never renewed, cost nothing of this.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from mesh.broker import Broker
from mesh.cancel import cancel_call
from mesh.protocol import CancelRequest, token_of
from mesh.settle import Held

logger = logging.getLogger("mesh.worker")

_EARLY = 30.0  # seconds a request is kept that no input here was meant by; a delivery under way takes less
_MOST_EARLY = 10_000
_ENDED = CancelRequest(reason="it has a result already")
_GONE = CancelRequest(reason="its caller has gone")

Stop = Callable[[Held, CancelRequest], None]


class Watch:
    """Looks after the inputs that one worker holds, and after callers.

    Args:
        held: by subject, everything the worker holds. stop: ends one of them, wherever it is in the worker.
    """

    def __init__(self, broker: Broker, worker: str, held: Mapping[str, Held], stop: Stop) -> None:
        self._broker = broker
        self._worker = worker
        self._held = held
        self._stop = stop
        self._silence = broker.clients.silence
        self._up_since = time.monotonic()
        self._looking = False
        self._early: dict[str, tuple[float, CancelRequest]] = {}
        broker.connection.events.reconnected.append(self._on_reconnected)

    def _on_reconnected(self) -> None:
        self._up_since = time.monotonic()

    @property
    def _just_connected(self) -> bool:
        """Whether silence may mean that callers, like us, could not reach the server."""
        return time.monotonic() - self._up_since < self._silence

    async def start(self) -> None:
        """Take requests from now on."""
        await self._broker.cancels.listen(self._on_request, self._on_request_of_all)

    def _on_request(self, key: str, request: CancelRequest) -> bool:
        for held in self._held.values():
            if held.lease.address is not None and held.key == key:
                self._stop(held, request)
                return True
        self._remember(key, request)
        return False

    def _on_request_of_all(self, call: str, request: CancelRequest) -> list[int]:
        self._remember(call, request)  # more of it may be on its way
        ours = [held for held in self._held.values() if held.lease.address is not None and held.call == call]
        for held in ours:
            self._stop(held, request)
        return [held.lease.address.index for held in ours if held.lease.address is not None]

    def _remember(self, key: str, request: CancelRequest) -> None:
        """Keep a request for a while: the delivery it is about may be under way, and come after it."""
        now = time.monotonic()
        self._early.pop(key, None)
        self._early[key] = now, request
        while len(self._early) > _MOST_EARLY or now - next(iter(self._early.values()))[0] > _EARLY:
            del self._early[next(iter(self._early))]

    def asked_before(self, key: str) -> str:
        """Why an input that was just delivered is to be cancelled, if somebody asked for that before it came: for it,
        or for all of its call."""
        for asked in (key, key.partition(".")[0]):
            when, request = self._early.get(asked, (-_EARLY, None))
            if request is not None and time.monotonic() - when < _EARLY:
                return request.reason
        return ""

    async def look(self, renewed: Sequence[Held]) -> None:
        """Stop those of these inputs that have a result, or nobody who waits for it; one look at a time."""
        if self._looking:
            return
        self._looking = True
        try:
            await self._stop_ended([held for held in renewed if held.lease.address is not None])
            await self._stop_unwanted(renewed)
        finally:
            self._looking = False

    async def _stop_ended(self, renewed: Sequence[Held]) -> None:
        results = await self._broker.results.answers([held.key for held in renewed])
        for held in renewed:
            if held.key in results:
                self._stop(held, _ENDED)

    async def _stop_unwanted(self, renewed: Sequence[Held]) -> None:
        now = time.monotonic()
        old = [
            held
            for held in renewed
            if held.lease.input is not None and held.lease.input.awaited and now - held.since > self._silence
        ]
        if not old or self._just_connected:
            return
        missing = await self._broker.clients.missing({token_of(held.key.partition(".")[0]) for held in old})
        for held in old:
            if token_of(held.key.partition(".")[0]) in missing:
                self._stop(held, _GONE)

    async def callers(self) -> None:
        """Find callers that died, and cancel what they wait for that is still queued. Any worker may, at any time."""
        if self._just_connected:
            return
        now = await self._broker.workers.server_time(self._worker)
        clients = self._broker.clients
        silent = await clients.silent(now)
        if not silent:
            return
        awaited = await self._broker.calls.awaited_by(silent)
        # Who lives may have left an entry behind, and says anew that he waits only after some seconds of it.
        young = {token_of(call) for call, stored in awaited.items() if now - stored < self._silence}
        gone = {token for token, entry in silent.items() if token not in young and await clients.forget(entry)}
        if not gone:
            return
        logger.info("%d callers have gone; what they wait for is cancelled", len(gone))
        for call in [call for call in awaited if token_of(call) in gone]:
            await cancel_call(self._broker, call, request=_GONE)
