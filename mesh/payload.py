"""Payloads that are too large for a message: where one lies in the object store, and its bytes before it lies there."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from mesh.exception import InvalidError, RequestSizeError

CHUNK = 128 << 10  # bytes of a message of the object store: what other clients of NATS use, too

Buffer = bytes | bytearray | memoryview
Way = Literal["in", "out"]

_NAME = re.compile(r"(fc-[0-9A-Z]{26})\.(0|[1-9][0-9]{0,17})\.(in|out)\.[0-9a-f]{8}")
_REFERENCE = re.compile(r"(\S+) ([0-9]{1,18}) sha-256=([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Blob:
    """A payload in the object store, as messages name it in `Mesh-Blob`.

    Attributes:
        name: of the object. size: its bytes. digest: SHA-256 of them, in hex.
    """

    name: str
    size: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name} {self.size} sha-256={self.digest}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`.

        Raises:
            InvalidError: it says something else.
        """
        found = _REFERENCE.fullmatch(text)
        if found is None:
            raise InvalidError(f"Mesh-Blob must be an object's name, its size, and sha-256=<hex>, not {text!r}")
        return cls(found[1], int(found[2]), found[3])


def new_name(key: str, way: Way) -> str:
    """A name for the arguments (`in`) or the result (`out`) of an input. Each try to store them has its own, so that
    two workers that have run the same input never write into one object."""
    return f"{key}.{way}.{secrets.token_hex(4)}"


def parse_name(name: str) -> tuple[str, int, str] | None:
    """Call, index, and `in` or `out` of an object; `None` if it is not one of mesh's."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2]), found[3]) if found else None


class Pieces:
    """Bytes that follow each other, left where they are."""

    def __init__(self, parts: Iterable[Buffer]) -> None:
        self.parts = [memoryview(part).cast("B") for part in parts]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)

    def chunks(self) -> Iterator[bytes]:
        for part in self.parts:
            for at in range(0, len(part), CHUNK):
                yield bytes(part[at : at + CHUNK])


@dataclass(frozen=True, slots=True)
class InFile:
    """Bytes of a file, read as they are needed."""

    path: Path

    def __len__(self) -> int:
        return self.path.stat().st_size

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                yield chunk


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a payload may have at most.

    Attributes:
        size: bytes. reason: where that comes from, and what raises it; part of a sentence.
    """

    size: int
    reason: str

    def check(self, what: str, size: int) -> None:
        """Refuse a payload that is larger.

        Args:
            what: the start of the sentence: `the arguments of … take`.

        Raises:
            RequestSizeError: it is.
        """
        if size > self.size:
            raise RequestSizeError(
                f"{what} {size:,} bytes; the limit is {self.size:,}, {self.reason}. Pass a path or a key to where "
                "the data is"
            )
