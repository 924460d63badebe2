"""User data to bytes and back. Only `sdk` and `executor` turn bytes into objects; everybody else passes them on.

Three formats, the first that fits: JSON (what reads well with `nats kv get`), msgpack (the same plus bytes and whole
numbers as keys), cloudpickle for the rest; large buffers, of arrays for example, lie beside the pickle (`buffers`). The
first two are used for exact types only, so that nothing comes back as something else: no subclasses, no tuples.

Exceptions travel by parts (class, arguments, attributes, cause and context) and are rebuilt without calling their
`__init__`: an exception whose `__init__` takes other arguments than it passes on cannot be unpickled otherwise.

A script run as `__main__` keeps its identity: what it defines is sent under the name of its file where the other side
can import that, and what comes back under that name is answered from `__main__`, so a script is never imported twice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import math
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast, overload

import cloudpickle  # type: ignore[import-untyped]
import msgpack

from mesh import buffers, exception
from mesh.exception import DeserializationError, ExecutionError, SerializationError
from mesh.payload import Buffer, Pieces
from mesh.protocol import PREVIEW_LIMIT, Failure, Format
from mesh.spec import qualified_name

_MAX_DEPTH = 64  # of nested lists and dicts in JSON and msgpack; deeper ones (and cycles) are pickled


# --- values ----------------------------------------------------------------------------------------------------------


def _fits(value: object, keys: frozenset[type], leaves: frozenset[type], seen: set[int], depth: int = 0) -> bool:
    """Whether `value` consists of exactly these types (besides lists and dicts), no deeper than allowed, and is a tree:
    a list that is in it twice would come back as two."""
    kind = type(value)
    if kind in leaves:
        return True
    if kind is float:
        return math.isfinite(cast(float, value))
    if (kind is not list and kind is not dict) or depth > _MAX_DEPTH or id(value) in seen:
        return False
    seen.add(id(value))
    parts = cast("list[object]", value)
    if kind is dict:
        for key in cast("dict[object, object]", value):
            if type(key) not in keys:
                return False
        parts = list(cast("dict[object, object]", value).values())
    for part in parts:  # noqa: SIM110 - a generator for each list costs more than most lists
        if type(part) not in leaves and not _fits(part, keys, leaves, seen, depth + 1):
            return False
    return True


_JSON_KEYS: frozenset[type] = frozenset((str,))
_MSGPACK_KEYS: frozenset[type] = frozenset((str, int))
_JSON_LEAVES: frozenset[type] = frozenset((str, int, bool, type(None)))
_MSGPACK_LEAVES = _JSON_LEAVES | {bytes}


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # `dumps` would make it anew each time


@overload
def encode(value: object, main_as: str | None = None) -> tuple[Format, bytes]: ...
@overload
def encode(value: object, main_as: str | None = None, *, apart: bool) -> tuple[Format, bytes | Pieces]: ...
def encode(value: object, main_as: str | None = None, *, apart: bool = False) -> tuple[Format, bytes | Pieces]:
    """`value` in the first format that holds it exactly.

    Args:
        main_as: the name under which the other side can import what this process runs as `__main__`; `None` sends
            what is defined there by value.
        apart: leave the large buffers of a pickle (those of arrays, for example) where they are, instead of copying
            them; the value must not change as long as the body is used.

    Raises:
        SerializationError: it cannot be pickled; the text says which part of it.
    """
    if _fits(value, _JSON_KEYS, _JSON_LEAVES, set()):
        try:
            return Format.JSON, _to_json(value).encode()
        except ValueError:  # lone surrogates, or a number of more than 4,300 digits
            pass
    elif _fits(value, _MSGPACK_KEYS, _MSGPACK_LEAVES, set()):
        try:
            return Format.MSGPACK, msgpack.packb(value)
        except (ValueError, OverflowError):  # surrogates, or a number of more than 64 bits
            pass
    return _dumps_apart(value, main_as) if apart else (Format.PICKLE, dumps(value, main_as))


def decode(format: Format, body: Buffer) -> Any:
    """The value in `body`; its large buffers may be those of the body.

    Raises:
        DeserializationError: it is malformed, or what it is made of cannot be imported here.
    """
    try:
        if format is Format.JSON:
            return json.loads(str(body, "utf-8") if isinstance(body, memoryview) else body)
        if format is Format.MSGPACK:
            return msgpack.unpackb(body, strict_map_key=False)
        if format is Format.BUFFERS:
            pickled, *parts = buffers.find(body)
            return loads(pickled, parts)
        return loads(body)
    except ModuleNotFoundError as error:
        raise DeserializationError(str(error)) from error
    except Exception as error:  # unpickling runs anybody's code
        raise DeserializationError(f"cannot be read as {format}: {type(error).__name__}: {error}") from error


def encode_arguments(
    args: tuple[object, ...], kwargs: dict[str, object], main_as: str | None = None
) -> tuple[Format, bytes | Pieces]:
    """Arguments as one body: ``{"args": […], "kwargs": {…}}``, in the first format that holds them all; see `encode`
    with `apart`.

    Raises:
        SerializationError: one of them cannot be pickled; the text names it.
    """
    try:
        return encode({"args": list(args), "kwargs": kwargs}, main_as, apart=True)
    except SerializationError:
        for name, value in [*((f"argument {i + 1}", a) for i, a in enumerate(args)), *kwargs.items()]:
            try:
                encode(value, main_as)
            except SerializationError as error:
                raise SerializationError(f"cannot send {name}: {error}") from error.__cause__
        raise


def decode_arguments(format: Format, body: Buffer) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of `encode_arguments`; either part may be missing in what a person wrote by hand.

    Raises:
        DeserializationError: malformed, or not of that shape.
    """
    values = decode(format, body) if body else {}
    args = values.get("args", []) if isinstance(values, dict) else None
    kwargs = values.get("kwargs", {}) if isinstance(values, dict) else None
    if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(isinstance(k, str) for k in kwargs):
        raise DeserializationError(f'arguments must be {{"args": […], "kwargs": {{…}}}}, not {_short(values)}')
    return args, kwargs


