"""Requests to web functions, and the gateways that bring them: core messages, and a short record of each gateway.

Workers that can run a web function listen on its subject as one group, so each request goes to one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import nats.errors
from nats.aio.subscription import Subscription

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection, Unanswered
from mesh.broker.exchanges import Exchange, Exchanges, Receipt
from mesh.broker.lines import Incoming
from mesh.protocol import is_call_id
from mesh.topology import Topology

GATEWAY_TTL = 30.0  # seconds a gateway is taken as alive after it last said so
RENEW_GATEWAY = 10.0  # seconds between two such signs

_VERSION = 1  # of a request: a byte; then whether more comes, the length of a method's name, and the name
_HEAD = 3  # bytes
_KEY = "gateway-"  # in the bucket of slots, whose own keys have dots
_TOKEN = "proxy-token."  # in the bucket of what is about the environment
_WORKERS = "workers"  # the group


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that came to a worker. `has_more`: not all of it is in `body`.

    Attributes:
        method: of a class. exchange: what to answer on; who takes the request sets `exchange.told`.
    """

    subject: str
    call: str
    method: str
    has_more: bool
    body: bytes
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Listening:
    """A worker's place in the group that is given a function's requests."""

    subscription: Subscription

    async def close(self) -> None:
        """Be given no more; returns when all that was on its way has come, for which nobody else would answer."""
        with contextlib.suppress(nats.errors.Error):  # the connection is closed, or broke
            await self.subscription.drain()  # type: ignore[no-untyped-call]


def _nothing() -> None: ...


class Web:
    """Requests and gateways of an environment."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._exchanges = Exchanges(connection)
        self._bucket = Bucket(connection, topology, "slots")
        self._meta = Bucket(connection, topology, "meta")

    # --- requests ----------------------------------------------------------------------------------------------------

    async def submit(
        self, app: str, function: str, method: str, call: str, body: bytes, *, more: bool, told: Callable[[], object]
    ) -> Exchange:
        """Give a request to a worker; what its answer, or its refusal, comes by. `told`: as `Exchange` has it.

        Raises:
            Unanswered: the server is away.
        """
        if not self._connection.is_up:
            raise Unanswered("the server is away")
        await self._exchanges.open()
        exchange, reply = self._exchanges.begin(call, told)
        head = bytes((_VERSION, more, len(method))) + method.encode()
        self._connection.send(self._topology.web_subject(app, function), head + body, reply=reply)
        return exchange

    async def listen(self, app: str, function: str, on_arrival: Callable[[Arrival], None]) -> Listening:
        """Be given requests to a function, as one of its workers."""

        def deliver(message: Incoming) -> None:
            call, data = message.reply.rpartition(".")[2], message.data
            if not is_call_id(call) or len(data) < _HEAD:
                return  # nobody could be answered
            exchange = self._exchanges.answer(call, _nothing, message.reply)
            if data[0] != _VERSION:
                exchange.refuse(Receipt.AGAIN)
                return
            end = _HEAD + data[2]
            method, more = data[_HEAD:end].decode("utf-8", "replace"), bool(data[1])
            on_arrival(Arrival(message.subject, call, method, more, data[end:], exchange))

        await self._exchanges.open()
        subject = self._topology.web_subject(app, function)
        return Listening(await self._connection.listen(subject, deliver, queue=_WORKERS))

    # --- gateways ----------------------------------------------------------------------------------------------------

    async def announce(self, gateway: str, url: str) -> int:
        """Say that a gateway is alive, and where. Returns the entry's sequence."""
        return await self._bucket.put(_KEY + gateway, url.encode(), ttl=GATEWAY_TTL)

    async def withdraw(self, sequence: int) -> None:
        """Say that it has ended."""
        await self._bucket.delete(sequence)

    async def gateways(self) -> list[str]:
        """The URLs of the gateways that are alive."""
        keys = [key for key in await self._bucket.keys("*") if key.startswith(_KEY)]
        return sorted(stored.body.decode() for stored in (await self._bucket.get_many(keys)).values()) if keys else []

    # --- proxy tokens ------------------------------------------------------------------------------------------------

    async def tokens(self) -> dict[str, str]:
        """The digests of the secrets of proxy tokens, by key."""
        found = await self._meta.all(_TOKEN + "*")
        return {key.removeprefix(_TOKEN): stored.body.decode() for key, stored in found.items()}

    async def add_token(self, key: str, digest: str) -> None:
        await self._meta.put(_TOKEN + key, digest.encode())

    async def remove_token(self, key: str) -> bool:
        """Forget a token; false if there was none."""
        found = await self._meta.get(_TOKEN + key)
        return found is not None and await self._meta.delete(found.sequence)
