"""App and its decorators: a user's functions under one name, run once (`app.run`) or deployed (`app.deploy`)."""

from __future__ import annotations

import inspect
import logging
import sys
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, Self, TypeVar, cast, dataclass_transform, overload

from mesh import context
from mesh._sync import both, both_static
from mesh.apprun import AppRun, refuse_in_container
from mesh.cls import Cls, describe_class, parameter
from mesh.decorators import function_options
from mesh.exception import InvalidError, NotFoundError, UnimplementedError
from mesh.image import Image
from mesh.options import read_options
from mesh.sdk import Function
from mesh.secret import Secret
from mesh.spec import Cron, FunctionSpec, Period, Retries, check_app_name
from mesh.web import web_options

if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.deploy import Deployment

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
H = TypeVar("H", bound="Function[Any, Any] | Cls")

logger = logging.getLogger("mesh")

_apps: list[App] = []  # every App of this process, in the order they were made


class _Decorator(Protocol):
    """What `@app.function(…)` is: an async function's value is what it returns when awaited."""

    @overload
    def __call__(self, raw_f: Callable[P, Coroutine[Any, Any, R]], /) -> Function[P, R]: ...
    @overload
    def __call__(self, raw_f: Callable[P, AsyncGenerator[R, Any]], /) -> Function[P, R]: ...
    @overload
    def __call__(self, raw_f: Callable[P, Generator[R, Any, Any]], /) -> Function[P, R]: ...
    @overload
    def __call__(self, raw_f: Callable[P, R], /) -> Function[P, R]: ...


class _ClassDecorator(Protocol):
    """What `@app.cls(…)` is. For type checkers a class of the mesh is the class itself, with what `Cls` adds."""

    def __call__(self, raw: type[T], /) -> type[T]: ...


class LocalEntrypoint(Generic[P, R]):
    """A function that `mesh run` runs on this machine. Called in Python, it is the plain function."""

    def __init__(self, name: str, raw: Callable[P, R], app: App) -> None:
        self.name = name
        self.app = app
        self._raw = raw
        self.__doc__ = raw.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._raw(*args, **kwargs)

    def get_raw_f(self) -> Callable[P, R]:
        """The function as it was defined."""
        return self._raw


@dataclass(frozen=True, slots=True)
class Definition:
    """A function, or a class, as its App registered it.

    Attributes:
        handle: what the name stands for in its module. module: name of the module that applied the decorator.
        declared: the App's own name there. by_value: `serialized=True`.
    """

    handle: Function[Any, Any] | Cls
    module: str
    declared: str | None
    by_value: bool


