"""From what a container is told to be to the user's code in it: imported, or unpickled; and why that failed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh import serialization
from mesh.exception import DeserializationError, ExecutionError, NotFoundError
from mesh.frames import Start
from mesh.protocol import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """What a container runs.

    Attributes:
        functions: by the name of the method; a plain function's is empty.
        enter, exit: what runs before the first input, and after the last; each of them may be async.
        answering: names of those functions that answer requests.
    """

    functions: Mapping[str, Callable[..., Any]]
    enter: Sequence[Callable[[], Any]] = ()
    exit: Sequence[Callable[[], Any]] = ()
    answering: Collection[str] = ()

    def function(self, method: str) -> Callable[..., Any]:
        """What an input is given to.

        Raises:
            NotFoundError: there is no such method.
        """
        try:
            return self.functions[method]
        except KeyError:
            known = ", ".join(sorted(self.functions))
            raise NotFoundError(f"there is no method {method!r}; there is {known}") from None


class NeverStartsError(Exception):
    """The code cannot be set up as its pool asks for, and never will be until other code is deployed."""


def load(start: Start) -> UserCode:
    """Import what the container is to run. Whatever else that raises is the user's.

    Raises:
        NeverStartsError: the class cannot be constructed with the arguments of its pool.
    """
    found = _find(start)
    code = _instance(found, start) if isinstance(found, type) else UserCode(functions={"": found})
    return _with_sites(code, start) if start.web else code


def _with_sites(code: UserCode, start: Start) -> UserCode:
    """The same, its web functions replaced by what answers requests. Applications are made after the enter hooks."""
    from mesh.site import Site
    from mesh.web import web_of

    found = {name: (function, web_of(function)) for name, function in code.functions.items()}
    sites = {name: Site(raw, web, start.max_inputs) for name, (raw, web) in found.items() if web is not None}
    if not sites:
        raise ExecutionError(f"{start.function!r} was deployed as a web function, and has no web decorator here")
    begun = [hook for site in sites.values() for hook in (site.make, site.begin)]
    return UserCode(
        functions={**code.functions, **{name: site.respond for name, site in sites.items()}},
        enter=[*code.enter, *begun],
        exit=[*(site.end for site in sites.values()), *code.exit],
        answering=frozenset(sites),
    )


def _instance(cls: type, start: Start) -> UserCode:
    """An instance of the user's class, and what of it can be run."""
    from mesh.cls import check_construction, construct, hooks_of, methods_of
    from mesh.parameters import Construction

    construction = Construction.from_json(start.construction)
    try:
        check_construction(cls, construction)
    except TypeError as error:  # its callers looked it up by name, and could not know
        raise NeverStartsError(f"{cls.__name__}(): {error}") from None
    instance = construct(cls, construction)
    return UserCode(
        functions={name: member.raw.__get__(instance, cls) for name, member in methods_of(cls).items()},
        enter=[getattr(instance, name) for name in hooks_of(cls, "enter")],
        exit=[getattr(instance, name) for name in hooks_of(cls, "exit")],
    )


def _find(start: Start) -> Callable[..., Any]:
    """The user's function or class, imported for real."""
    from mesh import app  # here, because what is imported before the user's code delays every container
    from mesh.records import Code

    if start.bundle:
        _go_first(start.bundle)
    code = Code.from_json(start.code)
    if code.by_value:
        return _by_value(code.pickled, start)
    for module in dict.fromkeys((code.module, code.entry)):
        importlib.import_module(module)
        found = app.find_definition(code.name, code.app)
        if found is not None:
            owner, definition = found
            for running in (owner, *app.including(owner)):
                running.run_as(start.app)
            return definition.handle.get_raw_f()
    raise ExecutionError(
        f"importing {code.entry!r} made no function {code.name!r}: it is defined there only under a condition that "
        "does not hold in a container"
    )


def _go_first(bundle: str) -> None:
    """Have imports find what is in the bundle before all else, also where something else of that name is loaded."""
    sys.path.insert(0, bundle)
    own = {entry.stem for entry in Path(bundle).iterdir()} - {"mesh", "__main__"}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]


def _by_value(pickled: bytes, start: Start) -> Callable[..., Any]:
    from mesh.cls import Cls, describe_class
    from mesh.target import Elsewhere

    found = serialization.loads(pickled)
    if not callable(found):
        raise DeserializationError(f"the code of {start.function!r} is not a function but {type(found).__name__}")
    if isinstance(found, type):  # its methods call each other by the class's handle
        Cls(start.function, Elsewhere(start.app), raw=found, spec=describe_class(found, {}))
    return found  # type: ignore[no-any-return]  # callable was just checked


def start_failure(error: BaseException, bundle: str) -> Failure:
    """Why the code could not be imported, with what to do about the usual reasons."""
    packed = serialization.pack_exception(error, is_ours)
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = (
            f"{error.name!r} is not installed in this function's environment; if it is your own module, it was not "
            "shipped because nothing imports it statically"
        )
    elif isinstance(error, FileNotFoundError) and bundle and str(error.filename).startswith(bundle):
        hint = f"{os.path.relpath(str(error.filename), bundle)} was not shipped: only .py files travel with a deploy"
    text = f"{packed.text} ({hint})" if hint else packed.text
    return Failure(type=packed.type, text=text, traceback=packed.traceback, bases=packed.bases)


def is_ours(filename: str) -> bool:
    """Whether a frame of a traceback is the machinery's, above the user's own."""
    return filename in _OUR_FILES or filename.startswith(("<frozen importlib", _MESH))


_MESH = f"{Path(__file__).parent}{os.sep}"
_OUR_FILES = {importlib.__file__, contextlib.__file__, asyncio.runners.__file__}
