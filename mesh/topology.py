"""JetStream as data: every stream, bucket, consumer and subject of the mesh, and its name.

Nothing here talks to a server. Configurations are the JSON of the JetStream API (durations in nanoseconds), because
nats-py's dataclasses cannot say all of it. `docs/inspect.md` shows the same things from the operator's side; why each
setting is as it is, is said beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.exception import InvalidError
from mesh.protocol import END, Address, PoolKey, escape, is_call_id, method_of, unescape
from mesh.spec import MAX_RESULT_AGE, check_environment, check_name

WRITES_ALWAYS = (
    "sync:always"  # tag of a server whose `sync_interval` is `always`; no client can read the setting itself
)
SCHEMA = 1  # of the topology; kept in `mesh_meta` under `schema`
MIN_API_LEVEL = 4  # nats-server 2.14: work-queue details, atomic batches, republish as used here

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")
_SECOND = 1_000_000_000
MiB = 1 << 20

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an environment's streams may grow to. `None` lets `init` choose from what the account has left.

    Attributes:
        calls, results, logs, dead, blobs: bytes; the server reserves them when the stream is made.
        max_age: seconds a result is kept. ack_wait: seconds after which an unrenewed lease goes to another worker.
        replicas: copies of everything, on a cluster.
    """

    calls: int | None = None
    results: int | None = None
    logs: int | None = None
    dead: int | None = None
    blobs: int | None = None
    max_age: float = MAX_RESULT_AGE
    ack_wait: float = 15.0
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class Topology:
    """Names and configurations of one environment: a namespace of its own on the server."""

    environment: str = "main"

    def __post_init__(self) -> None:
        check_environment(self.environment)

    # --- names -------------------------------------------------------------------------------------------------------

    @property
    def root(self) -> str:
        """The first token of every subject, and the start of every bucket's name."""
        return "mesh" if self.environment == "main" else f"mesh-{self.environment}"

    def stream(self, name: str) -> str:
        """`CALLS` → `MESH_CALLS`, or `MESH-STAGING_CALLS` in the environment `staging`."""
        return f"{self.root.upper()}_{name}"

    def bucket(self, name: str) -> str:
        """`results` → `mesh_results`, or `mesh-staging_results`."""
        return f"{self.root}_{name}"

    def bucket_stream(self, name: str) -> str:
        """The stream behind a KV bucket."""
        return f"KV_{self.bucket(name)}"

    def key_subject(self, bucket: str, key: str) -> str:
        """The subject that a key of a KV bucket is."""
        return f"$KV.{self.bucket(bucket)}.{key}"

    def objects_stream(self, name: str) -> str:
        """The stream behind an object store."""
        return f"OBJ_{self.bucket(name)}"

    def object_subject(self, name: str, rest: str) -> str:
        """A subject of an object store: `C.…` of chunks, `M.…` of what describes an object."""
        return f"$O.{self.bucket(name)}.{rest}"

    @property
    def calls(self) -> str:
        return self.stream("CALLS")

    @property
    def dead(self) -> str:
        return self.stream("DEAD")

    @property
    def logs(self) -> str:
        return self.stream("LOGS")

    # --- subjects ----------------------------------------------------------------------------------------------------

    def call_subject(self, address: Address) -> str:
        """Where an input is published."""
        app, function = escape(address.app), escape(address.function)
        return f"{self.root}.call.{app}.{function}.{address.pool}.{address.call}.{address.index}"

    def call_filter(
        self, *, app: str = "*", function: str = "*", pool: str = "*", call: str = "*", index: str = "*"
    ) -> str:
        """All inputs that match: a token left out matches everything."""
        return f"{self.root}.call.{escape(app)}.{escape(function)}.{pool}.{call}.{index}"

    def parse_call(self, subject: str) -> Address:
        """The address in an input's subject.

        Raises:
            InvalidError: a part of it cannot be what its place says.
        """
        prefix = f"{self.root}.call."
        tokens = subject.removeprefix(prefix).split(".")
        if not subject.startswith(prefix) or len(tokens) != 5:
            raise InvalidError(f"{subject!r} is not the subject of a call")
        app, function, pool, call, index = tokens
        check_name("app", unescape(app))
        check_name("function", unescape(function))
        if not is_call_id(call) or not _INDEX.fullmatch(index):
            raise InvalidError(f"{subject!r} does not end with a call id (fc- and 26 characters) and an input's number")
        return Address(unescape(app), unescape(function), pool, call, int(index))

    def parse_called(self, subject: str) -> tuple[str, str, str]:
        """App, function (or method) and pool of whatever was published under `call`, be it a call or not."""
        app, function, pool = subject.removeprefix(f"{self.root}.call.").split(".")[:3]
        return unescape(app), unescape(function), pool

    def done_subject(self, call: str, index: str = "*") -> str:
        """Where the server publishes a result once it is stored."""
        return f"{self.root}.done.{call[:-8]}.{call[-8:]}.{index}"

    def done_filter(self, token: str) -> str:
        """All results of one client's calls."""
        return f"{self.root}.done.*.{token}.*"

    def ended_filter(self) -> str:
        """Where the server publishes that all of a call was cancelled, once it is stored."""
        return f"{self.root}.done.*.*.{END}"

    def deployed_subject(self, app: str = "*") -> str:
        """Where the server publishes the head of an app once it is stored."""
        return f"{self.root}.deployed.{escape(app)}"

    def pooled_subject(self) -> str:
        """Where the server publishes whatever is stored about pools."""
        return f"{self.root}.pooled.>"

    def log_subject(self, app: str, function: str, call: str, index: int | str) -> str:
        """Where the output of an input goes; a container's own has `_` for the call, and its name for the index."""
        return f"{self.root}.log.{escape(app)}.{escape(function)}.{call}.{index}"

    def log_filter(self, *, app: str, call: str = "*") -> str:
        return f"{self.root}.log.{escape(app)}.*.{call}.*"

    def dead_subject(self, address: Address) -> str:
        """Where the original of an input goes that failed for good."""
        app, function = escape(address.app), escape(address.function)
        return f"{self.root}.dead.{app}.{function}.{address.call}.{address.index}"

    def dead_filter(self, *, app: str = "*", function: str = "*", call: str = "*") -> str:
        return f"{self.root}.dead.{escape(app)}.{escape(function)}.{call}.*"

    def parse_dead(self, subject: str) -> tuple[str, str, str, int] | None:
        """App, function, call and index of a dead letter; `None` where it is no call's."""
        tokens = subject.removeprefix(f"{self.root}.dead.").split(".")
        if len(tokens) != 4 or not is_call_id(tokens[2]) or not _INDEX.fullmatch(tokens[3]):
            return None
        return unescape(tokens[0]), unescape(tokens[1]), tokens[2], int(tokens[3])

    def quarantine_subject(self, subject: str) -> str:
        """Where a message goes that is no call, with its reason: its own tokens, under `dead`."""
        return f"{self.root}.dead._malformed.{subject.removeprefix(f'{self.root}.call.')}"

    def cancel_subject(self, call: str = "*", index: str = "*") -> str:
        """Where workers listen for cancels."""
        return f"{self.root}.cancel.{call}.{index}"

    def freed_subject(self, pool: str) -> str:
        """Where workers say that a slot of a capped pool is free again; `pool` as `pool_key` has it."""
        return f"{self.root}.freed.{pool}"

    def flow_subject(self, call: str, index: int | str, way: str) -> str:
        """Where the chunks of a flow go, `out` of a container, and its reader's `credit` for them."""
        return f"{self.root}.flow.{call}.{index}.{way}"

    def web_subject(self, app: str, function: str) -> str:
        """Where the requests to a web function go, to one of the workers that listen."""
        return f"{self.root}.web.{escape(app)}.{escape(function)}"

    # --- keys --------------------------------------------------------------------------------------------------------

    def function_key(self, app: str, function: str) -> str:
        return f"{escape(app)}.{escape(function)}"

    def pool_key(self, pool: PoolKey) -> str:
        """A pool in `mesh_pools`, and the start of its slots in `mesh_slots`."""
        return f"{self.function_key(pool.app, pool.function)}.{pool.pool}"

    def autoscaler_key(self, pool: PoolKey) -> str:
        """What `update_autoscaler` has set for a pool, in the bucket of pools."""
        return f"{self.pool_key(pool)}.autoscaler"

    def parse_autoscaler(self, key: str) -> PoolKey | None:
        """Whose autoscaler a key of the bucket of pools is about; `None` if it is another kind of key."""
        tokens = key.split(".")
        if len(tokens) != 4 or tokens[3] != "autoscaler":
            return None
        return PoolKey(unescape(tokens[0]), unescape(tokens[1]), tokens[2])

    def secret_key(self, name: str, digest: str = "") -> str:
        """A secret in `mesh_secrets`: by its name, or, where it came with source and has none, by its digest."""
        return f"named.{escape(name)}" if name else f"own.{digest}"

    def host_key(self, host: str) -> str:
        """Which function a host's name leads to, in the bucket of functions."""
        return f"web.host.{escape(host)}"

    def head_key(self, app: str) -> str:
        return escape(app)

    # --- consumers ---------------------------------------------------------------------------------------------------

    def consumer(self, pool: PoolKey) -> str:
        """The durable's name. `+` is in no name, so two functions can never share one."""
        return f"{escape(pool.app)}+{escape(pool.function)}+{pool.pool}"

    def parse_consumer(self, name: str) -> PoolKey | None:
        """The pool a consumer is for; `None` if it is not one of mesh's."""
        parts = name.split("+")
        return PoolKey(unescape(parts[0]), unescape(parts[1]), parts[2]) if len(parts) == 3 else None

    def filters(self, pool: PoolKey, methods: Collection[str] = ()) -> list[str]:
        """What the consumer of a pool delivers: calls of the function, or of each method of the class."""
        names = [f"{pool.function}.{method}" for method in sorted(methods)] or [pool.function]
        return [self.call_filter(app=pool.app, function=name, pool=pool.pool) for name in names]

    def methods_in(self, filters: Collection[str]) -> set[str]:
        """The methods that a class's consumer delivers calls of."""
        return {method for filter in filters if (method := method_of(self.parse_called(filter)[1]))}

    def consumer_config(
        self, pool: PoolKey, ack_wait: float, methods: Collection[str] = (), replicas: int = 1
    ) -> Config:
        """The consumer of a pool. Methods are those of a class; none means a function."""
        filters = self.filters(pool, methods)
        return {
            "durable_name": self.consumer(pool),
            **({"filter_subjects": filters} if methods else {"filter_subject": filters[0]}),
            "ack_policy": "explicit",
            "ack_wait": int(ack_wait * _SECOND),
            "deliver_policy": "all",
            "max_deliver": -1,  # reaching it strands the message; the worker decides when to give up
            "max_ack_pending": 1_000_000,  # delayed naks count: the default of 1,000 retries would freeze a function
            "max_waiting": 4096,
            "num_replicas": replicas,
            "metadata": {"mesh.app": pool.app, "mesh.function": pool.function, "mesh.pool": pool.pool},
        }

    # --- streams -----------------------------------------------------------------------------------------------------

    def is_kept(self, stream: str) -> bool:
        """Whether a stream holds what nobody can make again. The others are made anew, empty, where they are gone."""
        passing = [
            self.logs,
            *(self.bucket_stream(name) for name in ("calls", "attempts", "workers", "slots", "apps", "meta")),
        ]
        return stream not in passing

    def streams(self, limits: Limits) -> Iterator[Config]:
        """Every stream of the environment, the largest first: where space is short, it fails before anything stands."""
        yield self._calls(limits)
        yield self._results(limits)
        yield self._objects("blobs", limits, limits.blobs)
        yield self._stream("DEAD", ["dead.>"], limits, limits.dead)
        yield self._stream("LOGS", ["log.*.*.*.*"], limits, limits.logs, max_age=int(3 * 86_400 * _SECOND))
        yield self._bucket("functions", limits, max_msgs_per_subject=20, **self._head_republish())
        yield self._bucket("pools", limits, **self._pool_republish())
        yield self._bucket("code", limits)
        yield self._objects("code", limits)
        # What a call of several inputs is, for as long as somebody may ask for what it came to.
        yield self._bucket("calls", limits, max_age=int(2 * limits.max_age * _SECOND), allow_msg_ttl=True)
        yield self._bucket("attempts", limits, max_age=int(limits.max_age * _SECOND))
        yield self._bucket("workers", limits, allow_msg_ttl=True)
        yield self._bucket("slots", limits, allow_msg_ttl=True)
        yield self._bucket("apps", limits, allow_msg_ttl=True)
        yield self._bucket("clients", limits, allow_msg_ttl=True)
        yield self._bucket("secrets", limits)
        yield self._bucket("meta", limits)

    def _calls(self, limits: Limits) -> Config:
        return {
            **self._base(self.calls, limits, limits.calls),
            # Five tokens exactly: a stray dot fails at once instead of being stored where no consumer looks.
            "subjects": [f"{self.root}.call.*.*.*.*.*"],
            "retention": "workqueue",
            # One subject cannot be queued twice at the same time, and a full queue refuses instead of forgetting.
            "max_msgs_per_subject": 1,
            "discard": "new",
            "discard_new_per_subject": True,
            "duplicate_window": 120 * _SECOND,
            "max_consumers": 10_000,  # unset means 1,000
            "allow_direct": True,
            "allow_atomic": True,
            "allow_batched": True,
            # Rollups strand other calls of the function; a message TTL deletes calls in flight; both stay off.
            "allow_rollup_hdrs": False,
        }

    def _results(self, limits: Limits) -> Config:
        subject = self.key_subject("results", "")
        return {
            **self._base(self.bucket_stream("results"), limits, limits.results),
            "subjects": [f"{subject}>"],
            "max_age": int(limits.max_age * _SECOND),  # counts from completion, because that is when it is stored
            # Created, never overwritten, by us or by anybody: the first finisher wins.
            "max_msgs_per_subject": 1,
            "discard": "new",
            "discard_new_per_subject": True,
            "allow_rollup_hdrs": False,
            "deny_delete": True,
            "deny_purge": True,
            "allow_direct": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "duplicate_window": self._window(limits.max_age),
            # Pushed after it is stored, on a subject that one subscription of the client covers.
            "republish": {
                "src": f"{subject}*.*",
                "dest": f"{self.root}.done.{{{{splitfromright(1,8)}}}}.{{{{wildcard(2)}}}}",
            },
        }

    def _head_republish(self) -> Config:
        source = self.key_subject("functions", "*")
        return {
            "allow_atomic": True,
            "republish": {"src": source, "dest": f"{self.root}.deployed.{{{{wildcard(1)}}}}"},
        }

    def _pool_republish(self) -> Config:
        return {"republish": {"src": self.key_subject("pools", ">"), "dest": f"{self.root}.pooled.>"}}

    def _bucket(self, name: str, limits: Limits, **changes: Any) -> Config:
        """A KV bucket without delete markers: with them `create` of an expired key fails. Deletes go by sequence."""
        config: Config = {
            **self._base(self.bucket_stream(name), limits, None),
            "subjects": [self.key_subject(name, ">")],
            "max_msgs_per_subject": 1,
            "discard": "new",
            "allow_direct": True,
            "allow_rollup_hdrs": True,  # what the plain `nats kv del` and `purge` need
            **changes,
        }
        if config.get("max_age"):
            config["duplicate_window"] = self._window(config["max_age"] / _SECOND)
        return config

    def _objects(self, name: str, limits: Limits, size: int | None = None) -> Config:
        return {
            **self._base(self.objects_stream(name), limits, size),
            "subjects": [self.object_subject(name, "C.>"), self.object_subject(name, "M.>")],
            "discard": "new",
            "allow_direct": True,
            "allow_rollup_hdrs": True,
        }

    def _stream(self, name: str, subjects: list[str], limits: Limits, size: int | None, **changes: Any) -> Config:
        return {
            **self._base(self.stream(name), limits, size),
            "subjects": [f"{self.root}.{subject}" for subject in subjects],
            "discard": "old",
            "allow_direct": True,
            **changes,
        }

    def _base(self, name: str, limits: Limits, size: int | None) -> Config:
        return {
            "name": name,
            "storage": "file",
            "retention": "limits",
            "num_replicas": limits.replicas,
            "max_bytes": size if size is not None else -1,
            "max_age": 0,  # said, so that one set by hand is noticed: it would delete what nobody may lose
            "metadata": {"mesh.schema": str(SCHEMA), "mesh.environment": self.environment},
        }

    @staticmethod
    def _window(max_age: float) -> int:
        """The duplicate window, which the server wants to be no longer than the stream's age."""
        return int(min(120.0, max_age) * _SECOND)


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of a stream or consumer that are not as wanted: name → (found, wanted). Metadata is not looked at."""
    return {
        name: (found.get(name), value)
        for name, value in wanted.items()
        if name != "metadata" and (found.get(name) or None) != (value or None)
    }
