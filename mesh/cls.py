"""Classes of the mesh: containers that hold an instance each, and the handles by which its methods are called.

`Model` is a `Cls`, `Model(size="big")` an `Obj`, and `Model(size="big").ask` a `Function`. Nothing of the user's class
is run here until a method is called with `.local()`, or an attribute is read.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Protocol, Self, TypeVar, overload

from mesh._sync import both, bridge
from mesh.decorators import batching, class_options, concurrency, is_batched
from mesh.exception import ExecutionError, InvalidError, UnimplementedError
from mesh.options import read_variant_options
from mesh.parameters import MISSING, Construction, Parameter, check_type, values_of
from mesh.sdk import Function, configured_environment
from mesh.secret import Secret
from mesh.spec import FunctionSpec, MethodSpec, Retries, check_name
from mesh.target import Elsewhere, Home
from mesh.variant import Variant
from mesh.web import MAX_INPUTS, web_of

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

_HOOK = "__mesh_hook__"
_CONSTRUCTION = "__mesh_construction__"


# --- what users write ------------------------------------------------------------------------------------------------


class Method(Generic[P, R]):
    """A method that can be called on the mesh: on an instance it is a `Function`."""

    def __init__(self, raw: Callable[..., Any], is_generator: bool) -> None:
        self.raw = raw
        self.is_generator = is_generator
        self.__doc__ = raw.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Function[P, R]: ...
    def __get__(self, instance: object, owner: type) -> Self | Function[P, R]:
        """On a real instance, which only containers and `.local()` have: the method of this same instance."""
        if instance is None:
            return self
        cls = _classes.get(owner)
        if cls is None:
            raise InvalidError(f"{owner.__name__} has a @mesh.method(), and is no class of the mesh: add @app.cls()")
        construction = getattr(instance, _CONSTRUCTION, Construction())
        return cls.method(self.raw.__name__, construction, self.raw.__get__(instance, owner))


class _MethodDecorator(Protocol):
    @overload
    def __call__(self, raw: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> Method[P, R]: ...
    @overload
    def __call__(self, raw: Callable[Concatenate[Any, P], AsyncGenerator[R, Any]], /) -> Method[P, R]: ...
    @overload
    def __call__(self, raw: Callable[Concatenate[Any, P], Generator[R, Any, Any]], /) -> Method[P, R]: ...
    @overload
    def __call__(self, raw: Callable[Concatenate[Any, P], R], /) -> Method[P, R]: ...


def method(*args: Any, is_generator: bool | None = None) -> _MethodDecorator:
    """Make a method of a class callable on the mesh. The class has `@app.cls()`.

    Args:
        is_generator: whether it yields, where that cannot be seen.

    Raises:
        InvalidError: it runs when containers start or end, or is no function.
    """
    if args:
        raise InvalidError("did you forget the parentheses? Write @mesh.method(), not @mesh.method")

    def decorate(raw: Callable[..., Any]) -> Method[Any, Any]:
        if not inspect.isfunction(raw):
            raise InvalidError(
                f"@mesh.method() stands directly above a method, or above @mesh.batched(); not on {raw!r}"
            )
        if hasattr(raw, _HOOK):
            raise InvalidError(f"{raw.__qualname__!r} cannot be both a method and {_named(raw)}")
        yields = inspect.isgeneratorfunction(raw) or inspect.isasyncgenfunction(raw)
        return Method(raw, yields if is_generator is None else is_generator)

    return decorate


def enter(*args: Any, snap: bool = False) -> Callable[[F], F]:
    """Run a method of a class when a container starts, before its first input; there may be several, also async ones.

    What it raises is why the container does not start; its time counts to `startup_timeout`.
    """
    if snap:
        raise InvalidError("@mesh.enter(snap=True) needs memory snapshots, which only Modal's cloud has")
    return _hook("enter", args)


def exit(*args: Any) -> Callable[[F], F]:
    """Run a method of a class when a container ends: when it is not needed any more, replaced, or its worker stops.

    It has the worker's grace (30 s), then the container is killed. Where it is killed, or crashes, nothing is run.
    """
    return _hook("exit", args)


def _hook(kind: str, args: tuple[Any, ...]) -> Callable[[F], F]:
    if args:
        raise InvalidError(f"did you forget the parentheses? Write @mesh.{kind}(), not @mesh.{kind}")

    def decorate(raw: F) -> F:
        if isinstance(raw, Method):
            raise InvalidError(f"{raw.raw.__qualname__!r} cannot be both a method and @mesh.{kind}()")
        setattr(raw, _HOOK, kind)
        return raw

    return decorate


def _named(raw: Callable[..., Any]) -> str:
    return f"@mesh.{getattr(raw, _HOOK)}()"


class _Declared:
    """What `parameter()` leaves in a class until `@app.cls()` reads it."""

    def __init__(self, default: Any, init: bool) -> None:
        self.default = default
        self.init = init


def parameter(*, default: Any = MISSING, init: bool = True) -> Any:
    """Declare a parameter of a class: `size: str = mesh.parameter(default="small")`.

    The constructor takes it, and each distinct set of values has containers of its own. Annotated as str, int, bool or
    bytes; together at most 16 KiB.

    Args:
        default: its value where none is given; without one it must be. init: `False` keeps it out of the constructor.
    """
    if not init and default is MISSING:
        raise InvalidError("a parameter that the constructor does not take needs a default")
    return _Declared(default, init)


# --- reading a class -------------------------------------------------------------------------------------------------


def _members(cls: type) -> dict[str, Any]:
    """Everything a class has, inherited or its own, those it inherits first."""
    return {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}


def methods_of(cls: type) -> dict[str, Method[Any, Any]]:
    """The methods of a class that can be called on the mesh."""
    return {name: member for name, member in _members(cls).items() if isinstance(member, Method)}


def hooks_of(cls: type, kind: str) -> list[str]:
    """Names of the methods that run when a container starts (`enter`) or ends (`exit`), in their order."""
    return [name for name, member in _members(cls).items() if getattr(member, _HOOK, "") == kind]


def describe_class(cls: type, options: Mapping[str, Any]) -> FunctionSpec:
    """The spec of a class, which gets a constructor if it declares parameters or has none of its own.

    Raises:
        InvalidError: it cannot be a class of the mesh.
    """
    _make_marked_methods(cls)
    methods = methods_of(cls)
    if not methods:
        raise InvalidError(f"class {cls.__name__!r} has no method to call: mark one with @mesh.method()")
    for name in methods:
        check_name("function", f"{cls.__name__}.{name}")
    parameters = _parameters_of(cls)
    if parameters is not None:
        _give_constructor(cls, parameters)
    marked = class_options(cls, {name: member.raw for name, member in methods.items()})
    specs = {name: _method_spec(member) for name, member in methods.items()}
    if any(spec.web is not None for spec in specs.values()):
        _check_answering(cls, parameters)
    if all(spec.web is not None for spec in specs.values()):
        marked.setdefault("max_inputs", MAX_INPUTS)
    return FunctionSpec(name=cls.__name__, methods=specs, parameters=parameters, **{**options, **marked})


def _make_marked_methods(cls: type) -> None:
    """`@mesh.batched()` and web decorators make a method of a class one of the mesh, also without `@mesh.method()`."""
    for base in cls.__mro__:
        for name, member in list(vars(base).items()):
            if inspect.isfunction(member) and (is_batched(member) or web_of(member) is not None):
                setattr(base, name, Method(member, is_generator=False))


def _method_spec(method: Method[Any, Any]) -> MethodSpec:
    web = web_of(method.raw)
    return MethodSpec(is_generator=method.is_generator, web=None if web is None else web.spec)


def _check_answering(cls: type, parameters: Mapping[str, Parameter] | None) -> None:
    try:
        if parameters is None:
            check_construction(cls, Construction())
        else:
            values_of(cls.__name__, parameters, Construction())
    except (TypeError, InvalidError) as error:
        raise InvalidError(
            f"class {cls.__name__!r} has a web method, whose requests bring nothing to construct it with: give its "
            f"parameters defaults ({error})"
        ) from None


def _parameters_of(cls: type) -> dict[str, Parameter] | None:
    """The parameters a class declares; `None` where it has an `__init__` of its own instead."""
    declared = {name: member for name, member in _members(cls).items() if isinstance(member, _Declared)}
    constructor = _members(cls)["__init__"]
    if constructor is not object.__init__ and not hasattr(constructor, _CONSTRUCTION):
        if declared:
            raise InvalidError(
                f"class {cls.__name__!r} has an __init__ of its own beside mesh.parameter(): do what it does in a "
                "method with @mesh.enter()"
            )
        return None
    bases = [inspect.get_annotations(base) for base in reversed(cls.__mro__)]
    annotations = {name: kind for base in bases for name, kind in base.items()}
    inherited: Mapping[str, Parameter] = getattr(constructor, _CONSTRUCTION, {})
    found = {name: parameter for name, parameter in inherited.items() if name not in declared}
    for name, member in declared.items():
        if name not in annotations:
            raise InvalidError(f"parameter {name!r} of class {cls.__name__!r} has no annotation: write {name}: str = …")
        found[name] = Parameter(check_type(name, annotations[name]), member.default, member.init)
        if member.default is not MISSING:
            found[name].check(name, member.default)
    return found


def _give_constructor(cls: type, parameters: Mapping[str, Parameter]) -> None:
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in values_of(cls.__name__, parameters, Construction(args, kwargs)).items():
            setattr(self, name, value)

    setattr(constructor, _CONSTRUCTION, parameters)
    setattr(cls, "__init__", constructor)  # noqa: B010 - type checkers forbid to assign it


def check_construction(cls: type, construction: Construction) -> None:
    """Refuse what the constructor of a class cannot be called with.

    Raises:
        TypeError: too many arguments, too few, or ones that it does not know.
    """
    inspect.signature(cls).bind(*construction.args, **construction.kwargs)


def construct(cls: type, construction: Construction) -> Any:
    """An instance, which knows what it was constructed with."""
    instance = cls(*construction.args, **construction.kwargs)
    setattr(instance, _CONSTRUCTION, construction)
    return instance


# --- handles ---------------------------------------------------------------------------------------------------------

_classes: weakref.WeakKeyDictionary[type, Cls] = weakref.WeakKeyDictionary()  # by the user's class


class Cls:
    """A class of the mesh: made by `@app.cls`, or found with `Cls.from_name`. Call it for an instance."""

    def __init__(
        self,
        name: str,
        home: Home,
        *,
        environment: str | None = None,
        raw: type | None = None,
        spec: FunctionSpec | None = None,
        variant: Variant | None = None,
    ) -> None:
        """Not for users: `@app.cls` and `from_name` make classes."""
        self._name = name
        self._home = home
        self._environment = environment
        self._raw = raw
        self._spec = spec
        self._variant = variant or Variant()
        if raw is not None:
            self.__doc__ = raw.__doc__
            self.__module__ = raw.__module__
            _classes.setdefault(raw, self)

    @classmethod
    def from_name(
        cls,
        app_name: str,
        name: str,
        *,
        version: int | None = None,
        environment_name: str | None = None,
        client: object = None,
    ) -> Cls:
        """A class of a deployed app, by name. No I/O: whether it, and a method, exists shows at the first use.

        Args:
            app_name: the app's name, as it was deployed. Apps of a single run are not found. name: the class's.
            environment_name: another environment than the configured one.

        Raises:
            InvalidError: a name that cannot be one.
        """
        if version is not None:
            raise UnimplementedError("Cls.from_name(version=…) is not built yet")
        check_name("app", app_name)
        if "." in check_name("class", name):
            raise InvalidError(f"{name!r} is no name of a class; a method is {name.partition('.')[0]}().method")
        return Cls(name, Elsewhere(app_name), environment=environment_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Obj:
        """An instance: what its methods are called on. No I/O, and nothing of the class is run yet.

        Raises:
            TypeError, InvalidError: parameters that it does not have, or of the wrong type.
        """
        construction = Construction(args, kwargs)
        construction.check(self._name)
        if self._spec is not None and self._spec.parameters is not None:
            values_of(self._name, self._spec.parameters, construction)
        elif self._raw is not None:
            check_construction(self._raw, construction)
        return Obj(self, construction)

    def __getattr__(self, name: str) -> NoReturn:
        if not name.startswith("__") and (self._spec is None or name in (self._spec.methods or ())):
            raise AttributeError(
                f"{self._name}.{name} is there on instances only: did you forget to make one, {self._name}().{name}?"
            )
        raise AttributeError(f"class {self._name!r} of the mesh has no attribute {name!r}")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:
        """A class that inherits from this one inherits from the user's own."""
        return (self.get_raw_f(),)

    @both
    async def hydrate(self, /, client: object = None) -> Cls:
        """Look the class up now instead of at its first use.

        Raises:
            NotFoundError: there is no such class. ExecutionError: its app is neither running nor deployed.
        """
        await Function[Any, Any](self._name, self._home, environment=self._environment).hydrate.aio()
        return self

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
    ) -> Cls:
        """The same class with other options: `Function.with_options`, for all its methods."""
        options = locals()
        if volumes:
            raise UnimplementedError("with_options(volumes=…) is not built yet")
        return self._with(read_variant_options(options))

    def with_concurrency(self, *, max_inputs: int, target_inputs: int | None = None) -> Cls:
        """The same class, whose containers run so many inputs at once; as `@mesh.concurrent` says it."""
        return self._with(concurrency(max_inputs, target_inputs))

    def with_batching(self, *, max_batch_size: int, wait_ms: int) -> Cls:
        """The same class, whose method is run for so many inputs together; as `@mesh.batched` says it."""
        return self._with(batching(max_batch_size, wait_ms))

    def _with(self, options: Mapping[str, Any]) -> Cls:
        return Cls(
            self._name,
            self._home,
            environment=self._environment,
            raw=self._raw,
            spec=self._spec,
            variant=self._variant.with_options(options),
        )

    def method(self, name: str, construction: Construction, local: Callable[..., Any] | None) -> Function[Any, Any]:
        """A method of an instance. Not for users: it is an attribute of the instance.

        Args:
            local: what runs it in this process; `None` where the class was looked up.
        """
        return Function(
            f"{self._name}.{name}",
            self._home,
            environment=self._environment,
            raw=local,
            spec=self._spec,
            variant=Variant(self._variant.options, construction),
        )

    def containers(self, construction: Construction) -> Function[Any, Any]:
        """What stands for the containers of an instance. Not for users: the instance has their methods."""
        variant = Variant(self._variant.options, construction)
        return Function(self._name, self._home, environment=self._environment, spec=self._spec, variant=variant)

    # --- what a handle says of itself --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name in its app."""
        return self._name

    @property
    def spec(self) -> FunctionSpec:
        """Its options, methods and parameters, as its source says them."""
        if self._spec is None:
            raise ExecutionError(f"class {self._name!r} was looked up by name: its options are not in this process")
        return self._spec

    def get_raw_f(self) -> type:
        """The class as it was defined.

        Raises:
            ExecutionError: it was looked up by name, so its code is not here.
        """
        if self._raw is None:
            raise ExecutionError(
                f"class {self._name!r} of app {self._home.description!r} was looked up by name: its code is not in "
                "this process"
            )
        return self._raw

    @property
    def is_local(self) -> bool:
        """Whether its code is in this process."""
        return self._raw is not None

    def __repr__(self) -> str:
        return f"mesh.Cls({self._home.description!r}, {self._name!r})"

    def __reduce__(self) -> Any:
        app = self._home.wire_name()
        if app is None:
            raise InvalidError(f"{self!r} cannot be sent: its app is not running, so nobody could call it")
        return _class_handle, (app, self._name, self._environment or configured_environment(), self._variant)


