"""Pulling inputs: what a worker asks of the pools' consumers, and the leases it gets.

One wildcard inbox serves all consumers: statuses are told apart by the inbox's last token, deliveries by the consumer
named in the ack subject. Credits count what was asked for and has not come; the server says in its statuses what it
will not deliver any more, and a reconnect voids everything.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nats.aio.subscription import Subscription

from mesh.broker.connection import Connection, Headers, status
from mesh.broker.lines import Incoming
from mesh.exception import InvalidError, VersionError
from mesh.protocol import Address, Input
from mesh.topology import Topology

logger = logging.getLogger("mesh.broker")

_NEXT = "$JS.API.CONSUMER.MSG.NEXT."
_DEAF = 2.5  # heartbeats that fail to come after which what was asked for is taken as lost


@dataclass(frozen=True, slots=True)
class Pace:
    """How a pull request waits.

    Attributes:
        expires: seconds it stays with the server.
        heartbeat: seconds between the server's signs of life while it has nothing to deliver.
    """

    expires: float
    heartbeat: float


BUSY = Pace(60.0, 10.0)
# Of a pool without containers, most of them on a worker with many functions: a lost request is noticed later, and the
# server says a third as much of having nothing.
IDLE = Pace(300.0, 30.0)


@dataclass(slots=True, eq=False)
class Lease:
    """A delivered input, held until it is acknowledged, handed back, or not renewed for the ack wait.

    Attributes:
        consumer: name of the durable it came from.
        delivery: how often it has been delivered, this time included.
        sequence: of the message in the stream. stored: when it got there, in seconds since 1970 by the server's clock.
        pending: inputs still waiting in the pool when this one was delivered.
        address: whose input it is; `None` where the subject is no call's.
        input: decoded, or `None` where `refusal` says why it cannot be run.
        renewed: when the lease was last known to be good, by the monotonic clock.
    """

    connection: Connection
    subject: str
    consumer: str
    reply: str
    delivery: int
    sequence: int
    stored: float
    pending: int
    headers: Headers
    body: bytes
    address: Address | None = None
    input: Input | None = None
    refusal: Exception | None = None
    renewed: float = field(default_factory=time.monotonic)

    def decode(self, topology: Topology) -> None:
        """Find out whose input it is, and what it says."""
        try:
            self.address = topology.parse_call(self.subject)
            self.input = Input.decode(self.address, self.headers, self.body)
        except (InvalidError, VersionError) as error:
            self.refusal = error

    async def renew(self) -> None:
        """Keep it for another ack wait."""
        self.renewed = time.monotonic()
        await self.connection.publish(self.reply, b"+WPI")

    async def nak(self, delay: float = 0.0) -> None:
        """Deliver it again, to anybody, after `delay` seconds. Without a delay that is at once."""
        body = b"-NAK" if delay <= 0 else b"-NAK " + json.dumps({"delay": int(delay * 1e9)}).encode()
        await self.connection.publish(self.reply, body)


@dataclass(slots=True)
class _Demand:
    """What was asked of one consumer."""

    outstanding: int = 0
    heard: float = 0.0
    asked: float = 0.0
    pace: Pace = BUSY


class Puller:
    """Asks consumers for inputs and hands on what they deliver.

    Args:
        on_lease: called with each delivery.
        on_void: called with a consumer's name when it will not deliver what was asked, and why: `deleted` means that
            there is no such consumer now; anything else, that it is time to ask again.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        on_lease: Callable[[Lease], None],
        on_void: Callable[[str, str], None],
    ) -> None:
        self._connection = connection
        self._topology = topology
        self._on_lease = on_lease
        self._on_void = on_void
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._demands: dict[str, _Demand] = {}

    async def start(self) -> None:
        self._inbox = self._connection.new_inbox()
        self._subscription = await self._connection.listen(f"{self._inbox}.*", self._on_message)

    async def stop(self) -> None:
        """Ask for nothing more; returns when everything the server sent before has been handed on."""
        if self._subscription is None:
            return
        subscription, self._subscription = self._subscription, None
        self._demands.clear()
        try:
            await asyncio.wait_for(subscription.drain(), 3)  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - broken or slow: what is under way comes back after the ack wait
            logger.debug("stopping to pull: %r", error)

    def outstanding(self, consumer: str) -> int:
        """Inputs that were asked for and have not come."""
        demand = self._demands.get(consumer)
        return demand.outstanding if demand else 0

    def reserve(self, consumer: str, count: int, pace: Pace = BUSY) -> None:
        """Count inputs as asked for; `ask` follows, at the same pace."""
        demand = self._demands.setdefault(consumer, _Demand())
        if not demand.outstanding or pace.heartbeat > demand.pace.heartbeat:
            demand.pace = pace  # the slowest of several requests is what silence is measured by
        demand.outstanding += count
        demand.asked = time.monotonic()

    async def ask(self, consumer: str, count: int, pace: Pace = BUSY) -> None:
        """Ask a consumer for `count` inputs more, which were reserved."""
        if self._subscription is None or not self._connection.is_up:
            return
        query = {"batch": count, "expires": int(pace.expires * 1e9), "idle_heartbeat": int(pace.heartbeat * 1e9)}
        await self._connection.publish(
            f"{_NEXT}{self._topology.calls}.{consumer}",
            json.dumps(query).encode(),
            reply=f"{self._inbox}.{consumer}",
        )

    def forget(self, consumer: str) -> None:
        """The pool is gone; what still comes from it is handed on."""
        self._demands.pop(consumer, None)

    def void_all(self) -> None:
        """The connection broke: the server has forgotten every request, and must not get those that were under way.

        They would be answered before other workers are back to renew what they hold.
        """
        for demand in self._demands.values():
            demand.outstanding = 0
        self._connection.unsend(_NEXT)

    def check(self) -> None:
        """Take back what was asked of consumers that have gone silent: the request was lost on the way."""
        now = time.monotonic()
        for consumer, demand in list(self._demands.items()):
            silent = now - max(demand.heard, demand.asked)
            if demand.outstanding and silent > _DEAF * demand.pace.heartbeat:
                logger.warning("%s: no sign of the consumer for %.0f s, asking again", consumer, silent)
                demand.outstanding = 0
                self._on_void(consumer, "silent")

    def _on_message(self, message: Incoming) -> None:
        if message.reply.startswith("$JS.ACK."):
            lease = self._lease(message)
            demand = self._demands.get(lease.consumer)
            if demand:
                demand.outstanding = max(0, demand.outstanding - 1)
                demand.heard = time.monotonic()
            self._on_lease(lease)
        else:
            self._on_status(message.subject.removeprefix(f"{self._inbox}."), message)

    def _on_status(self, consumer: str, message: Incoming) -> None:
        demand = self._demands.get(consumer)
        if demand is None:
            return
        demand.heard = time.monotonic()
        code, headers = status(message), message.headers
        if code == "100":  # a heartbeat changes nothing
            return
        description = headers.get("Description", "")
        if code == "503" or "consumer deleted" in description.lower():
            demand.outstanding = 0
            self._on_void(consumer, "deleted")
            return
        pending = headers.get("Nats-Pending-Messages")
        demand.outstanding = 0 if pending is None else max(0, demand.outstanding - int(pending))
        self._on_void(consumer, description or code)

    def _lease(self, message: Incoming) -> Lease:
        stream_and_on = message.reply.split(".")[2:]
        if len(stream_and_on) > 7:  # version 2 of the ack subject has the domain and the account first
            stream_and_on = stream_and_on[2:]
        _, consumer, delivery, sequence, _, stored, pending = stream_and_on[:7]
        lease = Lease(
            connection=self._connection,
            subject=message.subject,
            consumer=consumer,
            reply=message.reply,
            delivery=int(delivery),
            sequence=int(sequence),
            stored=int(stored) / 1e9,
            pending=int(pending),
            headers=message.headers,
            body=message.data,
        )
        lease.decode(self._topology)
        return lease
