"""What an image is: the steps that make it, as data. Some make the environment that is built; others only say what a
container finds when it starts."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Step(StrEnum):
    """What an image is made of, in the order it is written."""

    PIP = "pip"  # words for `uv pip install`: options and requirements
    SYNC = "sync"  # a project with a lock file of uv: digests of both, and words for `uv sync`
    RUN = "run"  # shell commands, run in the environment
    APT = "apt"  # Debian packages that the worker's system must have
    ENV = "env"
    WORKDIR = "workdir"
    FILES = "files"  # the digest of files that are put into the directory of each container
    SOURCE = "source"  # names of modules that travel with the app's source, too
    REFUSED = "refused"  # what mesh does not have; said at deploy


_BUILDS = (Step.PIP, Step.SYNC, Step.RUN)


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image.

    Attributes:
        python: the minor version of its interpreter; empty for the worker's own. steps: kind and value of each.
        mark: what its containers know it by, also where the files are missing that it was described with.
    """

    python: str = ""
    steps: tuple[tuple[Step, Any], ...] = ()
    mark: str = ""

    def of(self, *kinds: Step) -> list[Any]:
        """The values of the steps of these kinds."""
        return [value for kind, value in self.steps if kind in kinds]

    @property
    def building(self) -> list[tuple[Step, Any]]:
        """The steps that make its environment, with the variables that are set meanwhile."""
        last = max((n for n, (kind, _) in enumerate(self.steps) if kind in _BUILDS), default=-1)
        return [(kind, value) for kind, value in self.steps[: last + 1] if kind in (*_BUILDS, Step.ENV)]

    @property
    def digest(self) -> str:
        """What tells its environment from others: images that differ only in what a container finds share one."""
        return hashlib.sha256(json.dumps([self.python, self.building], sort_keys=True).encode()).hexdigest()

    @property
    def packages(self) -> list[str]:
        """Debian packages that the worker's system must have."""
        return [name for names in self.of(Step.APT) for name in names]

    @property
    def env(self) -> dict[str, str]:
        """Variables, of which the later counts."""
        merged: dict[str, str] = {}
        for variables in self.of(Step.ENV):
            merged |= variables
        return merged

    @property
    def files(self) -> list[str]:
        """Digests of the files that its containers find, in the order in which they are put there."""
        return self.of(Step.FILES)

    @property
    def packs(self) -> list[str]:
        """Digests of all files that travel for it: those, and what it is built of."""
        return [*self.files, *(digest for value in self.of(Step.SYNC) for digest in value["files"])]

    @property
    def modules(self) -> list[str]:
        """Modules that travel with the app's source although it may not import them."""
        return [name for names in self.of(Step.SOURCE) for name in names]

    @property
    def workdir(self) -> str:
        """Where its containers begin, below their own directory; empty for that itself."""
        return next(reversed(self.of(Step.WORKDIR)), "")

    def to_json(self) -> dict[str, Any]:
        values = {"python": self.python, "steps": [[kind.value, value] for kind, value in self.steps]}
        return {name: value for name, value in (values | {"mark": self.mark}).items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageSpec:
        """The inverse. A step of a newer mesh is one that this one does not have."""
        known = {kind.value for kind in Step}
        steps = ((Step(k), v) if k in known else (Step.REFUSED, f"step {k!r}") for k, v in values.get("steps", ()))
        return cls(values.get("python", ""), tuple(steps), values.get("mark", ""))


def inside(path: str) -> str:
    """A path of an image, relative to the directory of a container, out of which nothing leads. `/root` is that itself:
    code written for Modal begins there."""
    first, *rest = posixpath.normpath(f"/{path}").lstrip("/").split("/")
    return "/".join(rest if path.startswith("/") and first == "root" else [first, *rest])
