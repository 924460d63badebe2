"""A user's source while it is being changed: imported anew, with all local modules it imports, whenever one is."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from mesh import localfiles
from mesh.bundle import is_local

_LOOK = 0.1  # seconds between looks at the files


class Source:
    """What `load` imports, and the files that it came from."""

    def __init__(self, load: Callable[[], ModuleType]) -> None:
        self._load = load
        self._before = set(sys.modules)
        self._modules: dict[str, ModuleType] = {}
        self._files: dict[Path, tuple[int, int]] = {}
        self._path = sys.path.copy()  # importing adds to it
        sys.dont_write_bytecode = True  # a cache is told from its source by whole seconds alone

    def load(self) -> ModuleType:
        """Import it, whatever was imported before. Where that fails, what was imported before stays.

        Raises:
            whatever importing raises.
        """
        self._note()
        for name in self._modules:
            sys.modules.pop(name, None)
        sys.path[:] = self._path
        importlib.invalidate_caches()
        try:
            return self._load()
        except BaseException:
            sys.modules.update(self._modules)
            raise
        finally:
            self._note()

    def _note(self) -> None:
        """Remember the local modules that are imported, and how their files are now."""
        imported = {name: module for name, module in sys.modules.items() if name not in self._before}
        self._modules |= {name: module for name, module in imported.items() if _file(module) is not None}
        files = {file for module in self._modules.values() if (file := _file(module)) is not None}
        self._files = {file: _state(file) for file in files | localfiles.paths() | set(self._files)}

    def changed(self, deadline: float) -> bool:
        """Wait until a file is another than it was when it was loaded; false when that is not so until a moment of
        the monotonic clock."""
        while all(_state(file) == state for file, state in self._files.items()):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK)
        return True


def _file(module: ModuleType) -> Path | None:
    """The file of a module of the user's own."""
    name = getattr(module, "__file__", None)
    path = Path(name) if name else None
    return path if path is not None and is_local(path) else None


def _state(file: Path) -> tuple[int, int]:
    """What changes with a file; an editor may be replacing it just now."""
    try:
        found = file.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
