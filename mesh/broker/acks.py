"""Acknowledgements, and how far the server is behind with them.

Where it writes to disk before anything else, each acknowledgement costs it a write, and nothing bundles them. Calls and
results go in group commits there, which are faster; so acknowledgements would pile up in the server, and with them the
renewals behind them, until leases lapsed that are held, and calls were delivered that have ended. Therefore one in
some asks to be confirmed, and who acknowledges waits when the server would take too long to get to it.
"""

from __future__ import annotations

import asyncio
import time

from mesh.broker.connection import Connection, Waiting
from mesh.broker.leases import Lease
from mesh.broker.lines import Incoming

_EVERY = 50  # acknowledgements of which one is confirmed
_BEHIND = 3.0  # seconds the server may be behind; a lease lapses after fifteen
_LOST = 30.0  # seconds without a confirmation after which none is waited for
_FIRST_RATE = 300.0  # a second, until it is known
_PAUSE = 0.05


class _Confirmation(Waiting):
    """One acknowledgement that is confirmed."""

    __slots__ = ("acks", "number")

    def __init__(self, acks: Acks, subject: str, number: int) -> None:
        super().__init__(subject, _LOST)
        self.acks = acks
        self.number = number

    def answered(self, message: Incoming) -> bool:
        self.acks.on_confirmed(self.number)
        return True

    def failed(self, error: Exception) -> None:
        self.acks.on_lost()


class Acks:
    """The acknowledgements of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent = 0
        self._confirmed = 0
        self._asked = 0  # confirmations under way
        self._at = 0.0  # when the last came, or when the first was sent after that
        self._rate = _FIRST_RATE
        self._moved = asyncio.Event()

    @property
    def behind(self) -> float:
        """Seconds until the server gets to what is sent now, about."""
        return (self._sent - self._confirmed) / self._rate

    async def send(self, lease: Lease) -> None:
        """Done: the message leaves the queue. Harmless after the lease was lost, because the result decides; which is
        stored, so nobody waits for this."""
        if not self._connection.writes_always:
            self._connection.send(lease.reply, b"+ACK", in_no_hurry=True)
            return
        while self._asked and self.behind > _BEHIND:
            self._moved.clear()
            await self._moved.wait()
        if self._sent == self._confirmed:
            self._at = time.monotonic()
        self._sent += 1
        confirmation = ""
        if not self._asked or not self._sent % _EVERY:
            confirmation = self._connection.expect(_Confirmation(self, lease.reply, self._sent))
            self._asked += 1
        self._connection.send(lease.reply, b"+ACK", reply=confirmation, in_no_hurry=True)

    def on_confirmed(self, number: int) -> None:
        """The server has got to an acknowledgement, and to those before it."""
        now, count = time.monotonic(), number - self._confirmed
        if count >= _EVERY // 2:  # a few are no measure
            self._rate = max(1.0, count / max(now - self._at, 1e-6))
        if count > 0:
            self._confirmed, self._at = number, now
        self._asked -= 1
        self._moved.set()

    def on_lost(self) -> None:
        """The connection broke: nothing is behind any more, or nobody can tell."""
        self._confirmed = self._sent
        self._asked -= 1
        self._moved.set()