def preview(format: Format, body: bytes | Pieces) -> str:
    """The start of long arguments, for human eyes; only of what is JSON, since only that is sure to be readable.

    Short ones need none: the message itself shows them.
    """
    if format is not Format.JSON or isinstance(body, Pieces) or len(body) <= PREVIEW_LIMIT:
        return ""
    return body[: 4 * PREVIEW_LIMIT].decode("utf-8", "replace")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # a user's __repr__ may do anything
        text = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= 100 else f"{text[:99]}…"


# --- pickling --------------------------------------------------------------------------------------------------------


def main_name() -> str | None:
    """The importable name of what runs as `__main__`; `None` in a notebook, a REPL, or one of mesh's own commands."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        name = spec.name  # of `python -m shop`: shop.__main__, for `shop` is the package around it
    elif getattr(main, "__file__", None):
        name = _stem(cast(str, cast(types.ModuleType, main).__file__))
    else:
        return None
    return None if name == "__main__" or name.split(".")[0] == "mesh" else name


@functools.lru_cache(maxsize=1)  # asked for at each call
def _stem(file: str) -> str:
    return Path(file).stem


def _named(module: str, qualname: str) -> Any:
    """What `module.qualname` means here; a script that runs as `__main__` is not imported a second time."""
    found: Any = sys.modules["__main__"] if module == main_name() else importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    def __init__(
        self, file: io.BytesIO, main_as: str | None, aside: Callable[[pickle.PickleBuffer], object] | None = None
    ) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=aside)
        self._main_as = main_as

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException):
            return _reduce_exception(obj)
        if self._main_as and isinstance(obj, type | types.FunctionType) and obj.__module__ == "__main__":
            qualname = obj.__qualname__
            if "<" not in qualname and _attribute(sys.modules["__main__"], qualname) is obj:
                return _named, (self._main_as, qualname)
        return super().reducer_override(obj)


def _attribute(module: object, qualname: str) -> object:
    found: object = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == main_name() and module not in sys.modules:
            return _named(module, name)
        try:
            return super().find_class(module, name)
        except ModuleNotFoundError as error:
            text = f"it is made of {module}.{name}; module {error.name!r} cannot be imported here"
            raise ModuleNotFoundError(text, name=error.name) from None


def dumps(value: object, main_as: str | None = None) -> bytes:
    """`value` as a cloudpickle.

    Raises:
        SerializationError: it cannot be pickled; the text says which part of it.
    """
    return _dumps(value, main_as, None)


def _dumps_apart(value: object, main_as: str | None) -> tuple[Format, bytes | Pieces]:
    """The same, with what is large beside it."""
    apart: list[memoryview] = []

    def aside(buffer: pickle.PickleBuffer) -> bool:
        """Keep a large buffer out of the pickle; true has it copied into it."""
        with memoryview(buffer) as view:
            if view.nbytes < buffers.LARGE or not view.contiguous:
                return True
        apart.append(buffer.raw())
        return False

    pickled = _dumps(value, main_as, aside)
    return (Format.BUFFERS, buffers.lay_out(pickled, apart)) if apart else (Format.PICKLE, pickled)


def _dumps(value: object, main_as: str | None, aside: Callable[[pickle.PickleBuffer], object] | None) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, main_as, aside).dump(value)
    except Exception as error:  # pickling runs anybody's code
        way, part = _culprit(value)
        raise SerializationError(f"{way}{_short(part)} cannot be pickled: {error}") from error
    return file.getvalue()


def loads(data: Buffer, apart: Iterable[memoryview] = ()) -> Any:
    """The object in a pickle, and the buffers beside it. Runs whatever code the pickle asks for: only for data from
    one's own mesh."""
    file = io.BytesIO(data) if isinstance(data, bytes) else buffers.Reader(data)
    return _Unpickler(file, buffers=apart).load()


