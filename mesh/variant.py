"""What makes a pool of its own: options other than the function's, and the parameters of a class.

A pool is named by a hash of both, so every process that calls with the same ones means the same pool.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import msgpack

from mesh.parameters import Construction, bind
from mesh.protocol import SHARED_POOL
from mesh.secretref import SecretRef
from mesh.spec import FunctionSpec, option_to_json

CALL_OPTIONS = ("result_ttl", "keep_result", "detach")  # shape a call alone, not the containers that run it
_NAME_LENGTH = 10  # hex digits of a pool's name


@dataclass(frozen=True, slots=True)
class Variant:
    """How calls differ from what a function, or a class, says of itself.

    Attributes:
        options: those of `FunctionSpec` that are set anew. construction: what the constructor of a class is given.
    """

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    construction: Construction = field(default_factory=Construction)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """These options as well; those that are `None` stay as they are.

        Raises:
            InvalidError: a value out of its range.
        """
        merged = {**self.options, **{name: value for name, value in options.items() if value is not None}}
        FunctionSpec(name="options", **merged)
        return dataclasses.replace(self, options=merged)

    def of(self, spec: FunctionSpec) -> Self:
        """The same, with every parameter of the class that `spec` describes.

        Raises:
            TypeError, InvalidError: the class cannot be constructed with these.
        """
        if spec.parameters is None:
            return self
        return dataclasses.replace(self, construction=bind(spec.name, spec.parameters, self.construction))

    def apply(self, spec: FunctionSpec) -> FunctionSpec:
        """The options in force. `min_containers` is the shared pool's alone, as in Modal.

        Raises:
            InvalidError: together they make no sense.
        """
        if self.pool == SHARED_POOL:
            return dataclasses.replace(spec, **self.options) if self.options else spec
        return dataclasses.replace(spec, **{"min_containers": 0, **self.options})

    @property
    def secrets(self) -> tuple[SecretRef, ...]:
        """Those set anew."""
        secrets: tuple[SecretRef, ...] = self.options.get("secrets", ())
        return secrets

    @property
    def pool(self) -> str:
        """The pool's name: `_`, or ten hex digits."""
        options = {name: value for name, value in self.options.items() if name not in CALL_OPTIONS}
        if not options and not self.construction:
            return SHARED_POOL
        told = msgpack.packb(_sorted([self.construction.to_json(), _options_to_json(options)]))
        return hashlib.sha256(told).hexdigest()[:_NAME_LENGTH]

    def to_json(self) -> dict[str, Any]:
        """Only what is not as the function itself has it."""
        values = {"options": _options_to_json(self.options), "construction": self.construction.to_json()}
        return {part: value for part, value in values.items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        known = {"name": "options", **values.get("options", {})}
        spec = FunctionSpec.from_json(known)  # options of newer versions are ignored
        options = {name: getattr(spec, name) for name in known if name != "name" and hasattr(spec, name)}
        return cls(options, Construction.from_json(values.get("construction", {})))


def _options_to_json(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: option_to_json(name, value) for name, value in options.items()}


def _sorted(value: Any) -> Any:
    """With the keys of every dict in order, since msgpack keeps the order they came in."""
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(part) for part in value] if isinstance(value, list | tuple) else value
