"""Makes an environment on a server, or says what is wrong with the one that is there."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from mesh.broker.bucket import Bucket
from mesh.broker.connection import JETSTREAM_DISABLED, NAME_IN_USE, Connection, NoResponders, StoreError, translated
from mesh.config import Settings
from mesh.exception import NotFoundError, ResourceExhaustedError, ServiceError, VersionError
from mesh.topology import MIN_API_LEVEL, SCHEMA, Config, Limits, MiB, Topology

logger = logging.getLogger("mesh.broker")

_NO_SPACE = 10047
_ASSUMED_FREE = 32 * 1024 * MiB  # where the account has no limit to take a share of; halved until the server agrees
_SMALLEST = 8 * MiB
_NO_EXPIRY = 10 * 365 * 86_400.0


def limits_from(settings: Settings) -> Limits:
    """What `init` was told about sizes and times."""
    return Limits(
        calls=settings.calls_size or None,
        results=settings.results_size or None,
        logs=settings.logs_size or None,
        dead=settings.dead_size or None,
        blobs=settings.blobs_size or None,
        max_age=settings.max_age,
        ack_wait=settings.ack_wait,
        replicas=settings.replicas,
    )


async def check_server(connection: Connection) -> dict[str, Any]:
    """What the account may use.

    Raises:
        ServiceError: JetStream is off. VersionError: the server is too old.
    """
    try:
        async with translated("asking the server for JetStream"):
            info: dict[str, Any] = await _api_info(connection)
    except NotFoundError:
        raise ServiceError("JetStream is not enabled on this server or for this account") from None
    level = int(info.get("api", {}).get("level", 0))
    if level < MIN_API_LEVEL:
        raise VersionError(
            f"the server is too old: it has JetStream API level {level}, mesh needs {MIN_API_LEVEL} "
            "(nats-server 2.14 or newer)"
        )
    return info


async def _api_info(connection: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = await connection.api("INFO")
    except StoreError as error:
        if error.code in JETSTREAM_DISABLED:
            raise NoResponders("JetStream") from error
        raise
    return answer


async def ensure(connection: Connection, topology: Topology, wanted: Limits) -> list[str]:
    """Create what is missing of the environment; leave alone what is there. Returns the names of what was made.

    Raises:
        ResourceExhaustedError: no room for a stream; the text names what is free, and the setting.
        ServiceError, VersionError: as `check_server`.
    """
    return await _make(connection, topology, wanted, [config["name"] for config in topology.streams(wanted)])


async def mend(connection: Connection, topology: Topology, wanted: Limits) -> list[str]:
    """Create what is missing of that which holds nothing to keep. Returns the names of what was made.

    Raises:
        As `ensure`.
    """
    names = [config["name"] for config in topology.streams(wanted)]
    return await _make(connection, topology, wanted, [name for name in names if not topology.is_kept(name)])


async def _make(connection: Connection, topology: Topology, wanted: Limits, names: list[str]) -> list[str]:
    info = await check_server(connection)
    existing = await _names(connection)
    missing = [name for name in names if name not in existing]
    if not missing:
        return []
    free = _free_bytes(info)
    limits = _shares(wanted, _ASSUMED_FREE if free is None else free)
    configs = {config["name"]: config for config in topology.streams(limits)}
    for name in missing:
        await _create(connection, configs[name], may_shrink=free is None)
    await _write_meta(connection, topology, limits)
    return missing


async def _names(connection: Connection) -> set[str]:
    names: set[str] = set()
    async with translated("listing streams"):
        while True:
            page = await connection.api("STREAM.NAMES", {"offset": len(names)})
            found = page.get("streams") or []
            names.update(found)
            if not found or len(names) >= page["total"]:
                return names


def _free_bytes(info: dict[str, Any]) -> int | None:
    """Storage the account has not given away yet; `None` where it has no limit."""
    maximum = int(info["limits"]["max_storage"])
    if maximum < 0:
        return None
    return max(0, maximum - max(int(info.get("reserved_storage", 0)), int(info["storage"])))


def _shares(wanted: Limits, free: int) -> Limits:
    """Sizes for what was left open: a quarter each for calls, results and payloads, a twentieth each for logs and
    dead."""
    return replace(
        wanted,
        calls=wanted.calls or free // 4,
        results=wanted.results or free // 4,
        logs=wanted.logs or free // 20,
        dead=wanted.dead or free // 20,
        blobs=wanted.blobs or free // 4,
    )


async def _create(connection: Connection, config: Config, *, may_shrink: bool) -> None:
    while True:
        try:
            await connection.api(f"STREAM.CREATE.{config['name']}", config, timeout=15)
            return
        except StoreError as error:
            if error.code == NAME_IN_USE:  # somebody else made it just now, with sizes of their own
                return
            if error.code == _NO_SPACE and may_shrink and config["max_bytes"] > _SMALLEST:
                config = {**config, "max_bytes": config["max_bytes"] // 2}
                continue
            raise _creation_error(config, error) from error


def _creation_error(config: Config, error: StoreError) -> Exception:
    settings = {"CALLS": "calls_size", "DEAD": "dead_size", "LOGS": "logs_size", "blobs": "blobs_size"}
    setting = settings.get(config["name"].rpartition("_")[2], "results_size")
    what = f"cannot create {config['name']} with {config['max_bytes']:,} bytes: {error}"
    if error.code == _NO_SPACE:
        return ResourceExhaustedError(
            f"{what}; set {setting} (MESH_{setting.upper()}) to less, or give the server more"
        )
    return ServiceError(what)


async def _write_meta(connection: Connection, topology: Topology, limits: Limits) -> None:
    meta = Bucket(connection, topology, "meta")
    async with translated("writing mesh_meta"):
        await meta.write("schema", str(SCHEMA).encode(), last=0)
        await meta.write("ack_wait", json.dumps(limits.ack_wait).encode(), last=0)


async def read_ack_wait(connection: Connection, topology: Topology) -> float:
    """Seconds after which an unrenewed lease of this environment goes to another worker."""
    async with translated("reading mesh_meta"):
        found = await Bucket(connection, topology, "meta").get("ack_wait")
    return float(json.loads(found.body)) if found else Limits().ack_wait


async def read_max_age(connection: Connection, topology: Topology) -> float:
    """Seconds this environment keeps results."""
    async with translated(f"reading how long the environment {topology.environment!r} keeps results"):
        info = await connection.api(f"STREAM.INFO.{topology.bucket_stream('results')}")
    return float(info["config"].get("max_age", 0)) / 1e9 or _NO_EXPIRY
