"""What callers hold: Function, a handle on something deployed, and FunctionCall, a handle on one call of it.

Handles do no I/O until they are used. Every method that talks to the mesh has two faces: `f.spawn(…)` waits,
`await f.spawn.aio(…)` awaits.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast

from mesh import context, serialization
from mesh._sync import both, both_generators, both_static
from mesh.decorators import batching, concurrency
from mesh.exception import (
    DeprecationError,
    DeserializationError,
    ExecutionError,
    InvalidError,
    NotFoundError,
    NotReadyError,
    OutputExpiredError,
    ServerWarning,
    UnimplementedError,
)
from mesh.options import read_variant_options
from mesh.protocol import (
    SHARED_POOL,
    Address,
    CancelRequest,
    Failure,
    Format,
    Input,
    PoolKey,
    Result,
    State,
    call_time,
    class_of,
    is_call_id,
    method_of,
    new_call_id,
)
from mesh.spec import FunctionSpec, Retries, check_name
from mesh.variant import Variant

# asyncio, nats and all that needs them are imported at first use: together they take four times as long as the rest.
if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.broker.results import Waiter
    from mesh.records import FunctionRecord, PoolRecord
    from mesh.stats import FunctionAutoscalerSettings, FunctionStats
    from mesh.status import CallStatus

P = ParamSpec("P")
R = TypeVar("R")

_SILENCE = 3.0  # seconds of waiting after which a caller is told that no worker is there
_FIRST_LOOK = 1.0  # seconds the first look may take, so that what is there is found however short the timeout
_LOOK_AGAIN = 30.0  # seconds between looks whether what is waited for can still come
_REMOTE_RESULT_TTL = 3600.0  # the caller of `remote` has its value at once; the copy is for lost connections
_CLOCK_TOLERANCE = 60.0  # seconds by which a caller's clock may be off


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


class Function(Generic[P, R]):
    """A function of the mesh: made by `@app.function`, or found with `Function.from_name`."""

    def __init__(
        self,
        name: str,
        home: Home,
        *,
        environment: str | None = None,
        raw: Callable[..., Any] | None = None,
        spec: FunctionSpec | None = None,
        variant: Variant | None = None,
    ) -> None:
        """Not for users: `@app.function` and `from_name` make functions."""
        self._name = name
        self._home = home
        self._environment = environment
        self._raw = raw
        self._spec = spec
        self._variant = variant or Variant()
        self._target: Target | None = None
        if raw is not None:
            self.__doc__ = raw.__doc__
            self.__module__ = raw.__module__

    @classmethod
    def from_name(
        cls,
        app_name: str,
        name: str,
        *,
        version: int | None = None,
        environment_name: str | None = None,
        client: object = None,
    ) -> Function[..., Any]:
        """A function of a deployed app, by name. No I/O: whether it exists shows at its first use.

        Args:
            app_name: the app's name, as it was deployed. Apps of a single run are not found.
            name: the function's. Methods are found with `Cls.from_name`.
            environment_name: another environment than the configured one.

        Raises:
            InvalidError: a name that cannot be one.
        """
        if "." in check_name("function", name):
            cls_name, _, method = name.partition(".")
            raise InvalidError(
                f"Function.from_name finds functions; for the method {method!r} use "
                f"mesh.Cls.from_name({app_name!r}, {cls_name!r})().{method}"
            )
        if version is not None:
            raise UnimplementedError("Function.from_name(version=…) is not built yet")
        check_name("app", app_name)
        return Function(name, Elsewhere(app_name), environment=environment_name)

    # --- looking up --------------------------------------------------------------------------------------------------

    @both
    async def hydrate(self, /, client: object = None) -> Function[P, R]:
        """Look the function up now instead of at its first use.

        Raises:
            NotFoundError: there is no such function. ExecutionError: its app is neither running nor deployed.
        """
        await self._lookup(anew=True)
        return self

    async def _lookup(self, *, anew: bool = False) -> tuple[Broker, Target]:
        from mesh import client

        app = self._home.wire_name()
        if app is None:
            raise ExecutionError(
                f"function {self._name!r} has not been hydrated with what it needs to run on the mesh, because its "
                f"app {self._home.description!r} is not running: use `with app.run():`, `mesh run`, or deploy it and "
                "look it up with mesh.Function.from_name"
            )
        broker = await client.broker(self._environment_name())
        target = await self._find_target(broker, app, anew)
        if target.pool != SHARED_POOL:
            await broker.pools.register(target.registration(broker.client))
        return broker, target

    async def _find_target(self, broker: Broker, app: str, anew: bool) -> Target:
        record = await broker.registry.known(app, class_of(self._name), anew=anew)
        if record is None:
            raise NotFoundError(await _lookup_failed(broker, app, self._name))
        if record.removed is not None:
            raise NotFoundError(f"function {self._name!r} of app {app!r} takes no more calls: {record.removed.reason}")
        if self._target is None or self._target.record is not record:
            try:
                self._target = _target(record, self._name, self._variant)
            except (NotFoundError, TypeError, InvalidError):  # it may be newer than the record that was at hand
                if anew:
                    raise
                return await self._find_target(broker, app, anew=True)
        return self._target

    def _environment_name(self) -> str | None:
        if self._environment is not None:
            return self._environment
        here = context.container()
        return here.environment if here else None

    # --- calling -----------------------------------------------------------------------------------------------------

    @both
    async def spawn(self, /, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]:
        """Submit a call and return at once. It runs whatever becomes of this process.

        Returns:
            A handle whose `object_id` any process can turn back into one with `FunctionCall.from_id`.

        Raises:
            NotFoundError: there is no such function.
            SerializationError: an argument cannot be pickled. RequestSizeError: they are too large.
            ResourceExhaustedError: the queue is full; nothing was accepted.
            ConnectionError: no answer from the server; the call may have been accepted.
        """
        broker, target = await self._lookup()
        input = self._input(broker, target, "spawn", args, kwargs)
        await broker.calls.submit(input)
        return FunctionCall(input.address.call, environment=broker.topology.environment, address=input.address)

    @both
    async def remote(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, and wait for its value.

        Raises:
            Exception: whatever the function raised, as its own type, with the remote traceback in a note.
            FunctionTimeoutError: it ran out of time. InternalFailure: its containers were lost too often.
            RemoteError: it was cancelled. Also what `spawn` raises.

        Ctrl-C, or the end of the task or process that waits, cancels the call, unless the function has `detach=True`.
        """
        import asyncio

        broker, target = await self._lookup()
        input = self._input(broker, target, "remote", args, kwargs)
        call = FunctionCall[R](input.address.call, environment=broker.topology.environment, address=input.address)
        with context.waiting_in_mesh():
            waiter = await broker.results.expect(input.address.key)
            try:
                await broker.calls.submit(input)
                result = await call._wait(broker, waiter, caller=not input.detach)
            except asyncio.CancelledError:
                if not input.detach:
                    await call._cancel_behind(broker)
                raise
            finally:
                waiter.close()
        return call._value(broker, result)

    def local(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function in this process, as plain Python; an async one gives its coroutine.

        Raises:
            ExecutionError: it was looked up by name, so its code is not here.
        """
        return self.get_raw_f()(*args, **kwargs)

    def get_raw_f(self) -> Callable[..., Any]:
        """The function as it was defined.

        Raises:
            ExecutionError: it was looked up by name, so its code is not here.
        """
        if self._raw is None:
            raise ExecutionError(
                f"function {self._name!r} of app {self._home.description!r} was looked up by name: its code is not in "
                "this process; use .remote() or .spawn()"
            )
        return self._raw

    def _input(
        self,
        broker: Broker,
        target: Target,
        kind: str,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        *,
        call: str = "",
        index: int = 0,
    ) -> Input:
        """An input of a new call, or another one of the call of several inputs that is named."""
        spec = target.spec
        self._check_kind(kind, spec)
        main = serialization.main_name()
        main_as = main if main is not None and main.partition(".")[0] in target.record.modules else None
        format, body = serialization.encode_arguments(args, kwargs, main_as)
        running = context.current.get()
        return Input(
            address=target.address(call or new_call_id(broker.token), index),
            body=body,
            format=format,
            kind=kind,
            client=broker.client,
            parent=running.key if running else "",
            result_ttl=spec.result_ttl or (None if kind == "spawn" else _REMOTE_RESULT_TTL),
            keep_result=spec.keep_result or kind == "generator",
            detach=spec.detach,
            preview=serialization.preview(format, body) if broker.settings.preview else "",
        )

    def _check_kind(self, kind: str, spec: FunctionSpec) -> None:
        """Generators are called in one way, and nothing else is."""
        is_generator = spec.yields(method_of(self._name))
        if is_generator and kind != "generator":
            raise InvalidError(f"{self._name!r} is a generator function: use .remote_gen(), not .{kind}()")
        if kind == "generator" and not is_generator:
            raise InvalidError(f"{self._name!r} is no generator function: use .remote(), not .remote_gen()")

    def _call_of(self, broker: Broker, target: Target, call: str, index: int) -> FunctionCall[R]:
        """A handle on one input of a call of several."""
        address = target.address(call, index)
        return FunctionCall(call, environment=broker.topology.environment, address=address)

    @both_generators
    def remote_gen(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[list[Any], None]:
        """Call a generator function, and iterate over what it yields while it goes on: `for item in f.remote_gen(…)`,
        or `async for item in f.remote_gen.aio(…)`. Nothing is called before it is iterated over.

        The generator runs ahead of whoever iterates by about 1,000 items or 2 MiB, then it waits, which its `timeout`
        goes on counting. Minutes between two items are fine. Items of any size come whole.

        Raises:
            Exception: what the generator raised, after the items before it; also what `remote` raises.
            InvalidError: it is no generator function.
            SerializationError: an item cannot be pickled.
            InternalFailure: its container or worker was lost, or items on their way were. It never begins again, since
                some of its items have been taken.
            ConnectionError: the server was away for 10 s.

        Ends short of its last item only with an error. Leaving the loop early (closing the iterator), Ctrl-C, and the
        end of the process or task that iterates cancel it: its `finally` blocks run.
        """
        from mesh.reading import items

        if self._spec is not None:
            self._check_kind("generator", self._spec)
        return items(self, args, kwargs)

    # --- calling with several inputs ---------------------------------------------------------------------------------

    @both_generators
    def map(
        self,
        /,
        *input_iterators: Iterable[Any] | AsyncIterable[Any],
        kwargs: Mapping[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool | None = None,
    ) -> AsyncGenerator[list[R], None]:
        """Call the function with each item, side by side, and iterate over the values: `for value in f.map(items)`, or
        `async for value in f.map.aio(items)`. Nothing is called before it is iterated over.

        Items are read as there is room: at most 1,000 are read whose values have not been taken. So iterables, plain or
        asynchronous, may be endless or slow; plain ones are read in a thread of their own.

        Args:
            input_iterators: one for each positional argument; the shortest ends it.
            kwargs: given to each input.
            order_outputs: in the order of the items; else as they are there.
            return_exceptions: give what a failed input raised as its value, instead of ending at the first.
            wrap_returned_exceptions: exceptions are never wrapped; warns that it has no effect.

        Raises:
            Exception: at the first input that fails, what it raised; or what an iterable raised; also what `remote`
                raises. A full queue is waited for while inputs of this call are in it.

        What is left when it ends early is cancelled, unless the function has `detach=True`. When somebody cancels the
        call, it ends with `RemoteError`, also with `return_exceptions`.
        """
        return self._outputs("map", input_iterators, kwargs, order_outputs, return_exceptions, wrap_returned_exceptions)

    @both_generators
    def starmap(
        self,
        /,
        input_iterator: Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]],
        *,
        kwargs: Mapping[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool | None = None,
    ) -> AsyncGenerator[list[R], None]:
        """`map`, where each item holds all positional arguments: `f.starmap([(1, 2), (3, 4)])`."""
        return self._outputs(
            "starmap", (input_iterator,), kwargs, order_outputs, return_exceptions, wrap_returned_exceptions
        )

    @both
    async def for_each(
        self,
        /,
        *input_iterators: Iterable[Any] | AsyncIterable[Any],
        kwargs: Mapping[str, Any] | None = None,
        ignore_exceptions: bool = False,
    ) -> None:
        """`map` for its effects: returns when all inputs have ended, without their values.

        Args:
            ignore_exceptions: go on where an input fails, instead of raising what it raised.
        """
        async with contextlib.aclosing(
            self._outputs("for_each", input_iterators, kwargs, False, ignore_exceptions, None)
        ) as batches:
            async for _ in batches:
                pass

    def _outputs(
        self,
        kind: str,
        iterables: tuple[Iterable[Any] | AsyncIterable[Any], ...],
        kwargs: Mapping[str, Any] | None,
        ordered: bool,
        return_exceptions: bool,
        wrap: bool | None,
    ) -> AsyncGenerator[list[R], None]:
        from mesh.map import Wanted, outputs

        if wrap is not None:
            warnings.warn(
                "wrap_returned_exceptions has no effect: they are never wrapped", DeprecationError, stacklevel=4
            )
        if self._spec is not None:
            self._check_kind(kind, self._spec)
        wanted = Wanted(
            method=kind,
            iterables=iterables,
            kwargs=kwargs or {},
            ordered=ordered,
            return_exceptions=return_exceptions,
        )
        return outputs(self, wanted)

    # --- the same function with other options ------------------------------------------------------------------------

    def with_options(
        self,
        *,
        cpu: float | tuple[float, float] | None = None,
        memory: int | tuple[int, int] | None = None,
        gpu: object = None,
        env: Mapping[str, str | None] | None = None,
        secrets: object = None,
        volumes: object = None,
        retries: int | Retries | None = None,
        max_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
        timeout: float | None = None,
        region: object = None,
        cloud: str | None = None,
        routing_region: str | None = None,
        labels: Mapping[str, str] | None = None,
        result_ttl: float | None = None,
        keep_result: bool | None = None,
        detach: bool | None = None,
    ) -> Function[P, R]:
        """The same function with other options, of which this handle is left as it is: those of `@app.function`.

        Its calls have containers, and a `max_containers`, of their own, which they share with all that are made with
        the same options, by whomever; `min_containers` is not for them. What is not given stays as it is; options of
        several calls add up, and `env` and `labels` replace. `result_ttl`, `keep_result` and `detach` shape the calls
        alone, which then go to the same containers.

        Raises:
            InvalidError: an option out of its range; on a method, whose class has the options.
        """
        options = locals()
        if secrets or volumes:
            raise UnimplementedError("with_options(secrets=…, volumes=…) is not built yet")
        return self._with("with_options", read_variant_options(options))

    def with_concurrency(self, *, max_inputs: int, target_inputs: int | None = None) -> Function[P, R]:
        """The same function, whose containers run so many inputs at once; as `@mesh.concurrent` says it."""
        return self._with("with_concurrency", concurrency(max_inputs, target_inputs))

    def with_batching(self, *, max_batch_size: int, wait_ms: int) -> Function[P, R]:
        """The same function, run for so many inputs together; as `@mesh.batched` says it."""
        return self._with("with_batching", batching(max_batch_size, wait_ms))

    def _with(self, method: str, options: Mapping[str, Any]) -> Function[P, R]:
        if method_of(self._name):
            raise InvalidError(
                f"{self._name!r} is a method: options are those of its class, {class_of(self._name)}.{method}(…)"
            )
        return Function(
            self._name,
            self._home,
            environment=self._environment,
            raw=self._raw,
            spec=self._spec,
            variant=self._variant.with_options(options),
        )

    # --- its containers ----------------------------------------------------------------------------------------------

    @both
    async def update_autoscaler(
        self,
        /,
        *,
        min_containers: int | None = None,
        max_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
    ) -> FunctionAutoscalerSettings:
        """Change how many containers the function has, without deploying it: at once, on all workers, until its app is
        deployed again, which lets what its source says hold (also where nothing else has changed).

        What is not given stays as it was set. A handle of `with_options` changes its own containers alone.

        Raises:
            InvalidError: a value out of its range; on a method, whose instance has the containers.
        """
        from mesh.stats import update_autoscaler

        options = {
            "min_containers": min_containers,
            "max_containers": max_containers,
            "buffer_containers": buffer_containers,
            "scaledown_window": scaledown_window,
        }
        if method_of(self._name):
            raise InvalidError(
                f"{self._name!r} is a method: its containers are those of the instance, "
                f"{class_of(self._name)}(…).update_autoscaler(…)"
            )
        broker, target = await self._lookup()
        return await update_autoscaler(broker, target.pool_key, target.spec, options)

    @both
    async def get_current_stats(self, /) -> FunctionStats:
        """How many inputs wait and run, and in how many containers, over all workers."""
        from mesh.stats import read_stats

        broker, target = await self._lookup()
        return await read_stats(broker, target.pool_key)

    # --- what a handle says of itself --------------------------------------------------------------------------------

    @property
    def app(self) -> Any:
        """The App that defines it.

        Raises:
            ExecutionError: it was looked up by name.
        """
        self.get_raw_f()
        return self._home

    @property
    def spec(self) -> FunctionSpec:
        """Its options, as they were given to `@app.function`."""
        if self._spec is None:
            raise ExecutionError(f"function {self._name!r} was looked up by name: its options are not in this process")
        return self._spec

    @property
    def name(self) -> str:
        """Its name in its app."""
        return self._name

    @property
    def is_generator(self) -> bool:
        """Whether it yields: then it is called with `remote_gen`."""
        return self.spec.yields(method_of(self._name))

    @property
    def object_id(self) -> str:
        """An id for people: `fu-<app>.<function>`."""
        return f"fu-{self._home.wire_name() or self._home.description}.{self._name}"

    def __repr__(self) -> str:
        return f"mesh.Function({self._home.description!r}, {self._name!r})"

    def __reduce__(self) -> Any:
        app = self._home.wire_name()
        if app is None:
            raise InvalidError(f"{self!r} cannot be sent: its app is not running, so nobody could call it")
        environment = self._environment_name() or configured_environment()
        return _function_handle, (app, self._name, environment, self._variant)

    # --- what later issues build -------------------------------------------------------------------------------------

    def _not_built(self, what: str) -> UnimplementedError:
        return UnimplementedError(f"Function.{what} is not built yet")

    def spawn_map(self, *args: Any, **kwargs: Any) -> Any:
        """Not built yet."""
        raise self._not_built("spawn_map")

    def get_web_url(self) -> Any:
        """Not built yet."""
        raise self._not_built("get_web_url")


def configured_environment() -> str:
    """The environment that calls go to where nothing else is said."""
    from mesh import client

    return client.settings().environment


def _function_handle(app: str, name: str, environment: str, variant: Variant | None = None) -> Function[..., Any]:
    """A handle that came in a pickle; also of an app of a single run, which `from_name` would refuse."""
    return Function(name, Elsewhere(app), environment=environment, variant=variant)


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

    def registration(self, client: str) -> PoolRecord:
        """What workers are told of the pool."""
        from mesh.records import PoolRecord

        function = class_of(self.name)
        return PoolRecord(app=self.record.app, function=function, pool=self.pool, variant=self.variant, client=client)


def _target(record: FunctionRecord, name: str, variant: Variant) -> Target:
    spec, method = record.spec, method_of(name)
    if method and spec.methods is None:
        raise NotFoundError(f"{spec.name!r} of app {record.app!r} is a function, which has no method {method!r}")
    if method and method not in (spec.methods or ()):
        known = ", ".join(sorted(spec.methods or ()))
        raise NotFoundError(f"class {spec.name!r} of app {record.app!r} has no method {method!r}; it has {known}")
    bound = variant.of(spec)
    return Target(record, name, bound.apply(spec), bound, bound.pool)


async def _lookup_failed(broker: Broker, app: str, name: str) -> str:
    """Why a function was not found, with the next step."""
    where = f"environment {broker.topology.environment!r}"
    head, _ = await broker.registry.head(app)
    if head is None:
        return f"Lookup failed for Function {name!r} from the {app!r} app: no app of this name is deployed in {where}"
    names = ", ".join(sorted(head.functions)) or "no functions"
    return f"Lookup failed for Function {name!r} from the {app!r} app: it has {names} ({where}, version {head.version})"


class FunctionCall(Generic[R]):
    """A call that was submitted, whoever submitted it."""

    def __init__(self, call_id: str, *, environment: str | None = None, address: Address | None = None) -> None:
        """Not for users: `spawn` and `from_id` make these."""
        self._id = call_id
        self._environment = environment
        self._address = address

    @staticmethod
    def from_id(function_call_id: str, client: object = None) -> FunctionCall[Any]:
        """The handle on a call whose id is known. No I/O, and never fails: whether it exists shows at its first use."""
        return FunctionCall(function_call_id)

    @property
    def object_id(self) -> str:
        """The call's id, `fc-…`. Who knows it may read the result."""
        return self._id

    def __repr__(self) -> str:
        return f"mesh.FunctionCall({self._id!r})"

    def __reduce__(self) -> Any:
        return _call_handle, (self._id, self._environment)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    async def _broker(self) -> Broker:
        from mesh import client

        here = context.container()
        return await client.broker(self._environment or (here.environment if here else None))

    @both
    async def get(self, /, timeout: float | None = None, *, index: int = 0) -> R:
        """The value the call returned. Reading it does not use it up.

        Args:
            timeout: seconds to wait for it; `None` waits as long as it can still come, 0 looks once.
            index: which input's, of a call with several.

        Raises:
            TimeoutError: the builtin one (a subclass, `NotReadyError`): there is no result yet.
            OutputExpiredError: it finished, and its result is gone.
            NotFoundError: there is no such call.
            Exception: what the call itself came to; see `Function.remote`.
        """
        broker = await self._broker()
        key = self._key(index)
        if timeout is not None and timeout <= 0:
            result = await self._read(broker, key) or await self._look(broker, index)
        else:
            with context.waiting_in_mesh():
                result = await self._read_or_wait(broker, key, timeout, index)
        if result is None:
            raise NotReadyError(f"call {self._id} has no result yet")
        return self._value(broker, result)

    def _key(self, index: int) -> str:
        if not is_call_id(self._id):
            raise NotFoundError(f"there is no call {self._id!r}: a call's id is fc- and 26 characters")
        return f"{self._id}.{index}"

    async def _read(self, broker: Broker, key: str) -> Result | None:
        from mesh.broker import translated

        async with translated(f"reading the result of {self._id}"):
            return await broker.results.get(key)

    async def _read_or_wait(self, broker: Broker, key: str, timeout: float | None, index: int) -> Result:
        """Listen first, then read, then wait: whatever happens in between is not missed.

        Raises:
            NotReadyError: not within `timeout`, be it that the server is away.
        """
        import asyncio

        waiter = await broker.results.expect(key)
        try:
            async with asyncio.timeout(None if timeout is None else max(timeout, _FIRST_LOOK)):
                began = time.monotonic()
                found = await self._read_quietly(broker, key, index)
            async with asyncio.timeout(None if timeout is None else timeout - (time.monotonic() - began)):
                return found or await self._wait(broker, waiter, index)
        except TimeoutError:
            raise NotReadyError(f"call {self._id} has no result after {timeout:g} s") from None
        finally:
            waiter.close()

    async def _read_quietly(self, broker: Broker, key: str, index: int) -> Result | None:
        """The result if it is there, while the server may be away: a reconnect reads what is waited for."""
        from mesh.exception import ConnectionError as Unreachable

        try:
            found = await self._read(broker, key)
            return found if found or self._address else await self._look(broker, index)
        except Unreachable:
            return None

    async def _wait(self, broker: Broker, waiter: Waiter, index: int = 0, *, caller: bool = False) -> Result:
        """The result, once it is pushed. Looks at times whether it can still come.

        Args:
            caller: the call ends with whoever waits here, who therefore says now and then that it is alive.

        Raises:
            NotFoundError, OutputExpiredError: it cannot come any more.
        """
        found = await waiter.wait(_SILENCE)
        if found is None:
            with broker.clients.waiting() if caller else contextlib.nullcontext():
                await self._warn_without_worker(broker)
                while found is None:
                    found = await waiter.wait(_LOOK_AGAIN) or await self._look_quietly(broker, index)
        return found

    async def _look_quietly(self, broker: Broker, index: int) -> Result | None:
        """`_look`, while the server may be away: then there is nothing to see, and waiting goes on."""
        from mesh.exception import ConnectionError as Unreachable

        try:
            return await self._look(broker, index)
        except Unreachable:
            return None

    async def _look(self, broker: Broker, index: int) -> Result | None:
        """The result if it is there by now, `None` if it can still come.

        Looks in the order in which a call moves, so that it cannot slip past: the queue, then the results.

        Raises:
            NotFoundError, OutputExpiredError: neither is the case.
        """
        from mesh.broker import translated

        async with translated(f"looking for {self._id}"):
            if await broker.calls.find(self._id, index, at=self._address) is not None:
                return None
            result = await broker.results.get(self._key(index))
            if result is None:
                raise await self._gone(broker)
            return result

    async def _gone(self, broker: Broker) -> Exception:
        max_age = await broker.max_age()
        age = time.time() - call_time(self._id)
        if age > max_age:
            return OutputExpiredError(f"the result of call {self._id} was kept for {max_age:g} s, and is gone")
        if age < -_CLOCK_TOLERANCE:
            return NotFoundError(f"there is no call {self._id}: its time lies in the future")
        return NotFoundError(
            f"there is no call {self._id} in environment {broker.topology.environment!r}: it was never accepted, or "
            "its result was kept for a shorter time (`remote` keeps it an hour, `result_ttl=` as long as it says)"
        )

    async def _warn_without_worker(self, broker: Broker) -> None:
        """After some seconds of silence: say so if nobody is there to run the call."""
        from mesh.status import why_waiting

        with contextlib.suppress(Exception):  # only a hint; the wait itself finds out what is wrong
            reason = await why_waiting(broker, self._address)
            if reason:
                warnings.warn(f"call {self._id} waits: {reason}", ServerWarning, stacklevel=2)

    def _value(self, broker: Broker, result: Result) -> R:
        """The value in a result, or the exception it stands for, raised."""
        if result.state is not State.SUCCEEDED:
            raise serialization.unpack_exception(Failure.decode(result.body), unpickle=broker.settings.unpickle)
        return cast(R, self._decoded(broker, "the result", result.format, result.body))

    def _decoded(self, broker: Broker, what: str, format: Format, body: bytes) -> Any:
        """Something the function gave, as an object."""
        if format is Format.PICKLE and not broker.settings.unpickle:
            raise DeserializationError(f"{what} of {self._id} is a pickle, and MESH_UNPICKLE forbids reading those")
        try:
            return serialization.decode(format, body)
        except DeserializationError as error:
            raise ExecutionError(f"{what} of {self._id} cannot be read here: {error}") from error

    @both
    async def status(self, /, *, index: int = 0) -> CallStatus:
        """What has become of the call: state, attempts, times, worker, last error. Does not read its value.

        Raises:
            NotFoundError, OutputExpiredError: as `get`.
        """
        from mesh.broker import translated
        from mesh.status import find_status

        broker = await self._broker()
        self._key(index)
        async with translated(f"looking for {self._id}"):
            found = await find_status(broker, self._id, index, at=self._address)
        if found is None:
            raise await self._gone(broker)
        return found

    @both
    async def num_inputs(self, /) -> int:
        """How many inputs the call has: 1 for `spawn` and `remote`, of `map` as many as were submitted so far.

        Raises:
            NotFoundError, OutputExpiredError: as `get`.
        """
        from mesh.broker import translated
        from mesh.status import count_inputs

        if self._address is not None:
            return 1
        broker = await self._broker()
        self._key(0)
        async with translated(f"looking for {self._id}"):
            _, inputs = await count_inputs(broker, self._id)
        if not inputs:
            raise await self._gone(broker)
        return inputs

    @both_static
    @staticmethod
    async def gather(*calls: FunctionCall[Any], return_exceptions: bool = False) -> list[Any]:
        """The values of several calls, in their order.

        Args:
            return_exceptions: give what a failed call raised in its place, instead of raising the first one.
        """
        import asyncio

        values = await asyncio.gather(*(call.get.aio() for call in calls), return_exceptions=return_exceptions)
        return list(values)

    @both
    async def cancel(self, /, terminate_containers: bool = False) -> None:
        """End the call, wherever it is: queued, running, or waiting for another try. It is not tried again.
        Of a call of several inputs, all end.

        Returns once nothing of it runs. A call that has ended already stays as it is. `get` raises `RemoteError`
        afterwards. Code that runs gets an `InputCancellation` (async: `CancelledError`) and has time for its `finally`.

        Other inputs in its container go on. Where it cannot be interrupted (a thread in C code, a task that swallows
        its cancel), it is given up after the grace (30 s): it ends as cancelled, the container takes no more inputs,
        and is killed when the others have ended. Of a batch one input is cancelled alone; the run is interrupted with
        the last. In Modal, cancelling one of several sync inputs ends its container.

        Args:
            terminate_containers: kill its container at once instead; other inputs in it go back to the queue.

        Raises:
            NotFoundError, OutputExpiredError: as `get`.
            ServiceError: its worker has not ended it within 90 s.
        """
        from mesh.broker import translated

        broker = await self._broker()
        self._key(0)
        async with translated(f"cancelling {self._id}"):
            if await self._cancel(broker, terminate_containers) is None:
                raise await self._gone(broker)

    async def _cancel(self, broker: Broker, terminate: bool = False) -> State | None:
        from mesh.cancel import cancel_call, cancel_input

        request = CancelRequest(reason=f"by {broker.client}", terminate=terminate)
        if self._address is None:
            return await cancel_call(broker, self._id, request=request)
        return await cancel_input(broker, self._id, request=request, at=self._address)

    async def _cancel_behind(self, broker: Broker) -> None:
        """Cancel because the caller goes."""
        from mesh.behind import behind

        await behind(broker, self._cancel)

    # --- what later issues build -------------------------------------------------------------------------------------

    def iter(self, *, start: int = 0, end: int | None = None) -> Any:
        """Not built yet."""
        raise UnimplementedError("FunctionCall.iter is not built yet")

    def get_call_graph(self) -> Any:
        """Not built yet."""
        raise UnimplementedError("FunctionCall.get_call_graph is not built yet")


def _call_handle(call_id: str, environment: str | None) -> FunctionCall[Any]:
    return FunctionCall(call_id, environment=environment)