def _pickles(value: object) -> bool:
    try:
        _Pickler(io.BytesIO(), None).dump(value)
    except Exception:  # pickling runs anybody's code
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, object]]:
    """What a value is made of, each with how one would write the way to it."""
    if isinstance(value, list | tuple):
        yield from ((f"[{index}]", item) for index, item in enumerate(cast("list[object]", value)))
    elif isinstance(value, dict):
        yield from ((f"[{_short(key)}]", item) for key, item in cast("dict[object, object]", value).items())
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_names + value.__code__.co_freevars
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=False))
        for name in names:
            if name in cells:
                with contextlib.suppress(ValueError):  # a variable that is not bound yet
                    yield f" its variable {name!r}", cells[name].cell_contents
            elif name in value.__globals__:
                yield f" its global {name!r}", value.__globals__[name]
    else:
        yield from ((f".{name}", item) for name, item in getattr(value, "__dict__", {}).items())


def _culprit(value: object) -> tuple[str, object]:
    """The innermost part of `value` that cannot be pickled, and the way to it as the start of a sentence."""
    way = ""
    for _ in range(6):
        found = next(((step, part) for step, part in _parts(value) if not _pickles(part)), None)
        if found is None:
            break
        way, value = way + found[0], found[1]
    return (f"at {way.strip()}: " if way else ""), value


# --- exceptions ------------------------------------------------------------------------------------------------------

# What exceptions of Python itself keep beside their arguments and their `__dict__`.
_FIELDS: tuple[tuple[type[BaseException], tuple[str, ...]], ...] = (
    (OSError, ("errno", "strerror", "filename", "filename2")),
    (ImportError, ("name", "path")),
    (NameError, ("name",)),
    (AttributeError, ("name",)),
)

_Chain = tuple[BaseException | None, BaseException | None, bool]  # cause, context, whether the context is hidden
_Parts = tuple[dict[str, Any], dict[str, Any], _Chain]


def _reduce_exception(error: BaseException) -> Any:
    cls = type(error)
    chain = (error.__cause__, error.__context__, error.__suppress_context__)
    if any(isinstance(reduce, types.FunctionType) for reduce in (cls.__reduce__, cls.__reduce_ex__)):
        own = error.__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # the class says itself how it travels
        return own if isinstance(own, str) or not any(chain) else (_chained, (own[0], own[1], own[2:3], chain))
    names = next((names for kind, names in _FIELDS if isinstance(error, kind)), ())
    fields = {name: value for name in names if (value := getattr(error, name)) is not None}
    state = {name: value for name, value in error.__dict__.items() if name != "__traceback__"}
    # Its parts come after the exception itself, so that they may refer to it.
    return _new_exception, (cls, error.args), (fields, state, chain), None, None, _fill_exception


def _new_exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """The exception again. A user's own `__init__` is not called: it may not take what `args` holds."""
    own_init = isinstance(cls.__init__, types.FunctionType)
    error = cls.__new__(cls, *args) if own_init else cls(*args)
    object.__setattr__(error, "args", args)  # the class may be a frozen dataclass
    return error


