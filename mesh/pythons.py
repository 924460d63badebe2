"""Which Pythons this machine has."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mesh import programs

_POSSIBLE = [f"3.{number}" for number in range(11, 20)]
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"


async def find(minor: str) -> str:
    """An interpreter of this minor version: the worker's own, one of pyenv's, or whatever uv finds; else nothing.

    What is on the PATH comes last: a shim of pyenv's has the name of a Python, and need not be one.
    """
    if minor in ("", OWN):
        return sys.executable
    own = programs.variables()
    for folder in _of_pyenv(minor):
        if (python := folder / f"python{minor}").exists():
            return str(python)
    code, output = await programs.run([uv(), "python", "find", minor], own)
    return output.splitlines()[-1] if code == 0 and output else ""


def seen() -> tuple[str, ...]:
    """The minor versions that lie where Pythons usually do. Others may be found all the same, and none is tried."""
    return tuple(minor for minor in _POSSIBLE if minor == OWN or any(_of_pyenv(minor)) or _on_path(minor))


def _on_path(minor: str) -> bool:
    found = shutil.which(f"python{minor}")
    return found is not None and Path(found).parent.name != "shims"


def _of_pyenv(minor: str) -> Iterator[Path]:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    versions = [path for path in (root / "versions").glob(f"{minor}.*") if path.name.rpartition(".")[2].isdigit()]
    yield from (path / "bin" for path in sorted(versions, key=lambda path: -int(path.name.rpartition(".")[2])))


def uv() -> str:
    """The program that builds environments; it is installed with mesh."""
    from uv import find_uv_bin

    return find_uv_bin()
