"""From a user's module to deployed functions: import it, describe its functions, ship source and records.

A function travels by reference (a module of the bundle, and its name in the app that the module makes) wherever the
module can be imported from the bundle; by value (a cloudpickle) where not. See `docs/architecture.md` for why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import getpass
import hashlib
import importlib
import importlib.metadata
import json
import logging
import secrets
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import mesh
from mesh import hosts, image, localfiles, serialization, vault
from mesh.bundle import Bundle, collect
from mesh.cancel import cancel_queued
from mesh.exception import ConflictError, InvalidError, NotFoundError, SerializationError, ServerWarning
from mesh.protocol import PoolKey
from mesh.records import AppHead, AppState, Code, FunctionRecord, Removal

if TYPE_CHECKING:
    from mesh.app import Definition
    from mesh.broker import Broker

logger = logging.getLogger("mesh")

_INLINE_CODE = 64 << 10  # bytes of by-value code that a record holds itself; more goes to the code store


# --- importing what a user names -------------------------------------------------------------------------------------


def import_file(path: Path) -> ModuleType:
    """Import a user's file under its dotted name, so that relative imports of its package work.

    Raises:
        NotFoundError: no such file. InvalidError: it is no Python file. ImportFailed: it raised.
    """
    path = path.resolve()
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    if path.suffix != ".py" or "." in path.stem:
        raise InvalidError(f"{path} cannot be imported: its name must end with .py and hold no other dot")
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    name = ".".join(parts)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    return import_module(name)


def import_module(name: str) -> ModuleType:
    """Import a user's module by its dotted name.

    Raises:
        NotFoundError: no such module. ImportFailed: it raised.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise NotFoundError(f"there is no module {name!r} here") from None
        raise ImportFailed(name, error) from error
    except BaseException as error:  # a module may raise anything, also SystemExit
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ImportFailed(name, error) from error


class ImportFailed(InvalidError):
    """A user's module raised while it was imported; `__cause__` is what it raised."""

    def __init__(self, name: str, error: BaseException) -> None:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = (
                f"; mesh runs under {sys.executable}, which lacks {error.name!r}: run `python -m mesh` in your "
                "project's own environment"
            )
        super().__init__(
            f"module {name!r} raised while it was imported: "
            f"{type(error).__name__}: {serialization.safe_str(error)}{hint}"
        )


# --- describing functions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """What a deployment ships besides records.

    Attributes:
        entry: importable name of the module that makes the app; empty in a notebook, where all code goes by value.
    """

    entry: str
    bundle: Bundle | None
    packages: Mapping[str, str]


def find_source(entry: str, modules: Collection[str] = ()) -> Source:
    """The source of an app whose App object was made in the module `entry`, and of other modules."""
    if entry != "__main__":
        return _source(entry, None, modules)
    name = serialization.main_name()
    if name is None:
        return Source("", None, {})
    path = getattr(sys.modules["__main__"], "__file__", None)
    if "." in name and sys.modules["__main__"].__spec__ is None:
        raise InvalidError(f"{path} cannot be imported by its name, because that holds a dot: rename it")
    # Under `python -m pkg.mod` the module can be found by its name; a script's file name may be anything.
    return _source(name, None if "." in name or path is None else Path(path).resolve(), modules)


def _source(entry: str, path: Path | None, modules: Collection[str]) -> Source:
    bundle, imported = collect({entry: path, **dict.fromkeys(modules)})
    missing = {module.partition(".")[0] for module in modules} - set(bundle.modules)
    if missing:
        raise InvalidError(f"add_local_python_source: no module of yours here is named {', '.join(sorted(missing))}")
    if not bundle.files:
        raise InvalidError(
            f"module {entry!r} is not your own source (it lies in the standard library, or is installed): deploy a "
            "file of your project that imports it"
        )
    return Source(entry, bundle, _package_versions(imported))


def _package_versions(imported: set[str]) -> dict[str, str]:
    """Versions of the installed packages that modules of these names belong to."""
    owners = _owners(tuple(_changed(Path(place)) for place in sys.path))
    versions = {}
    for package in sorted({owner for name in imported for owner in owners.get(name, ())}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@functools.lru_cache(maxsize=1)
def _owners(places: tuple[float, ...]) -> Mapping[str, list[str]]:
    """The packages that have a module of a name. Reads all that is installed, so once until a place has changed."""
    return importlib.metadata.packages_distributions()


def _changed(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except OSError:  # a zip, or nothing
        return 0.0


def describe(definition: Definition, source: Source, app: str) -> tuple[FunctionRecord, bytes]:
    """The record of a function, and its by-value code where that is too large for the record.

    Raises:
        UnimplementedError, InvalidError: its image cannot be had.
        SerializationError: it must travel by value, and cannot be pickled; the text names what stops it.
    """
    code, identity = _code(definition, source)
    large = b""
    if len(code.pickled) > _INLINE_CODE:
        large = code.pickled
        code = dataclasses.replace(code, pickled=b"", digest=hashlib.sha256(large).hexdigest())
    digest = source.bundle.digest if source.bundle else ""
    spec = definition.handle.spec
    if spec.image is not None:
        image.check(spec.image, spec.name, by_value=code.by_value)
    main = serialization.main_name()
    if spec.retries is not None and main is not None and not code.by_value:
        spec = dataclasses.replace(spec, retries=spec.retries.with_main_as(main))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    version = hashlib.sha256(json.dumps([digest, identity, spec.to_json(), python], sort_keys=True).encode())
    return FunctionRecord(
        app=app,
        spec=spec,
        code=code,
        version=version.hexdigest(),
        bundle=digest,
        modules=source.bundle.modules if source.bundle else (),
        packages=source.packages,
        deployed_at=time.time(),
        deployed_by=_who(),
    ), large


def _code(definition: Definition, source: Source) -> tuple[Code, str]:
    """Where the function's code is, and what tells it apart from other code."""
    name = definition.handle.name
    module = source.entry if definition.module == "__main__" else definition.module
    if source.bundle is not None and not definition.by_value:
        if module.partition(".")[0] not in source.bundle.modules:
            module = source.entry
        code = Code(module=module, entry=source.entry, app=definition.declared, name=name)
        return code, f"{module}:{definition.declared}:{name}"
    try:
        pickled = serialization.dumps(definition.handle.get_raw_f(), None)
    except SerializationError as error:
        raise SerializationError(
            f"cannot send function {name!r} by value: {error}. Make it inside the function, or move the function to "
            "a module"
        ) from error
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Code(pickled=pickled, name=name, python=python), hashlib.sha256(pickled).hexdigest()


