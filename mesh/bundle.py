"""An app's source on its way to workers: which files, packed how, unpacked where.

The bundle is the static import closure of the deployed file over local modules: what is neither the standard library,
nor installed, nor mesh itself. Only `.py` files travel; nothing is executed to find them. Its digest goes over paths
and contents, so the same source has the same digest wherever it was packed.
"""

from __future__ import annotations

import ast
import compileall
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path, PurePosixPath

from mesh.exception import DataLossError, InvalidError, RequestSizeError

LIMIT = 10 << 20  # bytes of source; a larger bundle means that something else came along
_LEFT_OUT = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """Source files by their path under what becomes an entry of `sys.path`."""

    files: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """sha256 over the sorted paths and contents."""
        total = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            total.update(f"{path}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        return total.hexdigest()

    @property
    def modules(self) -> tuple[str, ...]:
        """Top-level names of the modules in it."""
        return tuple(sorted({path.partition("/")[0].removesuffix(".py") for path in self.files}))

    def pack(self) -> bytes:
        """As a zip, the same bytes for the same files."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in sorted(self.files.items()):
                archive.writestr(zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    @classmethod
    def unpack(cls, data: bytes, digest: str) -> Bundle:
        """The inverse of `pack`.

        Raises:
            DataLossError: it is not what the digest says.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                bundle = cls({name: archive.read(name) for name in archive.namelist()})
        except Exception as error:  # noqa: BLE001 - damaged bytes raise almost anything
            raise DataLossError(f"the source bundle {digest[:12]} is damaged: {error}; deploy the app again") from None
        if bundle.digest != digest:
            raise DataLossError(f"the source bundle {digest[:12]} does not match its digest; deploy the app again")
        return bundle

    def write(self, directory: Path, *, source: bool = True) -> None:
        """Put the files under `directory`, source compiled; it appears complete or not at all.

        Raises:
            DataLossError: a path leads elsewhere, or is none of source.
        """
        for name in self.files:
            _check_path(name, source)
        fresh = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
        shutil.rmtree(fresh, ignore_errors=True)
        for name, content in self.files.items():
            target = fresh / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if source:
            compileall.compile_dir(fresh, quiet=2, stripdir=str(fresh), prependdir=str(directory))
        try:
            fresh.rename(directory)
        except OSError:  # another worker was faster
            shutil.rmtree(fresh, ignore_errors=True)
            if not directory.is_dir():
                raise


def _check_path(name: str, source: bool) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or (source and not name.endswith(".py")):
        raise DataLossError(f"a source bundle holds the path {name!r}, which no bundle of ours does")


# --- which files -----------------------------------------------------------------------------------------------------


def collect(entries: Mapping[str, Path | None]) -> tuple[Bundle, set[str]]:
    """The bundle of some modules and all local modules they import.

    Args:
        entries: names of modules, each with its file where it cannot be found by its name: a script run as `__main__`.

    Returns:
        The bundle, and the top-level names of installed packages that its files import.

    Raises:
        RequestSizeError: above the limit; the text lists the largest files.
        InvalidError: local code that is not Python source.
    """
    files: dict[str, bytes] = {}
    installed: set[str] = set()
    seen: set[str] = set()
    queue = [(name.partition(".")[0], path) for name, path in entries.items()]
    while queue:
        name, path = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        sources = {f"{name}.py": path} if path else _sources(name)
        if sources is None:
            installed.add(name)
            continue
        for inside, source in sources.items():
            content = source.read_bytes()
            files[inside] = content
            queue += [(imported, None) for imported in _imports(content)]
    _check_size(files)
    return Bundle(files), installed - set(sys.stdlib_module_names)


def _sources(name: str) -> dict[str, Path] | None:
    """The files of a local module or package by their path in the bundle; `None` if it is not local."""
    spec = _find(name)
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        folders = [Path(place) for place in spec.submodule_search_locations]
        if not all(is_local(folder) for folder in folders):
            return None
        return {
            f"{name}/{path.relative_to(folder).as_posix()}": path
            for folder in folders
            for path in _python_files(folder)
        }
    if not spec.has_location or spec.origin is None or not is_local(Path(spec.origin)):
        return None
    if spec.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        raise InvalidError(
            f"module {name!r} is a compiled extension beside your code ({spec.origin}): only .py files travel with a "
            "deploy; install it as a package on the workers"
        )
    return {f"{name}.py": Path(spec.origin)}


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        return None


def is_local(path: Path) -> bool:
    """Whether a file or folder is the user's own source: not the standard library, not installed, not mesh."""
    real = path.resolve()
    if _LEFT_OUT & set(real.parts):
        return False
    return not any(real.is_relative_to(place) for place in _not_local())


def _not_local() -> Iterator[Path]:
    for key in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_path(key)).resolve()
    yield Path(__file__).resolve().parent


def _python_files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and f not in _LEFT_OUT and not (Path(root) / f / "pyvenv.cfg").exists()
        )
        # No module's name starts with a dot; files of such names are editors' links and metadata.
        yield from (Path(root) / name for name in sorted(names) if name.endswith(".py") and name[0] != ".")


def _imports(content: bytes) -> Iterator[str]:
    """Top-level names a file imports, wherever in it: also inside functions and `try`. None of what is no Python:
    such a file in a package fails where it is imported, here as there."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def _check_size(files: Mapping[str, bytes]) -> None:
    total = sum(map(len, files.values()))
    if total <= LIMIT:
        return
    largest: Iterable[tuple[str, bytes]] = sorted(files.items(), key=lambda item: -len(item[1]))[:10]
    listed = "".join(f"\n  {len(content):>12,}  {path}" for path, content in largest)
    raise RequestSizeError(
        f"the local source of this app takes {total:,} bytes in {len(files)} files; the limit is {LIMIT:,}. "
        f"The largest:{listed}"
    )
