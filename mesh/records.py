"""What the mesh writes down: deployed functions and apps, failed attempts, and who is at work.

Records are JSON, so that `nats kv get` shows them to a person. Fields of newer versions are ignored.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

from mesh.exception import Error, InvalidError, VersionError
from mesh.protocol import PoolKey
from mesh.spec import FunctionSpec
from mesh.variant import Variant

RECORD_VERSION = 1


@contextlib.contextmanager
def _reading(data: bytes, what: str) -> Generator[dict[str, Any]]:
    """A record's fields. Whatever is wrong with it is one kind of error, which readers of many can pass over."""
    try:
        values: dict[str, Any] = json.loads(data)
        version = int(values.get("v", RECORD_VERSION))
        if version != RECORD_VERSION:
            raise VersionError(
                f"{what} has version {version}, this mesh knows {RECORD_VERSION}: upgrade the older side"
            )
        yield values
    except Error:
        raise
    except Exception as error:  # noqa: BLE001 - the bytes may be anybody's
        raise InvalidError(f"{what} cannot be read: {error!r}") from None


def _dump(values: Mapping[str, Any]) -> bytes:
    return json.dumps({"v": RECORD_VERSION, **values}, separators=(",", ":")).encode()


def _known(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in cls.__dataclass_fields__ if name in values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Where a function's code is. By reference: a module of the bundle, and a name in the app it makes. By value: a
    cloudpickle, inline or (where large) in the code store under its digest, for one minor version of Python only.

    Attributes:
        module: imported first; `entry`, the deployed file's module, if that did not make the function.
        app: the name the module gives its App, which `deploy --name` may differ from. name: the function's in it.
    """

    module: str = ""
    entry: str = ""
    app: str | None = None
    name: str = ""
    pickled: bytes = b""
    digest: str = ""
    python: str = ""

    @property
    def by_value(self) -> bool:
        return bool(self.pickled or self.digest)

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if value}
        if self.pickled:
            values["pickled"] = base64.b64encode(self.pickled).decode()
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Code:
        known = _known(cls, values)
        if "pickled" in known:
            known["pickled"] = base64.b64decode(known["pickled"], validate=True)
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """Why a function takes no more calls."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRecord:
    """A deployed function: what it is, where its code is, and who put it there.

    Attributes:
        version: sha256 over what makes it behave as it does; never over pickle bytes, which differ at each deploy.
        bundle: digest of the app's source bundle, empty where all code is by value.
        modules: top-level names of the modules in it, which a caller may refer to by name.
        packages: versions of the packages its module imported at deploy.
        signer, signature: reserved for signed code.
    """

    app: str
    spec: FunctionSpec
    code: Code
    version: str
    bundle: str = ""
    modules: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict[str, str])
    deployed_at: float = 0.0
    deployed_by: str = ""
    removed: Removal | None = None
    signer: str = ""
    signature: str = ""

    def encode(self) -> bytes:
        values: dict[str, Any] = {
            "app": self.app,
            "spec": self.spec.to_json(),
            "code": self.code.to_json(),
            "version": self.version,
            "bundle": self.bundle,
            "modules": self.modules,
            "packages": dict(self.packages),
            "deployed_at": self.deployed_at,
            "deployed_by": self.deployed_by,
            "signer": self.signer,
            "signature": self.signature,
        }
        if self.removed:
            values["removed"] = asdict(self.removed)
        return _dump(values)

    @classmethod
    def decode(cls, data: bytes) -> FunctionRecord:
        with _reading(data, "the function's record") as fields:
            values = _known(cls, fields)
            values["spec"] = FunctionSpec.from_json(values["spec"])
            values["code"] = Code.from_json(values["code"])
            values["modules"] = tuple(values.get("modules", ()))
            if values.get("removed"):
                values["removed"] = Removal(**_known(Removal, values["removed"]))
            return cls(**values)