@functools.cache
def _who() -> str:
    with contextlib.suppress(Exception):  # no such user in a container
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return socket.gethostname()


def _commit(directory: Path) -> str:
    """The git commit of a directory, with a `*` where it has uncommitted changes; empty without git."""
    try:
        command = ["git", "-C", str(directory), "describe", "--always", "--dirty=*", "--abbrev=8", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# --- shipping --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a deploy came to. `changed` is false where everything was as it stood."""

    head: AppHead
    records: Sequence[FunctionRecord]
    changed: bool
    removed: Sequence[str]


def new_run_name() -> str:
    """The name on the wire of an app of a single run."""
    return f"ap-{secrets.token_hex(11)}"


async def deploy(
    broker: Broker,
    definitions: Sequence[Definition],
    entry: str,
    *,
    app: str,
    name: str,
    state: AppState = AppState.DEPLOYED,
    tag: str = "",
) -> Deployment:
    """Make these functions the app `app`; functions it had and has no longer are marked as removed.

    Args:
        app: its name on the wire. name: its name for people.

    Raises:
        InvalidError: nothing to deploy, or too much. ConflictError: somebody else deployed it at the same moment.
        SerializationError: code that must travel by value cannot be pickled.
    """
    from mesh.broker import translated
    from mesh.broker.registry import MAX_FUNCTIONS

    if not definitions and state is AppState.DEPLOYED:
        raise InvalidError(f"app {name!r} has no functions: decorate one with @app.function()")
    images = [d.handle.spec.image for d in definitions if d.handle.spec.image is not None]
    modules = {module for image in images for module in image.modules}
    source = await asyncio.to_thread(find_source, entry, modules)
    described = [describe(definition, source, app) for definition in definitions]
    records = [record for record, _ in described]
    async with translated(f"deploying {name}"):
        await broker.ensure()
        distinct = {(s.name, s.required, s.digest): s for record in records for s in record.spec.secrets}
        await vault.ship(broker, distinct.values())
        previous, sequence = await broker.registry.head(app)
        live = {record.spec.name: record.version for record in records}
        if previous is not None:
            await broker.autoscalers.reset(app)
        if previous is not None and previous.state is state and dict(previous.functions) == live:
            return Deployment(previous, records, False, ())
        gone = sorted(set(previous.functions) - set(live)) if previous else []
        version = previous.version + 1 if previous else 1
        removals = await _removals(broker, app, gone, f"version {version} of app {name!r} does not have it")
        if len(records) + len(removals) > MAX_FUNCTIONS:
            raise InvalidError(f"app {name!r} has {len(records)} functions; {MAX_FUNCTIONS} is the most one may have")
        await _ship_code(broker, app, source, [large for _, large in described if large])
        await _ship_files(broker, app, {digest for image in images for digest in image.packs})
        new = await _without_consumer(broker, previous, records)
        await broker.consumers.add(await _pools(broker, app, new), await broker.ack_wait())
        head = AppHead(
            app=app,
            name=name,
            version=version,
            state=state,
            functions=live,
            bundle=source.bundle.digest if source.bundle else "",
            tag=tag,
            deployed_at=time.time(),
            deployed_by=_who(),
            commit=await asyncio.to_thread(_commit, Path.cwd()) if state is AppState.DEPLOYED else "",
            mesh_version=mesh.__version__,
        )
        names = broker.hosts.messages(await hosts.claims(broker, head, records))
        await broker.registry.publish(head, [*records, *removals], sequence, names)
        await _warn_of_pythons(broker, records)
    return Deployment(head, records, True, gone)


async def _warn_of_pythons(broker: Broker, records: Sequence[FunctionRecord]) -> None:
    """Say which images need a Python that none of the workers says it has."""
    wanted = {record.spec.image.python for record in records if record.spec.image is not None} - {""}
    workers = await broker.workers.all() if wanted else []
    for python in sorted(wanted.difference(*(worker.pythons for worker in workers)) if workers else ()):
        names = ", ".join(r.spec.name for r in records if r.spec.image is not None and r.spec.image.python == python)
        warnings.warn(
            f"no worker has Python {python}, which the image of {names} needs: calls wait for one that has",
            ServerWarning,
            stacklevel=2,
        )


async def _without_consumer(
    broker: Broker, previous: AppHead | None, records: Sequence[FunctionRecord]
) -> list[FunctionRecord]:
    """Those that may need a consumer, which takes the server milliseconds: functions that are new, and all classes.
    That of a function which was there before is there, or made again by workers."""
    had = await broker.registry.functions(previous.app, previous.functions) if previous else {}
    plain = {name for name, record in had.items() if not record.spec.methods}
    return [record for record in records if record.spec.methods or record.spec.name not in plain]


async def _pools(broker: Broker, app: str, records: Sequence[FunctionRecord]) -> dict[PoolKey, Sequence[str]]:
    """Every pool of what is deployed, with the methods of classes: a new one is delivered in all of them."""
    methods = {record.spec.name: tuple(record.spec.methods or ()) for record in records}
    own = await broker.pools.of(app, [name for name, of_class in methods.items() if of_class])
    keys = [*(PoolKey(app, name) for name in methods), *(record.key for record in own)]
    return {key: methods[key.function] for key in keys}


async def _removals(broker: Broker, app: str, names: Sequence[str], reason: str) -> list[FunctionRecord]:
    """The records of functions that go, marked so."""
    known = await broker.registry.functions(app, names)
    removal = Removal(at=time.time(), reason=f"function removed: {reason}")
    return [dataclasses.replace(record, removed=removal) for record in known.values()]


async def _ship_code(broker: Broker, app: str, source: Source, large: Sequence[bytes]) -> None:
    code = broker.registry.code
    if source.bundle is not None:
        digest = source.bundle.digest
        await code.put(code.key(app, digest), await asyncio.to_thread(source.bundle.pack))
    for pickled in large:
        await code.put(code.key(app, hashlib.sha256(pickled).hexdigest()), pickled)


async def _ship_files(broker: Broker, app: str, digests: Collection[str]) -> None:
    code = broker.registry.code
    for digest in digests:
        await code.put(code.key(app, digest), await asyncio.to_thread(localfiles.packed, digest))


# --- ending apps -----------------------------------------------------------------------------------------------------


async def stop_app(broker: Broker, app: str) -> AppHead:
    """Take no more calls for an app; those queued end failed, with the reason. What runs finishes.

    Raises:
        NotFoundError: there is no such app, or it is stopped. ConflictError: it was deployed at the same moment.
    """
    head, sequence = await broker.registry.head(app)
    if head is None or head.state is AppState.STOPPED:
        stopped = "" if head is None else ", it was stopped before"
        raise NotFoundError(f"no app {app!r} is deployed in environment {broker.topology.environment!r}{stopped}")
    removals = await _removals(broker, app, sorted(head.functions), f"app {app!r} was stopped by {_who()}")
    stopped_head = dataclasses.replace(
        head,
        version=head.version + 1,
        state=AppState.STOPPED,
        functions={},
        deployed_at=time.time(),
        deployed_by=_who(),
    )
    try:
        await broker.registry.publish(stopped_head, removals, sequence)
    except ConflictError:
        raise ConflictError(f"app {app!r} was deployed or stopped by somebody else at the same moment") from None
    return stopped_head


async def end_run(broker: Broker, app: str) -> None:
    """Leave nothing of an app of a single run but results: its queued calls end cancelled, the rest goes.

    Done by its client when it ends, and by any worker when the client lapses. Doing it twice, or at once, is harmless.
    """
    head, sequence = await broker.registry.head(app)
    if head is not None and head.state is not AppState.STOPPED:
        ended = dataclasses.replace(head, version=head.version + 1, state=AppState.STOPPED, functions={})
        with contextlib.suppress(ConflictError):
            await broker.registry.publish(ended, [], sequence)
    consumers = [PoolKey(app, name) for name in await broker.registry.recorded(app)]
    consumers += [record.key for record in await broker.pools.all(broker.topology.pool_key(PoolKey(app, "*", "*")))]
    await cancel_queued(broker, app, f"app {head.name if head else app!r} ended")
    for pool in consumers:
        await broker.consumers.remove(broker.topology.consumer(pool))
    # What was published between the two is nobody's now: once more.
    await cancel_queued(broker, app, f"app {head.name if head else app!r} ended")
    await broker.autoscalers.erase(app)
    await broker.pools.erase(app)
    await broker.hosts.erase(app)
    await broker.registry.erase(app)
    await broker.registry.code.erase(app)
    await broker.runs.end(app)