def _chained(
    make: Callable[..., BaseException], args: tuple[Any, ...], state: tuple[Any, ...], chain: _Chain
) -> BaseException:
    """The exception that its class's own `__reduce__` describes, with its cause and context."""
    error = make(*args)
    if state and state[0] is not None:
        setter = getattr(error, "__setstate__", None)
        setter(state[0]) if setter else error.__dict__.update(state[0])
    _set_chain(error, chain)
    return error


def _fill_exception(error: BaseException, parts: _Parts) -> None:
    fields, state, chain = parts
    for name, value in fields.items():
        object.__setattr__(error, name, value)
    error.__dict__.update(state)
    _set_chain(error, chain)


def _set_chain(error: BaseException, chain: _Chain) -> None:
    for name, value in zip(("__cause__", "__context__", "__suppress_context__"), chain, strict=True):
        object.__setattr__(error, name, value)


def safe_str(value: object) -> str:
    """`str(value)`, whatever a user's `__str__` does."""
    try:
        return str(value)
    except Exception as error:  # a user's __str__ may do anything
        return f"<{type(value).__name__}, whose str raises {type(error).__name__}>"


def pack_exception(error: BaseException, skip: Callable[[str], bool]) -> Failure:
    """`error` on its way to the caller.

    Args:
        skip: whether frames of a file are left out at the top of the traceback: the executor's own.
    """
    about = Failure(
        type=qualified_name(type(error)),
        text=safe_str(error),
        traceback=_format_traceback(error, skip),
        bases=tuple(qualified_name(cls) for cls in type(error).__mro__[:-1]),
    )
    if not isinstance(error, Exception):
        return about  # SystemExit and the like must never be raised at the caller
    try:
        pickled = _pickle_exception(error)
    except Exception as reason:  # pickling runs anybody's code
        text = f"{about.type}: {about.text} (the exception itself could not be sent: {safe_str(reason)})"
        return Failure(type=qualified_name(SerializationError), text=text, traceback=about.traceback, bases=about.bases)
    return Failure(type=about.type, text=about.text, traceback=about.traceback, bases=about.bases, pickle=pickled)


def _pickle_exception(error: Exception) -> bytes:
    """The exception's pickle, tried out; without its cause and context where only those cannot travel."""
    try:
        pickled = dumps(error)
        loads(pickled)
    except Exception:  # pickling runs anybody's code
        if error.__cause__ is None and error.__context__ is None:
            raise
        error.__cause__ = error.__context__ = None
        return _pickle_exception(error)
    return pickled


def _format_traceback(error: BaseException, skip: Callable[[str], bool]) -> str:
    frames = error.__traceback__
    while frames is not None and skip(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return "".join(traceback.TracebackException(type(error), error, frames).format())


_TYPE_ERROR = qualified_name(TypeError)


def unpack_exception(failure: Failure, *, unpickle: bool = True) -> Exception:
    """The exception to raise at the caller: the user's own, or what stands in for it, with the remote traceback.

    Args:
        unpickle: whether the failure's pickle may be read; without it every failure of the user's is an ExecutionError.
    """
    error = _own_error(failure) or (_user_error(failure) if unpickle and failure.pickle else None)
    if error is None:
        error = ExecutionError(f"{failure.type.removeprefix('builtins.')}: {failure.text}")
    if failure.traceback:
        notes = [*getattr(error, "__notes__", ()), f"\nRemote traceback:\n{failure.traceback.rstrip()}"]
        object.__setattr__(error, "__notes__", notes)  # as `add_note`, also where the class is a frozen dataclass
    return error


def _own_error(failure: Failure) -> Exception | None:
    """One of mesh's own errors, which need no pickle; or a `TypeError`, of the parameters of a class."""
    if failure.pickle:
        return None
    module, _, name = failure.type.rpartition(".")
    if failure.type == _TYPE_ERROR:
        return TypeError(failure.text)
    cls = getattr(exception, name, None) if module == exception.__name__ else None
    return cls(failure.text) if isinstance(cls, type) and issubclass(cls, exception.Error) else None


def _user_error(failure: Failure) -> Exception | None:
    try:
        error = loads(failure.pickle)
    except ModuleNotFoundError as reason:
        text = f"{failure.type}: {failure.text} (module {reason.name!r}, which defines it, cannot be imported here)"
        return ExecutionError(text)
    except Exception as reason:  # unpickling runs anybody's code
        return ExecutionError(f"{failure.type}: {failure.text} (cannot be rebuilt here: {safe_str(reason)})")
    return error if isinstance(error, Exception) else None
