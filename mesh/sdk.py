"""Function: a handle on something deployed, by which it is called.

Handles do no I/O until they are used. Every method that talks to the mesh has two faces: `f.spawn(…)` waits,
`await f.spawn.aio(…)` awaits.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from mesh import context, serialization
from mesh._sync import both, both_generators
from mesh.call import FunctionCall
from mesh.decorators import batching, concurrency
from mesh.exception import (
    DeprecationError,
    ExecutionError,
    InvalidError,
    NotFoundError,
    UnimplementedError,
)
from mesh.options import read_variant_options
from mesh.payload import Pieces
from mesh.protocol import (
    SEVERAL,
    SHARED_POOL,
    Input,
    class_of,
    method_of,
    new_call_id,
)
from mesh.secret import Secret
from mesh.spec import FunctionSpec, Retries, check_name
from mesh.target import Elsewhere, Home, Target, lookup_failed, target_of
from mesh.variant import Variant

# asyncio, nats and all that needs them are imported at first use: together they take four times as long as the rest.
if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.inputs import Wanted
    from mesh.stats import FunctionAutoscalerSettings, FunctionStats

P = ParamSpec("P")
R = TypeVar("R")


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
        from mesh import client, vault

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
            if target.variant.secrets and not broker.pools.is_registered(target.pool_key):
                await vault.ship(broker, target.variant.secrets)
            await broker.pools.register(target.registration(broker.client))
        return broker, target

    async def _find_target(self, broker: Broker, app: str, anew: bool) -> Target:
        record = await broker.registry.known(app, class_of(self._name), anew=anew)
        if record is None:
            raise NotFoundError(await lookup_failed(broker, app, self._name))
        if record.removed is not None:
            raise NotFoundError(f"function {self._name!r} of app {app!r} takes no more calls: {record.removed.reason}")
        if self._target is None or self._target.record is not record:
            try:
                self._target = target_of(record, self._name, self._variant)
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
            SerializationError: an argument cannot be pickled.
            RequestSizeError: the arguments are larger than the setting `payload_limit` allows (1 GiB).
            ResourceExhaustedError: the queue, or the store of large arguments, is full; nothing was accepted.
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
        return await call._value(broker, result)

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
        pieces = body if isinstance(body, Pieces) and kind not in SEVERAL else None  # whose iterable may reuse it
        running = context.current.get()
        return Input(
            address=target.address(call or new_call_id(broker.token), index),
            body=bytes(body) if pieces is None else b"",
            pieces=pieces,
            format=format,
            kind=kind,
            client=broker.client,
            parent=running.key if running else "",
            result_ttl=target.result_ttl(kind),
            keep_result=spec.keep_result or kind == "generator",
            detach=spec.detach,
            preview=serialization.preview(format, body) if broker.settings.preview else "",
        )

    def _check_kind(self, kind: str, spec: FunctionSpec) -> None:
        """Generators are called in one way, and nothing else is; a class only by its methods; no web function is."""
        method = method_of(self._name)
        if spec.methods is not None and not method:
            raise InvalidError(
                f"{self._name!r} is a class: call a method of an instance of it, "
                f"mesh.Cls.from_name({self._home.description!r}, {self._name!r})().{next(iter(spec.methods))}"
            )
        if self._name in spec.webs:
            raise InvalidError(
                f"{self._name!r} is a web function: it answers HTTP requests at {self._name}.get_web_url(), and cannot "
                f"be called with .{kind}()"
            )
        is_generator = spec.yields(method)
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

    @both
    async def spawn_map(
        self,
        /,
        *input_iterators: Iterable[Any] | AsyncIterable[Any],
        kwargs: Mapping[str, Any] | None = None,
    ) -> FunctionCall[R]:
        """`map` that leaves its inputs to run, whatever becomes of this process: returns once all are accepted.

        Returns:
            A handle on all of them (Modal returns `None`): `get(index=…)`, `iter()`, `num_inputs()`, `status()`,
            `cancel()`; by its `object_id` in any process, also while this one still submits. On a terminal, stderr
            shows how far that is.

        Raises:
            Exception: what an iterable raised; what `spawn` raises. A full queue is waited for while inputs of this
                call are in it. RemoteError: somebody cancelled the call.

        When it raises, and at Ctrl-C, what was submitted is cancelled, unless the function has `detach=True`. When its
        process dies half-way, what was submitted runs, and the handle says how far it got.
        """
        from mesh.submission import spawn_map

        return await spawn_map(self, self._wanted("spawn_map", input_iterators, kwargs))

    def _wanted(
        self,
        method: str,
        iterables: tuple[Iterable[Any] | AsyncIterable[Any], ...],
        kwargs: Mapping[str, Any] | None,
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> Wanted:
        from mesh.inputs import Wanted

        if self._spec is not None:
            self._check_kind(method, self._spec)
        return Wanted(
            method=method,
            iterables=iterables,
            kwargs=kwargs or {},
            ordered=ordered,
            return_exceptions=return_exceptions,
        )

    def _outputs(
        self,
        kind: str,
        iterables: tuple[Iterable[Any] | AsyncIterable[Any], ...],
        kwargs: Mapping[str, Any] | None,
        ordered: bool,
        return_exceptions: bool,
        wrap: bool | None,
    ) -> AsyncGenerator[list[R], None]:
        from mesh.map import outputs

        if wrap is not None:
            warnings.warn(
                "wrap_returned_exceptions has no effect: they are never wrapped", DeprecationError, stacklevel=4
            )
        return outputs(self, self._wanted(kind, iterables, kwargs, ordered, return_exceptions))

    # --- the same function with other options ------------------------------------------------------------------------

    def with_options(
        self,
        *,
        cpu: float | tuple[float, float] | None = None,
        memory: int | tuple[int, int] | None = None,
        gpu: object = None,
        env: Mapping[str, str | None] | None = None,
        secrets: Sequence[Secret] | None = None,
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
        several calls add up, and `env`, `labels` and `secrets` replace. `result_ttl`, `keep_result` and `detach` shape
        the calls alone, which then go to the same containers.

        Raises:
            InvalidError: an option out of its range; on a method, whose class has the options.
        """
        options = locals()
        if volumes:
            raise UnimplementedError("with_options(volumes=…) is not built yet")
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

    # --- its place on the web ----------------------------------------------------------------------------------------

    @both
    async def get_web_url(self, /) -> str | None:
        """Where a web function answers requests, without a slash at its end; `None` if it is no web function.

        It stays the same from deployment to deployment, while the gateway does.

        Raises:
            ServiceError: no gateway is running. Also what `hydrate` raises.
        """
        from mesh.place import web_url

        broker, target = await self._lookup()
        if self._name not in target.spec.webs:
            return None
        if target.pool != SHARED_POOL:
            raise InvalidError(
                f"{self._name!r} answers requests in containers with the parameters and options of its source: ask for "
                "get_web_url() of those"
            )
        return await web_url(broker, target.pool_key.app, self._name)

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


def configured_environment() -> str:
    """The environment that calls go to where nothing else is said."""
    from mesh import client

    return client.settings().environment


def _function_handle(app: str, name: str, environment: str, variant: Variant | None = None) -> Function[..., Any]:
    """A handle that came in a pickle; also of an app of a single run, which `from_name` would refuse."""
    return Function(name, Elsewhere(app), environment=environment, variant=variant)
