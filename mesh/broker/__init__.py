"""The only package that talks to NATS. `Broker` is one environment on one connection, with a noun for each part."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Self

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from mesh.background import Background
from mesh.broker import room, schema
from mesh.broker.acks import Acks
from mesh.broker.audit import Finding, audit
from mesh.broker.autoscalers import Autoscalers
from mesh.broker.blobs import Blobs
from mesh.broker.calls import Calls
from mesh.broker.cancels import Cancels
from mesh.broker.connection import (
    Connection,
    Headers,
    NoResponders,
    Stored,
    StoreError,
    Unanswered,
    translated,
)
from mesh.broker.consumers import Consumers
from mesh.broker.dead import Dead
from mesh.broker.fleet import Attempts, Clients, Locks, Runs, Workers
from mesh.broker.flows import Flows
from mesh.broker.hosts import Hosts
from mesh.broker.leases import Lease, Puller
from mesh.broker.pools import Pools
from mesh.broker.registry import Registry
from mesh.broker.results import Results
from mesh.broker.secrets import Secrets
from mesh.broker.several import Several
from mesh.broker.slots import Slots
from mesh.broker.web import Web
from mesh.config import Settings
from mesh.exception import NotFoundError
from mesh.protocol import PoolKey, new_client_token
from mesh.topology import Topology

__all__ = ["Broker", "Headers", "Lease", "NoResponders", "Puller", "StoreError", "Stored", "Unanswered", "translated"]

_PARTING_LIMIT = 5.0  # seconds


class Broker:
    """One environment, as SDK, CLI and workers see it.

    Attributes:
        token: ends the id of every call this client makes. client: how others see it, `host/pid`.
        background: what goes on after whoever began it, until the connection is closed.
        parting: what callers who have gone leave to be done; the connection waits a moment for it before it closes.
    """

    def __init__(self, connection: Connection, topology: Topology, settings: Settings) -> None:
        self.connection = connection
        self.topology = topology
        self.settings = settings
        self.token = new_client_token()
        self.client = f"{socket.gethostname()}/{os.getpid()}"
        self.background = Background()
        self.parting = Background()
        self.blobs = Blobs(connection, topology, settings.payload_limit)
        self.calls = Calls(connection, topology, self.blobs, settings.submit_timeout)
        self.results = Results(connection, topology, self.token)
        self.several = Several(connection, topology)
        self.acks = Acks(connection)
        self.cancels = Cancels(connection, topology)
        self.flows = Flows(connection, topology)
        self.web = Web(connection, topology)
        self.hosts = Hosts(connection, topology)
        self.dead = Dead(connection, topology)
        self.registry = Registry(connection, topology)
        self.pools = Pools(connection, topology)
        self.secrets = Secrets(connection, topology)
        self.autoscalers = Autoscalers(connection, topology)
        self.consumers = Consumers(connection, topology)
        self.workers = Workers(connection, topology)
        self.runs = Runs(connection, topology)
        self.clients = Clients(connection, topology, self.token, self.client, settings.caller_silence)
        self.attempts = Attempts(connection, topology)
        self.locks = Locks(connection, topology)
        self.slots = Slots(connection, topology, settings.slot_ttl)

    @classmethod
    async def open(cls, settings: Settings, *, role: str = "client") -> Self:
        """Connect to the server that the settings name.

        Raises:
            ConnectionError, AuthError: it cannot be reached, or refuses us.
        """
        name = f"mesh {role} {socket.gethostname()}/{os.getpid()}"
        connection = await Connection.open(settings.with_server(), name)
        return cls(connection, Topology(settings.environment), settings)

    def of_environment(self, environment: str) -> Broker:
        """Another environment on the same connection."""
        return Broker(self.connection, Topology(environment), self.settings)

    async def close(self) -> None:
        """Close the connection. Doing it twice is harmless."""
        await self.rest()
        await self.connection.close()

    async def rest(self) -> None:
        """End what runs in the background for this environment; the connection stays, for others."""
        await self.background.cancel()
        await self.parting.drain(_PARTING_LIMIT if self.connection.is_up else 0)
        await self.parting.cancel()
        await self.flows.close()
        await self.clients.close()
        await self.results.close()

    async def ensure(self) -> list[str]:
        """Create what is missing of the environment; returns the names of what was made."""
        return await schema.ensure(self.connection, self.topology, schema.limits_from(self.settings))

    async def mend(self, ack_wait: float) -> list[str]:
        """Make anew what is missing of the environment and holds nothing to keep; returns the names of what was."""
        limits = replace(schema.limits_from(self.settings), ack_wait=ack_wait)
        return await schema.mend(self.connection, self.topology, limits)

    async def audit(self) -> list[Finding]:
        """What is not as the topology says, and as what is deployed wants it."""
        try:
            pools = await self.registry.methods(await self.wanted_pools())
            ack_wait = await self.ack_wait()
        except (NoResponders, StoreError, NotFoundError):  # one of their buckets is gone, which the audit says
            pools, ack_wait = {}, None
        return await audit(self.connection, self.topology, pools, ack_wait)

    async def wanted_pools(self) -> set[PoolKey]:
        """The pools there should be: the shared one of each live function, and those that callers asked for."""
        heads = await self.registry.heads()
        shared = {PoolKey(head.app, name) for head in heads.values() for name in head.functions}
        own = {record.key for record in await self.pools.all()}
        return shared | {key for key in own if PoolKey(key.app, key.function) in shared}

    async def levels(self) -> list[room.Level]:
        """How full the queue, the results, the account and the store of payloads are."""
        return [*await room.levels(self.connection, self.topology), await self.blobs.level()]

    async def check(self) -> None:
        """See that the server is there, speaks JetStream, and is new enough."""
        await schema.check_server(self.connection)

    async def ack_wait(self) -> float:
        """Seconds after which an unrenewed lease goes to another worker."""
        return await schema.read_ack_wait(self.connection, self.topology)

    async def max_age(self) -> float:
        """Seconds this environment keeps results."""
        return await schema.read_max_age(self.connection, self.topology)

    # --- output of functions -----------------------------------------------------------------------------------------

    async def log(self, subject: str, text: str, headers: Headers) -> None:
        """Send output on; whoever listens gets it, and `MESH_LOGS` keeps it for a while."""
        await self.connection.publish(subject, text.encode("utf-8", "replace"), headers)

    async def follow_logs(self, app: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """Be given the output of an app's functions as it comes."""
        return await self.connection.subscribe(self.topology.log_filter(app=app), callback)
