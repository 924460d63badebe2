"""How many containers a pool has and may have: reading that, and changing it while it is deployed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mesh.spec import FunctionSpec

if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.protocol import PoolKey


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionAutoscalerSettings:
    """What holds for the containers of a function, an instance's class, or what `with_options` made.

    Attributes:
        min_containers: that are always there. max_containers: that there may be; `None`: any number.
        buffer_containers: idle ones kept beside those that run. scaledown_window: seconds an idle one is kept.
    """

    min_containers: int
    max_containers: int | None
    buffer_containers: int
    scaledown_window: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionStats:
    """What goes on in these containers, over all workers; what workers say of it is two seconds old at most.

    Attributes:
        backlog: inputs that wait, those included that are to be tried again later.
        num_total_runners: containers, also those that start. num_running_inputs: inputs in them.
        input_headroom: inputs that they could take at once beside those.
    """

    backlog: int
    num_total_runners: int
    num_running_inputs: int = 0
    input_headroom: int = 0


_OPTIONS = tuple(field.name for field in dataclasses.fields(FunctionAutoscalerSettings))


async def update_autoscaler(
    broker: Broker, pool: PoolKey, spec: FunctionSpec, options: Mapping[str, Any]
) -> FunctionAutoscalerSettings:
    """Set some of a pool's settings until its app is deployed again; `spec` is what is deployed.

    Raises:
        InvalidError: a value out of its range, or together they make no sense.
    """
    from mesh.broker import translated

    given = {name: value for name, value in options.items() if value is not None}
    async with translated(f"setting the autoscaler of {pool}"):
        merged = await broker.autoscalers.update(pool, given, lambda merged: dataclasses.replace(spec, **merged))
    changed = dataclasses.replace(spec, **merged)
    return FunctionAutoscalerSettings(**{name: getattr(changed, name) for name in _OPTIONS})


async def read_stats(broker: Broker, pool: PoolKey) -> FunctionStats:
    """What goes on in a pool now."""
    from mesh.broker import translated

    async with translated(f"reading the statistics of {pool}"):
        info = await broker.consumers.info(pool) or {"num_pending": 0, "num_ack_pending": 0}
        workers = await broker.workers.all()
    key = str(pool)
    running = sum(worker.inputs.get(key, 0) for worker in workers)
    return FunctionStats(
        backlog=info["num_pending"] + max(0, info["num_ack_pending"] - running),
        num_total_runners=sum(worker.functions.get(key, 0) for worker in workers),
        num_running_inputs=running,
        input_headroom=sum(worker.headroom.get(key, 0) for worker in workers if not worker.draining),
    )
