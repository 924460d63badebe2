"""`mesh check`: whether a mesh is as it should be, as far as that can be seen over NATS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mesh.broker import Broker, StoreError, Unanswered, translated
from mesh.broker.audit import Finding
from mesh.broker.room import Level
from mesh.config import running_mesh
from mesh.exception import NotFoundError, PermissionDeniedError
from mesh.records import WorkerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was seen.

    Attributes:
        server: address and version. replicas: copies of the queue.
        durability: what a confirmed call survives. problems: what somebody must act on. notes: what is good to know.
    """

    server: str
    environment: str
    replicas: int
    durability: str
    levels: Sequence[Level]
    workers: Sequence[WorkerRecord]
    problems: Sequence[str]
    notes: Sequence[str]


async def check(broker: Broker) -> Report:
    """Look at server, environment, levels and workers.

    Raises:
        ServiceError: JetStream is off. VersionError: the server is too old.
        NotFoundError: the environment is not there at all.
    """
    await broker.check()
    async with translated("looking at the environment"):
        findings = await _findings(broker)
        missing = [finding.name for finding in findings if finding.is_missing]
        held = (broker.topology.calls, broker.topology.bucket_stream("results"))
        levels = [] if set(held) & set(missing) else await broker.levels()
        workers = [] if broker.topology.bucket_stream("workers") in missing else await broker.workers.all()
        replicas = 0 if broker.topology.calls in missing else await broker.calls.replicas()
    refusal = "" if broker.topology.bucket_stream("slots") in missing else await _refusal(broker)
    return Report(
        server=f"{broker.settings.safe_url}, nats-server {broker.connection.server_version}",
        environment=broker.topology.environment,
        replicas=replicas,
        durability=_durability(broker, replicas),
        levels=levels,
        workers=workers,
        problems=[*map(str, findings), *([refusal] if refusal else []), *_problems(levels, workers)],
        notes=list(_notes(workers)),
    )


async def _findings(broker: Broker) -> list[Finding]:
    findings = await broker.audit()
    if {broker.topology.calls, broker.topology.bucket_stream("functions")} <= {
        f.name for f in findings if f.is_missing
    }:
        raise NotFoundError(
            f"there is no environment {broker.topology.environment!r} on {broker.settings.safe_url}; `mesh init` "
            "creates it, and so do `mesh worker` and `mesh deploy`"
        )
    return findings


async def _refusal(broker: Broker) -> str:
    """Why the store takes nothing; empty if it does. Writes an entry that is gone after a second."""
    try:
        await broker.locks.claim(f"check-{broker.token}", broker.client, 1.0)
    except PermissionDeniedError:
        return ""  # somebody who may only look
    except StoreError as error:
        return f"the server takes nothing: {error}"
    except Unanswered as error:
        return (
            f"the server confirms nothing that is written ({error}): its disk may be full, which its log says; make "
            "room there, and restart it, since a stream that met a full disk takes nothing until then"
        )
    return ""


def _problems(levels: Sequence[Level], workers: Sequence[WorkerRecord]) -> Iterator[str]:
    yield from (f"{level}, so {level.refuses} are refused: {level.advice}" for level in levels if level.is_full)
    yield from (worker.trouble for worker in workers if worker.trouble)


def _notes(workers: Sequence[WorkerRecord]) -> Iterator[str]:
    if not [worker for worker in workers if not worker.draining]:
        yield "no worker takes calls; start one with `mesh worker` (or `mesh up`)"
    for worker in workers:
        yield from (f"{worker.worker} does not run {function}: {why}" for function, why in worker.unfit.items())


def _durability(broker: Broker, replicas: int) -> str:
    """What is confirmed survives a killed server in any case; the rest depends on what no client can ask for."""
    running = running_mesh(broker.settings.state_dir) or {}
    copies = f"{replicas} cop{'y' if replicas == 1 else 'ies'}"
    if running.get("nats_url") == broker.settings.nats_url and "sync" in running:
        return f"{copies}, written to disk: {running['sync']} (as `mesh up`, process {running['pid']}, set it)"
    return f"{copies}; when it is written to disk (sync_interval) only the server's configuration says"