class App:
    """A group of functions that are deployed together.

    Args:
        name: what it is deployed and looked up as; needed only for that.
        tags: labels, kept with the app. secrets: what all its functions get, before their own.
        include_source: exists for code written for Modal; source always travels.

    Raises:
        InvalidError: a name that cannot be one.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        image: Image | None = None,
        secrets: Sequence[Secret] = (),
        volumes: Mapping[str, object] | None = None,
        include_source: bool = True,
    ) -> None:
        self._name = None if name is None else check_app_name(name)
        self._tags = dict(tags or {})
        self._image = image
        self._secrets = list(secrets)
        self._volumes = dict(volumes or {})
        self._module: str = sys._getframe(1).f_globals.get("__name__", "__main__")
        self._definitions: dict[str, Definition] = {}
        self._entrypoints: dict[str, LocalEntrypoint[..., Any]] = {}
        self._unbuilt: dict[str, str] = {}
        self._included_in: list[App] = []
        self._wire: str | None = None
        self._app_id: str | None = None
        _apps.append(self)

    # --- what it says of itself --------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The name it was given."""
        return self._name

    @property
    def app_id(self) -> str | None:
        """Its name on the wire since it last ran or was deployed: `ap-…` for a single run; `None` before."""
        return self._app_id

    @property
    def description(self) -> str:
        """A name for people: the one it was given, or its module's."""
        return self._name or self._module.rpartition(".")[2]

    @property
    def registered_functions(self) -> dict[str, Function[Any, Any]]:
        """Its functions by name."""
        handles = {name: definition.handle for name, definition in self._definitions.items()}
        return {name: handle for name, handle in handles.items() if isinstance(handle, Function)}

    @property
    def registered_entrypoints(self) -> dict[str, LocalEntrypoint[..., Any]]:
        """Its local entrypoints by name."""
        return dict(self._entrypoints)

    @property
    def registered_classes(self) -> dict[str, Cls]:
        """Its classes by name."""
        handles = {name: definition.handle for name, definition in self._definitions.items()}
        return {name: handle for name, handle in handles.items() if isinstance(handle, Cls)}

    @property
    def registered_web_endpoints(self) -> list[str]:
        """Names of its web functions."""
        handles = [definition.handle for definition in self._definitions.values()]
        return [name for handle in handles for name in handle.spec.webs]

    @property
    def module(self) -> str:
        """Name of the module that made it."""
        return self._module

    def __repr__(self) -> str:
        return f"mesh.App({self._name!r})"

    def wire_name(self) -> str | None:
        """Its name on the wire while it runs or is deployed, or that of an app that includes it."""
        if self._wire is not None:
            return self._wire
        including = (app.wire_name() for app in self._included_in)
        found = next((name for name in including if name is not None), None)
        if found is None and not context.is_local():
            return self._name  # in a container: another app than the one that runs, found where it is deployed
        return found

    def run_as(self, wire: str | None) -> None:
        """Be known on the wire as this; not for users."""
        self._wire = wire
        self._app_id = wire or self._app_id

    def off_wire(self) -> str | None:
        """Be on the wire no more; returns the name it had there. Not for users."""
        wire, self._wire = self._wire, None
        return wire

    # --- decorators --------------------------------------------------------------------------------------------------

    def function(
        self,
        *args: Any,
        image: Image | None = None,
        schedule: Cron | Period | None = None,
        env: Mapping[str, str | None] | None = None,
        secrets: Sequence[Secret] = (),
        gpu: object = None,
        serialized: bool = False,
        volumes: Mapping[str, object] | None = None,
        cpu: float | tuple[float, float] | None = None,
        memory: int | tuple[int, int] | None = None,
        ephemeral_disk: int | None = None,
        min_containers: int | None = None,
        max_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
        proxy: object = None,
        retries: int | Retries | None = None,
        timeout: float = 300,
        startup_timeout: float | None = None,
        name: str | None = None,
        is_generator: bool | None = None,
        cloud: str | None = None,
        region: object = None,
        routing_region: str | None = None,
        nonpreemptible: bool = False,
        enable_memory_snapshot: bool = False,
        block_network: bool = False,
        restrict_modal_access: bool = False,
        single_use_containers: bool = False,
        i6pn: bool | None = None,
        include_source: bool | None = None,
        experimental_options: Mapping[str, object] | None = None,
        max_inputs: int | None = None,
        recycle_memory: int | None = None,
        labels: Mapping[str, str] | None = None,
        result_ttl: float | None = None,
        keep_result: bool = True,
        detach: bool = False,
        **old: Any,
    ) -> _Decorator:
        """Make a function of the mesh out of a Python function.

        Args:
            env: variables set in its containers; entries that are `None` are left out. They are stored as they are:
                what nobody may read belongs into a secret.
            secrets: where more variables come from; of two with one name the later counts, and `env` last.
            serialized: send the function by value: needed where it is not defined at the top level of a module.
            gpu: what its worker must have, by the label `gpu=` of `mesh worker`: `"l4"`, `"l4:2"` for two of them
                (label `gpu.count`), `"any"`, or a list of which any will do. It places containers, and divides no GPU.
            labels: other labels its worker must have, such as `{"zone": "a"}`; not in Modal.
            cpu: cores that a container claims of its worker, and does not start without; of a pair, the limit counts.
            memory: MiB that a container claims, and that it and what it starts may use, at least 16; it is killed above
                that. Of a pair as in Modal, request and limit, the limit counts; unlike there, a single number is a
                limit too.
            min_containers: containers of its pool that are always there, over all workers together; 0 by default.
            max_containers: the most its pool may have, over all workers together; no bound by default. Where a worker
                cannot reach the server for 20 s, it ends these containers, and their inputs run elsewhere.
            buffer_containers: idle ones kept beside those that run while the pool is in use; 0 by default.
            scaledown_window: seconds an idle container is kept; 60 by default.
            retries: tries after the first; a number means one second apart, `mesh.Retries` says more.
            timeout: seconds one try may run, 1 to 86,400; queueing and start-up do not count.
            startup_timeout: seconds for imports and set-up; `timeout` by default.
            name: its name in the app, if not the Python one.
            is_generator: whether it yields, where that cannot be seen.
            single_use_containers: a container runs one input, then ends.
            max_inputs: inputs a container runs before another takes its place; 1 is Modal's old word for
                `single_use_containers`. For several inputs at once use `@mesh.concurrent`.
            recycle_memory: MiB; a container that holds more after an input takes no other, and ends, without harm to
                any input: against code that leaks. Not in Modal.
            result_ttl: seconds its results are kept (60 up to what the environment keeps).
            keep_result: `False` stores a success without its value, for an hour.
            detach: its `remote` calls go on when their caller dies.

        Raises:
            InvalidError: an option out of its range, or a function that cannot be one; the text says what to do.
        """
        if args:
            raise InvalidError("did you forget the parentheses? Write @app.function(), not @app.function")
        secrets, image = [*self._secrets, *secrets], image or self._image
        options = read_options("@app.function", locals(), old)
        unbuilt = self._unbuilt_options(schedule, volumes)
        frame = sys._getframe(1)

        def decorate(raw: Callable[..., Any]) -> Function[Any, Any]:
            _check_raw(raw)
            own_name = name if name is not None else raw.__name__
            at_top = sys._getframe(1).f_code.co_name == "<module>"
            _check_place(raw, own_name, serialized, at_top)
            if schedule is not None and _needs_arguments(raw):
                raise InvalidError(f"schedule: {own_name!r} has parameters without default, and a schedule passes none")
            generator = _yields(raw) if is_generator is None else is_generator
            marked = {**web_options(raw), **function_options(raw)}
            spec = FunctionSpec(name=own_name, is_generator=generator, **{**options, **marked})
            if unbuilt:
                self._unbuilt[own_name] = unbuilt
            return self._register(Function(own_name, self, raw=raw, spec=spec), frame.f_globals["__name__"], serialized)

        return decorate

    def _unbuilt_options(self, schedule: object, volumes: object) -> str:
        """Options that would change what the function does and are not built: refused when it is deployed."""
        if schedule is not None and not isinstance(schedule, Cron | Period):
            raise InvalidError(f"schedule must be a mesh.Cron or a mesh.Period, not {schedule!r}")
        asked = {
            "schedule": schedule,
            "volumes": volumes or self._volumes,
        }
        return ", ".join(option for option, value in asked.items() if value)

    def _register(self, handle: H, module: str, serialized: bool) -> H:
        if handle.name in self._definitions:
            logger.warning("app %s: %r is defined twice; the later one counts", self.description, handle.name)
        self._definitions[handle.name] = Definition(handle, module, self._name, serialized)
        return handle

    def local_entrypoint(
        self, *args: Any, name: str | None = None
    ) -> Callable[[Callable[P, R]], LocalEntrypoint[P, R]]:
        """Make a Python function what `mesh run` runs on this machine; its parameters become flags.

        Raises:
            InvalidError: the app has an entrypoint of this name.
        """
        if args:
            raise InvalidError("did you forget the parentheses? Write @app.local_entrypoint()")

        def decorate(raw: Callable[P, R]) -> LocalEntrypoint[P, R]:
            own_name = name or str(getattr(raw, "__name__", "main"))
            if own_name in self._entrypoints:
                raise InvalidError(f"app {self.description!r} has a local entrypoint {own_name!r} already")
            entrypoint = LocalEntrypoint(own_name, raw, self)
            self._entrypoints[own_name] = entrypoint
            return entrypoint

        return decorate

    @dataclass_transform(field_specifiers=(parameter,))
    def cls(
        self,
        *args: Any,
        image: Image | None = None,
        env: Mapping[str, str | None] | None = None,
        secrets: Sequence[Secret] = (),
        gpu: object = None,
        serialized: bool = False,
        volumes: Mapping[str, object] | None = None,
        cpu: float | tuple[float, float] | None = None,
        memory: int | tuple[int, int] | None = None,
        ephemeral_disk: int | None = None,
        min_containers: int | None = None,
        max_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
        proxy: object = None,
        retries: int | Retries | None = None,
        timeout: float = 300,
        startup_timeout: float | None = None,
        cloud: str | None = None,
        region: object = None,
        routing_region: str | None = None,
        nonpreemptible: bool = False,
        enable_memory_snapshot: bool = False,
        block_network: bool = False,
        restrict_modal_access: bool = False,
        single_use_containers: bool = False,
        i6pn: bool | None = None,
        include_source: bool | None = None,
        experimental_options: Mapping[str, object] | None = None,
        max_inputs: int | None = None,
        recycle_memory: int | None = None,
        labels: Mapping[str, str] | None = None,
        result_ttl: float | None = None,
        keep_result: bool = True,
        detach: bool = False,
        **old: Any,
    ) -> _ClassDecorator:
        """Make a class of the mesh out of a Python class: its containers hold an instance each, and run its methods.

        Methods that can be called are marked with `@mesh.method()`; `@mesh.enter()` and `@mesh.exit()` mark what runs
        when a container starts and ends, `mesh.parameter()` declares what the constructor takes. Each distinct set of
        parameters has containers, and a `max_containers`, of its own. Options are those of `@app.function`.

        Raises:
            InvalidError: an option out of its range, or a class that cannot be one; the text says what to do.
        """
        if args:
            raise InvalidError("did you forget the parentheses? Write @app.cls(), not @app.cls")
        secrets, image = [*self._secrets, *secrets], image or self._image
        options = read_options("@app.cls", locals(), old)
        unbuilt = self._unbuilt_options(None, volumes)
        frame = sys._getframe(1)

        def decorate(raw: type[T]) -> type[T]:
            if not isinstance(raw, type):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
                raise TypeError(f"@app.cls() is for classes; for {raw!r} use @app.function()")
            at_top = sys._getframe(1).f_code.co_name == "<module>"
            _check_place(raw, raw.__name__, serialized, at_top)
            if unbuilt:
                self._unbuilt[raw.__name__] = unbuilt
            handle = Cls(raw.__name__, self, raw=raw, spec=describe_class(raw, options))
            self._register(handle, frame.f_globals["__name__"], serialized)
            return cast("type[T]", handle)

        return decorate

    def server(self, *args: Any, **options: Any) -> Any:
        """Not built yet."""
        raise UnimplementedError("@app.server is not built yet")

    def include(self, other_app: App, /, inherit_tags: bool = True) -> Self:
        """Take over the functions of another app; of two with one name the included one counts, with a warning."""
        for name, definition in other_app._definitions.items():
            if name in self._definitions:
                logger.warning("app %s: %r comes again from an included app; that one counts", self.description, name)
            self._definitions[name] = definition
        self._unbuilt.update(other_app._unbuilt)
        if inherit_tags:
            self._tags = {**other_app._tags, **self._tags}
        other_app._included_in.append(self)
        return self

    # --- running and deploying ---------------------------------------------------------------------------------------

    def run(
        self,
        *,
        name: str | None = None,
        client: object = None,
        detach: bool = False,
        interactive: bool = False,
        environment_name: str | None = None,
    ) -> AppRun:
        """The app for the length of a `with` or `async with` block: then its queued calls are cancelled, and it goes.

        Args:
            name: a name for people. detach: leave it, and its calls, when the block ends.
        """
        if interactive:
            raise UnimplementedError("app.run(interactive=True) is not built yet")
        return AppRun(self, name or self.description, environment_name, detach)

    @both
    async def deploy(
        self,
        /,
        *,
        name: str | None = None,
        environment_name: str | None = None,
        tag: str = "",
        client: object = None,
        strategy: str = "rolling",
    ) -> App:
        """Deploy the app: from now on its functions are found by name, and workers run this code for queued calls.

        Args:
            name: what to deploy it as, if not its own name. tag: kept with the version.
            strategy: `rolling` lets running calls finish on the old code.

        Raises:
            InvalidError: it has no name, no functions, or an option that makes no sense.
            ConflictError: somebody else deployed it at the same moment; nothing of this was kept.
        """
        await self.deploy_as(name, environment_name, tag, strategy)
        return self

    async def deploy_as(self, name: str | None, environment: str | None, tag: str, strategy: str) -> Deployment:
        """`deploy`, with what it came to."""
        from mesh import client, deploy

        refuse_in_container("app.deploy()")
        if strategy not in ("rolling", "recreate"):
            raise InvalidError(f"strategy must be 'rolling' or 'recreate', not {strategy!r}")
        if strategy == "recreate":
            raise UnimplementedError("app.deploy(strategy='recreate') is not built yet")
        own_name = name or self._name
        if own_name is None:
            raise InvalidError("an app needs a name to be deployed: mesh.App('name'), or deploy it with name=")
        checked = check_app_name(own_name)
        self._refuse_unbuilt()
        broker = await client.broker(environment)
        deployment = await deploy.deploy(broker, self.definitions, self._module, app=checked, name=checked, tag=tag)
        self.run_as(checked)
        return deployment

    @property
    def definitions(self) -> list[Definition]:
        """Its functions, as deploy needs them."""
        return list(self._definitions.values())

    def _refuse_unbuilt(self) -> None:
        for name, options in self._unbuilt.items():
            if name in self._definitions:
                raise UnimplementedError(f"function {name!r} uses {options}, which mesh does not have yet")

    async def start_run(self, broker: Broker, name: str, wire: str = "") -> str:
        """Put the app on the wire for a single run, or in the place of one (`wire`); returns its name there."""
        from mesh import deploy
        from mesh.records import AppState

        self._refuse_unbuilt()
        wire = wire or deploy.new_run_name()
        await broker.ensure()
        await broker.runs.renew(wire, broker.client)
        await deploy.deploy(broker, self.definitions, self._module, app=wire, name=name, state=AppState.EPHEMERAL)
        self.run_as(wire)
        return wire

    @both_static
    @staticmethod
    async def lookup(
        name: str, *, client: object = None, environment_name: str | None = None, create_if_missing: bool = False
    ) -> App:
        """A deployed app by name. It has no functions here; find those with `Function.from_name`.

        Raises:
            NotFoundError: it is not deployed.
        """
        if create_if_missing:
            raise UnimplementedError("App.lookup(create_if_missing=True) is not built yet")
        return await _lookup_app(name, environment_name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replace the app's labels."""
        self._tags = dict(tags)

    def get_tags(self) -> dict[str, str]:
        """The app's labels."""
        return dict(self._tags)

    def get_dashboard_url(self) -> str:
        """Not built yet."""
        raise UnimplementedError("App.get_dashboard_url is not built yet")


async def _lookup_app(name: str, environment: str | None) -> App:
    from mesh import client

    broker = await client.broker(environment)
    head, _ = await broker.registry.head(name)
    if head is None or head.state == "stopped":
        raise NotFoundError(f"no app {name!r} is deployed in environment {broker.topology.environment!r}")
    app = App(name)
    app.run_as(name)
    return app


# --- checks of what users pass ---------------------------------------------------------------------------------------


def _check_raw(raw: object) -> None:
    if isinstance(raw, type):
        raise TypeError(f"@app.function() is for functions; for the class {raw.__name__} use @app.cls()")
    if isinstance(raw, Function):
        raise InvalidError(f"{raw!r} is a function of the mesh already")
    if not callable(raw):
        raise InvalidError(f"@app.function() is for functions, not for {raw!r}")


def _check_place(raw: Callable[..., Any], name: str, serialized: bool, at_top: bool) -> None:
    """Only what a module makes whenever it is imported can be found again by importing it."""
    qualname: str = getattr(raw, "__qualname__", name)
    owner = qualname.rpartition(".")[0]
    if owner and not owner.endswith("<locals>"):
        raise InvalidError(f"{qualname!r} is a method: use @app.cls() on its class, and @mesh.method() on it")
    if owner and not serialized and not at_top:
        raise InvalidError(
            f"{qualname!r} is not at the top level of its module, so containers could not import it: move it there, "
            "or pass serialized=True"
        )
    if name == "<lambda>":
        raise InvalidError("a lambda needs a name: @app.function(name=…)")


def _needs_arguments(raw: Callable[..., Any]) -> bool:
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in optional for p in inspect.signature(raw).parameters.values())


def _yields(raw: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(raw) or inspect.isasyncgenfunction(raw)


# --- the other way round: from a module to its apps ------------------------------------------------------------------


def find_definition(name: str, declared: str | None) -> tuple[App, Definition] | None:
    """The function `name` of the App that called itself `declared`, among those that were imported so far."""
    for app in reversed(_apps):
        definition = app._definitions.get(name)
        if definition is not None and definition.declared == declared:
            return app, definition
    return None


def apps_of(module: types.ModuleType) -> dict[str, App]:
    """The apps a module holds, by the name of the variable."""
    return {name: value for name, value in vars(module).items() if isinstance(value, App)}


def including(app: App) -> Iterator[App]:
    """The apps that include this one, at any distance."""
    for outer in app._included_in:
        yield outer
        yield from including(outer)
