"""Requests to web functions, and the gateways that bring them: core messages, and a short record of each gateway.

Workers that can run a web function listen on its subject as one group, so each request goes to one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from mesh.broker.bucket import Bucket
from mesh.broker.connection import Connection
from mesh.protocol import is_call_id
from mesh.topology import Topology

GATEWAY_TTL = 30.0  # seconds a gateway is taken as alive after it last said so
RENEW_GATEWAY = 10.0  # seconds between two such signs

_KEY = "gateway-"  # in the bucket of slots, whose own keys have dots
_TOKEN = "proxy-token."  # in the bucket of what is about the environment
_WORKERS = "workers"  # the group


class Receipt(StrEnum):
    """What a worker says of a request at once."""

    TAKEN = "taken"
    AGAIN = "again"  # it does not run this function any more: another one may
    BUSY = "busy"  # too many wait


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that came to a worker. `has_more`: not all of it is in `body`."""

    connection: Connection
    subject: str
    inbox: str
    call: str
    method: str  # of a class
    has_more: bool
    body: bytes

    async def reply(self, receipt: Receipt) -> None:
        await self.connection.publish(self.inbox, receipt.encode())


@dataclass(frozen=True, slots=True)
class Listening:
    """A worker's place in the group that is given a function's requests."""

    subscription: Subscription

    async def close(self) -> None:
        """Be given no more."""
        with contextlib.suppress(nats.errors.Error):  # the connection is closed
            await self.subscription.unsubscribe()


class Web:
    """Requests and gateways of an environment."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._bucket = Bucket(connection, topology, "slots")
        self._meta = Bucket(connection, topology, "meta")

    # --- requests ----------------------------------------------------------------------------------------------------

    async def submit(self, app: str, function: str, method: str, call: str, body: bytes, *, more: bool) -> Receipt:
        """Give a request to a worker. Listen to its answer, the flow out of `call`, before this.

        Raises:
            NoResponders: no worker runs this function. Unanswered: the server is away.
        """
        headers = {"Mesh-Call": call, **({"Mesh-More": "1"} if more else {})}
        if method:
            headers["Mesh-Method"] = method
        answer = await self._connection.request(self._topology.web_subject(app, function), body, headers)
        return Receipt(answer.data.decode())

    async def listen(self, app: str, function: str, on_arrival: Callable[[Arrival], Awaitable[None]]) -> Listening:
        """Be given requests to a function, as one of its workers."""

        async def deliver(message: Msg) -> None:
            headers = message.headers or {}
            call, more = headers.get("Mesh-Call", ""), "Mesh-More" in headers
            if is_call_id(call):
                method, about = headers.get("Mesh-Method", ""), (message.subject, message.reply)
                await on_arrival(Arrival(self._connection, *about, call, method, more, message.data))

        subject = self._topology.web_subject(app, function)
        return Listening(await self._connection.subscribe(subject, deliver, queue=_WORKERS))

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
