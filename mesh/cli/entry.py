"""From `file.py::name` to what is meant, and from a function's signature to flags."""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mesh.app import App, LocalEntrypoint, apps_of
from mesh.cls import Cls, methods_of
from mesh.deploy import import_file, import_module
from mesh.exception import InvalidError, NotFoundError
from mesh.parameters import MISSING, Parameter
from mesh.sdk import Function


@dataclass(frozen=True, slots=True)
class ClassMethod:
    """A method of a class, whose flags are those of the constructor and its own."""

    cls: Cls
    method: str

    @property
    def name(self) -> str:
        return f"{self.cls.name}.{self.method}"

    @property
    def is_generator(self) -> bool:
        return self.cls.spec.yields(self.method)

    def get_raw_f(self) -> Callable[..., Any]:
        """A function with the parameters of both; only to be looked at."""
        raw: Callable[..., Any] = methods_of(self.cls.get_raw_f())[self.method].raw
        own = list(inspect.signature(raw).parameters.values())[1:]
        hints = typing.get_type_hints(raw)
        both = set(self._parameters) & {parameter.name for parameter in own}
        if both:
            raise InvalidError(f"{self.name!r}: constructor and method both have {', '.join(sorted(both))}")
        constructor = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(parameter))
            for name, parameter in self._parameters.items()
        ]

        def combined(**_: Any) -> None: ...

        combined.__doc__ = raw.__doc__
        combined.__annotations__ = {**hints, **{name: _TYPES[p.type] for name, p in self._parameters.items()}}
        keywords = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own]
        setattr(combined, "__signature__", inspect.Signature([*constructor, *keywords]))  # noqa: B010 - for flags
        return combined

    @property
    def _parameters(self) -> Mapping[str, Parameter]:
        return {name: p for name, p in (self.cls.spec.parameters or {}).items() if p.init and p.type in _TYPES}

    def remote(self, **values: Any) -> Any:
        """Call it on the instance that the values say."""
        construction = {name: value for name, value in values.items() if name in self._parameters}
        rest = {name: value for name, value in values.items() if name not in construction}
        return getattr(self.cls(**construction), self.method).remote(**rest)


_TYPES = {"str": str, "int": int, "bool": bool}  # of the constructor's flags; none can give bytes


def _default(parameter: Parameter) -> Any:
    return inspect.Parameter.empty if parameter.default is MISSING else parameter.default


Runnable = LocalEntrypoint[..., Any] | Function[..., Any] | ClassMethod


@dataclass(frozen=True, slots=True)
class Reference:
    """`file.py`, `file.py::name` or (with `-m`) `package.module::name`."""

    where: str
    name: str
    is_module: bool

    @classmethod
    def parse(cls, text: str, *, is_module: bool) -> Reference:
        """Take a reference apart.

        Raises:
            InvalidError: it looks like a module where a file is meant.
        """
        where, _, name = text.partition("::")
        if not is_module and not where.endswith(".py") and not Path(where).is_file():
            hint = f"; for a module say -m {text}" if "/" not in where else ""
            raise InvalidError(f"{where!r} is not the name of a Python file{hint}")
        return cls(where, name, is_module)

    def load(self) -> ModuleType:
        """Import the user's module."""
        return import_module(self.where) if self.is_module else import_file(Path(self.where))


def find_app(module: ModuleType, name: str) -> App:
    """The App a module means: the one named, the one called `app`, or the only one.

    Raises:
        NotFoundError: there is none. InvalidError: there are several, and none is called `app`.
    """
    apps = apps_of(module)
    if name:
        if name not in apps:
            have = f"it has {', '.join(apps)}" if apps else "it has none"
            raise NotFoundError(f"there is no App called {name!r} in {module.__name__!r}: {have}")
        return apps[name]
    if not apps:
        raise NotFoundError(f"there is no App in {module.__name__!r}: make one with `app = mesh.App('name')`")
    distinct = {id(app): app for app in apps.values()}
    if "app" in apps:
        return apps["app"]
    if len(distinct) > 1:
        listed = ", ".join(f"{module.__name__}.py::{variable}" for variable in apps)
        raise InvalidError(f"there are several Apps in {module.__name__!r}; say which one: {listed}")
    return next(iter(distinct.values()))


