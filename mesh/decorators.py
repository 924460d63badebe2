"""`@mesh.concurrent` and `@mesh.batched` mark a function or a class; `@app.function` and `@app.cls` read the marks.

A mark is a set of options of `FunctionSpec`, already checked; `concurrency` and `batching` make the same for handles.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mesh.exception import InvalidError
from mesh.spec import check_batching, check_concurrency

T = TypeVar("T")

_CONCURRENT, _BATCHED = "__mesh_concurrent__", "__mesh_batched__"


def concurrency(max_inputs: int, target_inputs: int | None = None) -> dict[str, Any]:
    """Options of a `FunctionSpec`: how many inputs a container runs at once.

    Raises:
        InvalidError: a value out of its range.
    """
    check_concurrency(max_inputs, target_inputs)
    return {"max_inputs": max_inputs, "target_inputs": target_inputs}


def batching(max_batch_size: int, wait_ms: int) -> dict[str, Any]:
    """Options of a `FunctionSpec`: how inputs are put together for one run.

    Raises:
        InvalidError: a value out of its range.
    """
    check_batching(max_batch_size, wait_ms)
    return {"max_batch_size": max_batch_size, "wait_ms": wait_ms}


# --- what users write ------------------------------------------------------------------------------------------------


def concurrent(*, max_inputs: int, target_inputs: int | None = None) -> Callable[[T], T]:
    """Let each container run several inputs at once. Stands below `@app.function()` or, for a class, `@app.cls()`.

    An async function runs them as tasks of one event loop, a sync one in a thread each: what inputs share must bear
    that. `print` and `current_input_id()` know their own input in both. A class may have methods of both kinds.

    Cancelling one input, or its running out of time, leaves the others alone. A thread in C code cannot be
    interrupted: after the grace (30 s) the call ends all the same, the container takes no more inputs, and is killed
    when the others have ended. (In Modal, cancelling one sync input ends its container, with all others.)

    Args:
        max_inputs: inputs that a container runs at once at most; 1 or more.
        target_inputs: inputs that a container is to run: the number of containers is chosen for that, and up to
            `max_inputs` are run while there are not enough; `max_inputs` by default.

    Raises:
        InvalidError: a value out of its range; on a method, twice, or above `@app.function()`.
    """
    options = concurrency(max_inputs, target_inputs)

    def decorate(marked: T) -> T:
        raw = marked_function("concurrent", marked)
        if not isinstance(raw, type) and is_method(raw):
            raise InvalidError(
                f"@mesh.concurrent() is on the method {name_of(raw)!r}: put it on the class, below @app.cls(); it "
                "holds for all methods"
            )
        mark(raw, "concurrent", _CONCURRENT, options)
        return marked

    return decorate


def batched(*, max_batch_size: int, wait_ms: int) -> Callable[[T], T]:
    """Run inputs together: each parameter is the list of what the calls passed, and a list of results comes back.

    Callers see nothing of it: they pass and get single values, by `remote`, `spawn` or `map`. The first input opens a
    batch, which runs when it is full, or `wait_ms` later. What is wrong with the arguments of one call fails that one
    alone (in Modal the whole batch); an exception, or a result that is no list of the same length, fails each of them,
    and each has its own retries. `current_input_id()` is the first one's; `timeout` is that of the run. A cancelled
    call leaves its batch: the others go on. Stands below `@app.function()`, or on the one method of a class.

    Args:
        max_batch_size: inputs of a batch at most; 1 to 1,000.
        wait_ms: milliseconds that the first input waits for others at most; 0 to 600,000.

    Raises:
        InvalidError: a value out of its range; on a generator, a class, a function with defaults in its signature;
            twice, or above `@app.function()`.
    """
    options = batching(max_batch_size, wait_ms)

    def decorate(marked: T) -> T:
        raw = marked_function("batched", marked)
        _check_batched(raw)
        mark(raw, "batched", _BATCHED, options)
        return marked

    return decorate


def marked_function(decorator: str, marked: object) -> object:
    """The function or class that a mark is for; of a method, what `@mesh.method()` was given."""
    raw = getattr(marked, "raw", marked)
    if not isinstance(raw, type) and not inspect.isroutine(raw):
        raise InvalidError(
            f"@mesh.{decorator}() must stand below @app.function() or @app.cls(), directly above the def or the class: "
            f"swap them. It was given {marked!r}"
        )
    return raw


def _check_batched(marked: object) -> None:
    if isinstance(marked, type):
        raise InvalidError(f"@mesh.batched() is on the class {marked.__name__!r}: put it on the method to be batched")
    assert callable(marked)
    if inspect.isgeneratorfunction(marked) or inspect.isasyncgenfunction(marked):
        raise InvalidError(f"{name_of(marked)!r} is a generator, which cannot be batched: return a list")
    for parameter in inspect.signature(marked).parameters.values():
        if parameter.default is not parameter.empty:
            raise InvalidError(
                f"{name_of(marked)!r} is batched, so its parameter {parameter.name!r} cannot have a default: it is "
                "given the list of what the calls passed"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidError(
                f"{name_of(marked)!r} is batched, so it cannot have the parameter '{parameter}': name each parameter"
            )


def is_method(marked: object) -> bool:
    """Whether a function is defined in a class."""
    owner = str(getattr(marked, "__qualname__", "")).rpartition(".")[0]
    return bool(owner) and not owner.endswith("<locals>")


def name_of(marked: object) -> str:
    """What to call a function or class in an error."""
    return str(getattr(marked, "__qualname__", marked))


def mark(marked: object, decorator: str, name: str, value: object) -> None:
    """Put a mark on what a decorator stands above.

    Raises:
        InvalidError: it is there already.
    """
    if name in vars(marked):
        raise InvalidError(f"@mesh.{decorator}() is on {name_of(marked)!r} twice: keep one")
    setattr(marked, name, value)


# --- what reads the marks --------------------------------------------------------------------------------------------


def function_options(raw: object) -> dict[str, Any]:
    """What the marks of a function say, as options of its `FunctionSpec`; of a method, or a class, its own alone."""
    marks: Mapping[str, Any] = getattr(raw, "__dict__", {})
    return {**marks.get(_CONCURRENT, {}), **marks.get(_BATCHED, {})}


def is_batched(raw: object) -> bool:
    """Whether a function is marked with `@mesh.batched()`."""
    return _BATCHED in getattr(raw, "__dict__", {})


def class_options(cls: type, methods: Mapping[str, object]) -> dict[str, Any]:
    """What the marks of a class and of its methods (by name) say, as options of its `FunctionSpec`.

    Raises:
        InvalidError: a method is batched that is not the only one.
    """
    batched_methods = [name for name, method in methods.items() if is_batched(method)]
    if batched_methods and len(methods) > 1:
        others = ", ".join(sorted(set(methods) - set(batched_methods[:1])))
        raise InvalidError(
            f"class {cls.__name__!r}: its method {batched_methods[0]!r} is batched, so it must be the only one; there "
            f"is also {others}: move what is not batched to a class of its own"
        )
    options = function_options(cls)
    for name in batched_methods:
        options.update(function_options(methods[name]))
    return options
