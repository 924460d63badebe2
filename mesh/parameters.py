"""The parameters of a class: what tells one pool of its containers from another.

`mesh.parameter()` declares them; they may be str, int, bool or bytes, so that every process makes the same name out of
the same values. A class with an `__init__` of its own takes whatever JSON or msgpack holds exactly.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from mesh.exception import InvalidError

LIMIT = 16 << 10  # bytes that all parameters of an instance may take, as in Modal
_TYPES: dict[str, type] = {"str": str, "int": int, "bool": bool, "bytes": bytes}
_LEAVES = (str, int, bool, bytes, type(None))


class _Missing:
    def __repr__(self) -> str:
        return "no default"


MISSING = _Missing()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter, as its class declares it.

    Attributes:
        type: its name: str, int, bool or bytes. default: `MISSING` where it must be given.
        init: whether the constructor takes it; one that it does not take always has its default.
    """

    type: str
    default: Any = MISSING
    init: bool = True

    def check(self, name: str, value: Any) -> None:
        """Refuse a value of another type.

        Raises:
            InvalidError: a value of another type.
        """
        if type(value) is not _TYPES[self.type]:
            raise InvalidError(f"parameter {name!r} must be {self.type}, not {type(value).__name__} ({value!r})")

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"type": self.type}
        if self.default is not MISSING:
            values["default"] = to_json(self.default)
        return values if self.init else {**values, "init": False}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Parameter:
        default = from_json(values["default"]) if "default" in values else MISSING
        return cls(values["type"], default, values.get("init", True))


def check_type(name: str, annotation: object) -> str:
    """The name of a parameter's type.

    Raises:
        InvalidError: it is none that a parameter may have.
    """
    for type_name, kind in _TYPES.items():
        if annotation is kind or annotation == type_name:
            return type_name
    raise InvalidError(f"parameter {name!r} must be annotated as one of {', '.join(_TYPES)}, not {annotation!r}")


@dataclass(frozen=True, slots=True)
class Construction:
    """What the constructor of a class is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)

    def check(self, cls: str) -> None:
        """Refuse what cannot travel.

        Raises:
            InvalidError: a value that no format holds exactly, or too much of all.
        """
        for name, value in [*((f"argument {i + 1}", v) for i, v in enumerate(self.args)), *self.kwargs.items()]:
            if not _is_plain(value):
                raise InvalidError(
                    f"{cls}: {name} is {value!r}; constructors take str, int, float, bool, bytes, None, and lists and "
                    "dicts of these"
                )
        size = len(msgpack.packb(self.to_json()))
        if size > LIMIT:
            raise InvalidError(f"{cls}: the parameters take {size:,} bytes; the limit is {LIMIT:,}")

    def to_json(self) -> dict[str, Any]:
        values = {"args": to_json(list(self.args)), "kwargs": to_json(dict(self.kwargs))}
        return {part: value for part, value in values.items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Construction:
        return cls(tuple(from_json(values.get("args", []))), from_json(values.get("kwargs", {})))


def values_of(cls: str, parameters: Mapping[str, Parameter], given: Construction) -> dict[str, Any]:
    """Every parameter of an instance with its value.

    Raises:
        TypeError: what Python's own constructors raise it for. InvalidError: a value of the wrong type.
    """
    names = [name for name, parameter in parameters.items() if parameter.init]
    if len(given.args) > len(names):
        raise TypeError(f"{cls}() takes {len(names)} parameters, and was given {len(given.args)}")
    values = dict(zip(names, given.args, strict=False))
    for name, value in given.kwargs.items():
        if name not in names:
            raise TypeError(f"{cls}() has no parameter {name!r}; it has {', '.join(names) or 'none'}")
        if name in values:
            raise TypeError(f"{cls}() got several values for the parameter {name!r}")
        values[name] = value
    for name in names:
        if name not in values and parameters[name].default is MISSING:
            raise TypeError(f"{cls}() needs a value for the parameter {name!r}")
    for name, value in values.items():
        parameters[name].check(name, value)
    return {name: values.get(name, parameter.default) for name, parameter in parameters.items()}


def bind(cls: str, parameters: Mapping[str, Parameter], given: Construction) -> Construction:
    """What an instance is constructed with, every parameter included; nothing where each has its default.

    Raises:
        TypeError, InvalidError: as `values_of`.
    """
    values = values_of(cls, parameters, given)
    if all(value == parameters[name].default for name, value in values.items()):
        return Construction()
    return Construction(kwargs={name: values[name] for name in sorted(values) if parameters[name].init})


def _is_plain(value: Any, depth: int = 0) -> bool:
    if type(value) in _LEAVES or (type(value) is float and math.isfinite(value)):
        return True
    if depth > 16:
        return False
    if type(value) is list:
        return all(_is_plain(part, depth + 1) for part in value)
    if type(value) is dict:
        parts = value
        return all(type(key) is str for key in parts) and all(_is_plain(part, depth + 1) for part in parts.values())
    return False


# --- as JSON, which has no bytes -------------------------------------------------------------------------------------

_BYTES = "=bytes"  # the only key of what stands for bytes; `=` begins no Python name


def to_json(value: Any) -> Any:
    """A plain value as JSON holds it."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [to_json(part) for part in value]
    if isinstance(value, dict):
        return {key: to_json(part) for key, part in value.items()}
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(part) for part in value]
    if isinstance(value, dict):
        parts = value
        if parts.keys() == {_BYTES}:
            return base64.b64decode(parts[_BYTES], validate=True)
        return {key: from_json(part) for key, part in parts.items()}
    return value