def find_runnable(module: ModuleType, name: str) -> tuple[App, Runnable]:
    """What `mesh run` is to run: what is named, else the only entrypoint, else the only function.

    Raises:
        NotFoundError: there is nothing of this name, or nothing at all. InvalidError: there are several.
    """
    runnables = _runnables(module)
    if name:
        found = runnables.get(name) or runnables.get(name.partition(".")[2])  # the app's name may stand before it
        if found is None:
            have = f"there are {', '.join(runnables)}" if runnables else "there is nothing to run"
            raise NotFoundError(f"{module.__name__!r} has nothing called {name!r} to run: {have}")
        return found
    entrypoints = {key: pair for key, pair in runnables.items() if isinstance(pair[1], LocalEntrypoint)}
    for choice in (entrypoints, runnables):
        if len(choice) == 1:
            return next(iter(choice.values()))
        if choice:
            listed = "".join(f"\n  {module.__name__}.py::{key}" for key in choice)
            raise InvalidError(f"there are several things to run; say which one:{listed}")
    find_app(module, "")  # says so where there is not even an App
    raise NotFoundError(f"the app in {module.__name__!r} has nothing to run: decorate a function with @app.function()")


def _runnables(module: ModuleType) -> dict[str, tuple[App, Runnable]]:
    found: dict[str, tuple[App, Runnable]] = {}
    for app in apps_of(module).values():
        found.update({name: (app, entrypoint) for name, entrypoint in app.registered_entrypoints.items()})
        found.update({name: (app, function) for name, function in app.registered_functions.items()})
        methods = [ClassMethod(cls, name) for cls in app.registered_classes.values() for name in cls.spec.methods or ()]
        found.update({method.name: (app, method) for method in methods})
    return found


# --- flags -----------------------------------------------------------------------------------------------------------


def parse_flags(runnable: Runnable, program: str, arguments: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call from the command line, by the function's signature.

    `--foo-bar` is for `foo_bar`; never positional; without a default it is required. A function of `*args` alone gets
    the words as they are.

    Raises:
        InvalidError: a parameter has a type no flag can give.
    """
    raw = runnable.get_raw_f()
    parameters = inspect.signature(raw).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        if len(parameters) > 1:
            raise InvalidError(
                f"{runnable.name!r} has *{_variadic(parameters)} beside other parameters: no flags fit that"
            )
        return tuple(arguments), {}
    parser = argparse.ArgumentParser(prog=program, description=inspect.getdoc(raw), allow_abbrev=False)
    hints = typing.get_type_hints(raw)
    for name, parameter in parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            _add_flag(parser, name, hints.get(name, str), parameter.default)
    return (), {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not _ABSENT}


_ABSENT: Any = object()


def _variadic(parameters: Mapping[str, inspect.Parameter]) -> str:
    return next(name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL)


def _add_flag(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any) -> None:
    required = default is inspect.Parameter.empty
    options: dict[str, Any] = {"dest": name, "required": required, "default": _ABSENT}
    if not required and default is not None:
        options["help"] = f"default: {default}"
    kind = _without_none(hint)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        options |= {"type": _literal_type(name, choices), "choices": choices}
    elif kind in _READERS:
        options["type"] = _READERS[kind]
    else:
        raise InvalidError(
            f"parameter {name!r} has the type {getattr(kind, '__name__', kind)}, which no flag can give; there are "
            "str, int, float, bool, datetime, Literal, and each of them or None"
        )
    parser.add_argument(f"--{name.replace('_', '-')}", **options)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return str if hint is Any else hint


def _literal_type(name: str, choices: tuple[Any, ...]) -> type[Any]:
    kinds = {type(choice) for choice in choices}
    if kinds not in ({str}, {int}):
        raise InvalidError(f"parameter {name!r}: a Literal must be all str or all int for a flag")
    return kinds.pop()


_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    datetime: datetime.fromisoformat,
    inspect.Parameter.empty: str,
}