def verify(record: FunctionRecord) -> FunctionRecord:
    """The one way from a record to its code. Checks nothing yet: signatures come with the security work."""
    return record


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRecord:
    """A pool of its own: what its name stands for, written by whoever calls it.

    Attributes:
        variant: its options and class parameters. client: who asked for it last, and `at` when.
    """

    app: str
    function: str
    pool: str
    variant: Variant
    client: str = ""
    at: float = field(default_factory=time.time)

    @property
    def key(self) -> PoolKey:
        return PoolKey(self.app, self.function, self.pool)

    def encode(self) -> bytes:
        about = {"app": self.app, "function": self.function, "pool": self.pool, "client": self.client, "at": self.at}
        return _dump({**about, **self.variant.to_json()})

    @classmethod
    def decode(cls, data: bytes) -> PoolRecord:
        with _reading(data, "the pool's record") as fields:
            return cls(**_known(cls, fields), variant=Variant.from_json(fields))


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerRecord:
    """What `update_autoscaler` has set for a pool since the last deploy: options of `FunctionSpec`, by name."""

    options: Mapping[str, Any]

    def encode(self) -> bytes:
        return _dump({"autoscaler": dict(self.options)})

    @classmethod
    def decode(cls, data: bytes) -> AutoscalerRecord:
        with _reading(data, "the autoscaler's settings") as fields:
            return cls(options=dict(fields["autoscaler"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecord:
    """Which function a host's name leads to, as far as that function is deployed and still asks for it."""

    app: str
    function: str

    def encode(self) -> bytes:
        return _dump({"app": self.app, "function": self.function})

    @classmethod
    def decode(cls, data: bytes) -> HostRecord:
        with _reading(data, "the host's record") as fields:
            return cls(**_known(cls, fields))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """A call of several inputs: what is called, and how far its submission got.

    Attributes:
        function: or method. kind: map, starmap, for_each or spawn_map. client: who makes it.
        submitted: so many inputs, from the first on, were certainly accepted. count: how many it has, once nobody
            submits more. result_ttl: seconds its results are kept; `None`: as long as the environment keeps them.
        at: when this was written, in seconds since 1970.
    """

    call: str
    app: str
    function: str
    pool: str
    kind: str
    client: str = ""
    submitted: int = 0
    count: int | None = None
    result_ttl: float | None = None
    at: float = field(default_factory=time.time)

    def encode(self) -> bytes:
        return _dump(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> CallRecord:
        with _reading(data, "the call's record") as fields:
            return cls(**_known(cls, fields))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretRecord:
    """A secret: its variables, each sealed by itself, so that one can be replaced by who cannot read the others.

    Attributes:
        name: empty for one that came with source. sealed: by variable. public: the key it is sealed to.
    """

    name: str
    sealed: Mapping[str, str]
    public: str
    made_at: float = 0.0
    made_by: str = ""

    def encode(self) -> bytes:
        return _dump(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> SecretRecord:
        with _reading(data, "the secret's record") as fields:
            return cls(**_known(cls, fields))


class AppState(StrEnum):
    DEPLOYED = "deployed"
    EPHEMERAL = "ephemeral"  # of one `mesh run` or `app.run()`; gone soon after it ends
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppHead:
    """The newest deployment of an app. Written last, in one batch with its records, so workers act on it alone.

    Attributes:
        app: name on the wire; name: for people (they differ for a single run). version: 1 for the first deployment.
        functions: name to version of each live function.
    """

    app: str
    name: str
    version: int
    state: AppState
    functions: Mapping[str, str]
    bundle: str = ""
    tag: str = ""
    deployed_at: float = 0.0
    deployed_by: str = ""
    commit: str = ""
    mesh_version: str = ""

    def encode(self) -> bytes:
        return _dump(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> AppHead:
        with _reading(data, "the app's head") as fields:
            values = _known(cls, fields)
            values["state"] = AppState(values["state"])
            return cls(**values)


class Ending(StrEnum):
    """How one delivery of an input ended, where that was not by a result."""

    BEGAN = "began"  # not ended yet: written before a redelivered input is run, so that a lost worker is noticed
    FAILED = "failed"  # the user's code raised: counts as a try
    TIMED_OUT = "timed_out"  # counts as a try
    CRASHED = "crashed"  # the container was lost: counts against the crash budget
    OUT_OF_MEMORY = "out_of_memory"  # it was lost because it used too much memory: counts as a crash
    RETURNED = "returned"  # handed back unfinished, by a worker that stops: counts as neither
    ADOPTED = "adopted"  # its worker was delivered it again, and goes on under that delivery: counts as neither
    NOT_STARTED = "not_started"  # no container for it could start: counts as neither


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One delivery of an input that did not end it."""

    ending: Ending
    worker: str = ""
    at: float = 0.0
    error: str = ""


_TRIES = (Ending.FAILED, Ending.TIMED_OUT)
_CRASHES = (Ending.CRASHED, Ending.OUT_OF_MEMORY)
_LOSSES = (*_CRASHES, Ending.BEGAN)  # one that began, and never ended, was lost with its worker
_KEPT_ATTEMPTS = 50  # an input that is retried for days must not grow a record without bound


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptLog:
    """What is known of the deliveries of one input, by delivery number, so a stale lease counts nothing twice.

    A happy call has none: it is written only when something went wrong. The newest 50 entries are kept whole; of the
    deliveries up to `folded`, only the number of tries is.
    """

    attempts: Mapping[int, Attempt] = field(default_factory=dict[int, Attempt])
    folded: int = 0
    folded_tries: int = 0

    def with_attempt(self, delivery: int, attempt: Attempt) -> Self:
        """The log with one more entry. What a delivery ended as stays; only `began` makes way for it."""
        known = self.attempts.get(delivery)
        if delivery <= self.folded or (known is not None and known.ending is not Ending.BEGAN):
            return self
        return replace(self, attempts={**self.attempts, delivery: attempt})._fold()

    def number(self, delivery: int) -> int:
        """What a delivery is written down as: by the server's own count, but for a server that was killed, and counts
        anew what it has forgotten. Then it is one more than all that is known."""
        known = self.attempts.get(delivery)
        if delivery > self.folded and (known is None or known.ending is Ending.BEGAN):
            return delivery
        return max([self.folded, *self.attempts]) + 1

    def _fold(self) -> Self:
        """Without the oldest entries above the limit. What was lost is never folded: it ends the input long before."""
        old = [n for n, a in sorted(self.attempts.items()) if a.ending not in _LOSSES][:-_KEPT_ATTEMPTS]
        if not old:
            return self
        return replace(
            self,
            attempts={n: a for n, a in self.attempts.items() if n not in old},
            folded=max(self.folded, *old),
            folded_tries=self.folded_tries + sum(self.attempts[n].ending in _TRIES for n in old),
        )

    @property
    def tries(self) -> int:
        """Tries the user's code has used up."""
        return self.folded_tries + sum(a.ending in _TRIES for a in self.attempts.values())

    def crashes(self, delivery: int) -> list[Attempt]:
        """Containers and workers lost with this input before this `delivery`, each with its error in a few words.

        The first delivery leaves no trace if its worker dies; later ones are marked when they begin. So a delivery
        without entry counts only if it is the first: of others we know that the input had not begun.
        """
        lost = [
            a if a.ending in _CRASHES else replace(a, error=f"worker {a.worker} lost")
            for number, a in sorted(self.attempts.items())
            if a.ending in _CRASHES or (a.ending is Ending.BEGAN and number < delivery)
        ]
        untold = delivery > 1 and not self.folded and 1 not in self.attempts
        return [Attempt(ending=Ending.BEGAN, error="worker lost"), *lost] if untold else lost

    @property
    def begun(self) -> Attempt | None:
        """The newest delivery that began, and of whose end nothing is known."""
        begun = [a for _, a in sorted(self.attempts.items()) if a.ending is Ending.BEGAN]
        return begun[-1] if begun else None

    @property
    def last_error(self) -> str:
        """What went wrong most recently."""
        return next((a.error for _, a in sorted(self.attempts.items(), reverse=True) if a.error), "")

    def encode(self) -> bytes:
        entries = {number: asdict(attempt) for number, attempt in self.attempts.items()}
        return _dump({"attempts": entries, "folded": self.folded, "folded_tries": self.folded_tries})

    @classmethod
    def decode(cls, data: bytes) -> AttemptLog:
        with _reading(data, "the attempts") as fields:
            values = _known(cls, fields)
            values["attempts"] = {
                int(number): replace(Attempt(**_known(Attempt, entry)), ending=Ending(entry["ending"]))
                for number, entry in values["attempts"].items()
            }
            return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A worker that is alive: its key lives as long as it is renewed.

    Attributes:
        containers: how many it may run, and `used` how many it does; the same for the cores and the MiB of memory that
            functions claim. labels: what functions may ask of it.
        running: inputs that began a second ago or more.
        functions: pools with containers, and how many. inputs: how many inputs they run. headroom: how many more they
            could run at once. in_use: pools with a minimum or a buffer that had inputs lately.
        pythons: minor versions that images may have on it, as far as it knows.
        unfit: functions it does not run, each with the reason. trouble: why it begins nothing at all; empty if it does.
    """

    worker: str
    host: str
    pid: int
    python: str
    mesh_version: str
    started: float
    containers: int
    used: int = 0
    draining: bool = False
    running: tuple[str, ...] = ()
    functions: Mapping[str, int] = field(default_factory=dict[str, int])
    unfit: Mapping[str, str] = field(default_factory=dict[str, str])
    trouble: str = ""
    cpus: float = 0.0
    used_cpus: float = 0.0
    memory: int = 0
    used_memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    inputs: Mapping[str, int] = field(default_factory=dict[str, int])
    headroom: Mapping[str, int] = field(default_factory=dict[str, int])
    in_use: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ()
    at: float = field(default_factory=time.time)

    def encode(self) -> bytes:
        return _dump(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> WorkerRecord:
        with _reading(data, "the worker's record") as fields:
            values = _known(cls, fields)
            values["running"] = tuple(values.get("running", ()))
            values["in_use"] = tuple(values.get("in_use", ()))
            values["pythons"] = tuple(values.get("pythons", ()))
            return cls(**values)