class Obj:
    """An instance of a class of the mesh. Its methods are functions; what else it has is that of a local instance."""

    __slots__ = ("_mesh_cls", "_mesh_construction", "_mesh_entered", "_mesh_instance")

    def __init__(self, cls: Cls, construction: Construction) -> None:
        self._mesh_cls = cls
        self._mesh_construction = construction
        self._mesh_instance: Any = None
        self._mesh_entered = False

    @property
    def update_autoscaler(self) -> Any:
        """`Function.update_autoscaler` for the containers of this instance, and of all with the same parameters."""
        return self._mesh_cls.containers(self._mesh_construction).update_autoscaler

    @property
    def get_current_stats(self) -> Any:
        """`Function.get_current_stats`, of these containers."""
        return self._mesh_cls.containers(self._mesh_construction).get_current_stats

    def __getattr__(self, name: str) -> Any:
        cls = self._mesh_cls
        if not cls.is_local:
            if name.startswith("_"):
                raise AttributeError(f"{cls.name!r} was looked up by name, and has no attribute {name!r} here")
            return cls.method(name, self._mesh_construction, None)
        member = methods_of(cls.get_raw_f()).get(name)
        if member is None:
            return getattr(self._local(), name)
        return cls.method(name, self._mesh_construction, self._local_method(member.raw))

    def _local(self) -> Any:
        if self._mesh_instance is None:
            self._mesh_instance = construct(self._mesh_cls.get_raw_f(), self._mesh_construction)
        return self._mesh_instance

    def _local_method(self, raw: Callable[..., Any]) -> Callable[..., Any]:
        """What `.local()` calls: enters the instance first, once."""

        @functools.wraps(raw)
        def call(*args: Any, **kwargs: Any) -> Any:
            instance = self._local()
            if not self._mesh_entered:
                self._mesh_entered = True
                for name in hooks_of(type(instance), "enter"):
                    entered = getattr(instance, name)()
                    if inspect.iscoroutine(entered):
                        bridge().run(entered)
            return raw(instance, *args, **kwargs)

        parameters = list(inspect.signature(raw).parameters.values())[1:]
        setattr(call, "__signature__", inspect.signature(raw).replace(parameters=parameters))  # noqa: B010 - for tools
        return call

    def __repr__(self) -> str:
        construction = self._mesh_construction
        given = [*map(repr, construction.args), *(f"{name}={value!r}" for name, value in construction.kwargs.items())]
        return f"{self._mesh_cls!r}({', '.join(given)})"

    def __reduce__(self) -> Any:
        return _instance, (self._mesh_cls, self._mesh_construction)


def _class_handle(app: str, name: str, environment: str, variant: Variant) -> Cls:
    """A handle that came in a pickle; also of an app of a single run, which `from_name` would refuse."""
    return Cls(name, Elsewhere(app), environment=environment, variant=variant)


def _instance(cls: Cls, construction: Construction) -> Obj:
    return Obj(cls, construction)
