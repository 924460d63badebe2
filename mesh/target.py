"""What the calls of a handle go to: the app it belongs to, and what is deployed there now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mesh.exception import (
    NotFoundError,
)
from mesh.protocol import (
    Address,
    PoolKey,
    class_of,
    method_of,
)
from mesh.spec import FunctionSpec
from mesh.variant import Variant

# asyncio, nats and all that needs them are imported at first use: together they take four times as long as the rest.
if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.records import FunctionRecord, PoolRecord


_TAKEN_TTL = 3600.0  # who waits has the value at once; the copy is for lost connections


class Home(Protocol):
    """Where a function that is defined in this process belongs: its App."""

    def wire_name(self) -> str | None:
        """The app's name on the wire while it runs or is deployed; else `None`."""
        ...

    @property
    def description(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The app of a function that was looked up by name."""

    app: str

    def wire_name(self) -> str:
        return self.app

    @property
    def description(self) -> str:
        return self.app


@dataclass(frozen=True, slots=True)
class Target:
    """What the calls of a handle go to, as it is deployed now.

    Attributes:
        name: of the function, or the method. spec: the options in force. variant: what the pool's name stands for.
    """

    record: FunctionRecord
    name: str
    spec: FunctionSpec
    variant: Variant
    pool: str

    def address(self, call: str, index: int) -> Address:
        return Address(self.record.app, self.name, self.pool, call, index)

    @property
    def pool_key(self) -> PoolKey:
        return PoolKey(self.record.app, class_of(self.name), self.pool)

    def result_ttl(self, kind: str) -> float | None:
        """Seconds the results of such a call are kept; `None`: as long as the environment keeps them."""
        return self.spec.result_ttl or (None if kind in ("spawn", "spawn_map") else _TAKEN_TTL)

    def registration(self, client: str) -> PoolRecord:
        """What workers are told of the pool."""
        from mesh.records import PoolRecord

        function = class_of(self.name)
        return PoolRecord(app=self.record.app, function=function, pool=self.pool, variant=self.variant, client=client)


def target_of(record: FunctionRecord, name: str, variant: Variant) -> Target:
    spec, method = record.spec, method_of(name)
    if method and spec.methods is None:
        raise NotFoundError(f"{spec.name!r} of app {record.app!r} is a function, which has no method {method!r}")
    if method and method not in (spec.methods or ()):
        known = ", ".join(sorted(spec.methods or ()))
        raise NotFoundError(f"class {spec.name!r} of app {record.app!r} has no method {method!r}; it has {known}")
    bound = variant.of(spec)
    return Target(record, name, bound.apply(spec), bound, bound.pool)


async def lookup_failed(broker: Broker, app: str, name: str) -> str:
    """Why a function was not found, with the next step."""
    where = f"environment {broker.topology.environment!r}"
    head, _ = await broker.registry.head(app)
    if head is None:
        why = f"no app of this name is deployed in {where}; `mesh deploy FILE` deploys one"
        return f"Lookup failed for Function {name!r} from the {app!r} app: {why}"
    names = ", ".join(sorted(head.functions)) or "no functions"
    return f"Lookup failed for Function {name!r} from the {app!r} app: it has {names} ({where}, version {head.version})"
