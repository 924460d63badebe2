"""What a function's options say of a secret: its name; or, where it has none, what tells it from others.

Values never get into a record: those of a secret without a name are sealed, and stored under its digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh.exception import InvalidError

_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_LONGEST_NAME, _LONGEST_VALUE = 16_384, 32_768  # characters


def check_env(env: Mapping[Any, Any], option: str = "env") -> None:
    """Refuse what cannot be environment variables; `option` says where they stand, for the error. As in Modal."""
    for key, value in env.items():
        if not isinstance(key, str) or not _VARIABLE.fullmatch(key) or len(key) > _LONGEST_NAME:
            raise InvalidError(f"{option}: {key!r} is no variable name; letters, digits and underscore, no digit first")
        if not isinstance(value, str):
            raise InvalidError(f"{option}: the value of {key} must be a string, not {type(value).__name__}")
        if len(value) > _LONGEST_VALUE or "\0" in value:
            raise InvalidError(
                f"{option}: the value of {key} must be at most {_LONGEST_VALUE:,} characters, without a zero byte"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretRef:
    """A secret that a function names.

    Attributes:
        name: of one that is stored under it; empty for one that came with the source. required: variables it must have.
        environment: where a name is looked up, if that was said; must be the function's own.
        values: of one without a name, in the process that made it; nowhere else. told_digest: of one that was read.
    """

    name: str = ""
    required: tuple[str, ...] = ()
    environment: str = ""
    values: Mapping[str, str] | None = field(default=None, repr=False)
    told_digest: str = ""

    @property
    def digest(self) -> str:
        """What tells a secret without a name from others. It is made slowly, so that few values can be tried."""
        if self.name:
            return ""
        return self.told_digest or _digest(json.dumps(self.values, sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        values = {"name": self.name, "required": list(self.required), "digest": self.digest}
        return {part: value for part, value in values.items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SecretRef:
        return cls(
            name=values.get("name", ""),
            required=tuple(values.get("required", ())),
            told_digest=values.get("digest", ""),
        )


@functools.lru_cache(maxsize=64)
def _digest(values: str) -> str:
    return hashlib.scrypt(values.encode(), salt=b"mesh secret", n=1 << 14, r=8, p=1, dklen=16).hex()
