"""Files from where an app is deployed, for its containers: what `Image.add_local_dir` and its like bring.

They are read when the image is described, travel with the deploy as source does, by their digest, and are copied into
the directory of each container.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from mesh.bundle import Bundle
from mesh.exception import InvalidError, NotFoundError, RequestSizeError

LIMIT = 100 << 20  # bytes of one step

Ignore = Sequence[str] | Callable[[Path], bool]

_read: dict[str, Bundle] = {}
_paths: set[Path] = set()


def read(local: Path, at: str, ignore: Ignore = ()) -> str:
    """Read a file, or all that a directory has.

    Args:
        at: where it is put, relative to the directory of a container.
        ignore: patterns as of `fnmatch`, for paths relative to the directory; or what says so of such a path.

    Returns:
        The digest that `packed` takes.

    Raises:
        NotFoundError: there is no such path. RequestSizeError: it is more than may travel.
    """
    local = local.expanduser().resolve()
    if not local.exists():
        raise NotFoundError(f"there is no {local} to take into the image")
    files: dict[str, bytes] = {}
    size = 0
    for path in [local] if local.is_file() else _inside(local, _ignored(ignore)):
        name = (PurePosixPath(at) / path.relative_to(local).as_posix()).as_posix()
        files[name] = path.read_bytes()
        _paths.add(path)
        size += len(files[name])
        if size > LIMIT:
            raise RequestSizeError(f"{local} has more than {LIMIT:,} bytes, which is the most that may travel")
    if not files:
        raise InvalidError(f"{local} has no files, or all are ignored")
    bundle = Bundle(files)
    _read[bundle.digest] = bundle
    return bundle.digest


def packed(digest: str) -> bytes:
    """What was read in this process, as it travels."""
    return _read[digest].pack()


def paths() -> set[Path]:
    """The files that were read in this process."""
    return _paths


def _ignored(ignore: Ignore) -> Callable[[Path], bool]:
    if callable(ignore):
        return ignore
    patterns = [pattern.removeprefix("**/") for pattern in ignore]

    def ignored(path: Path) -> bool:
        """Whether a pattern fits it, its name, or a directory that it is in."""
        parents = [path, *path.parents[:-1]]
        return any(fnmatch.fnmatch(str(p), x) or fnmatch.fnmatch(p.name, x) for p in parents for x in patterns)

    return ignored


def _inside(directory: Path, ignored: Callable[[Path], bool]) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not ignored(path.relative_to(directory)):
            yield path
