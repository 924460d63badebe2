"""What environments take on this machine: held while they are used, and those that were used last are kept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path

_UNUSED = 30 * 86_400.0  # seconds after which one goes, however much room there is
_ABANDONED = 86_400.0  # seconds after which what is half built has nobody who builds it


class Hold:
    """A use of an environment, which ends with the process at the latest: meanwhile nobody removes it.

    Raises:
        BlockingIOError: somebody is removing it.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._file = os.open(_mark(target), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.end()
            raise
        self.renew()

    def renew(self) -> None:
        """It is used now."""
        self.renewed = time.time()
        os.utime(self._file)

    def end(self) -> None:
        os.close(self._file)


def note_size(made: Path, target: Path) -> None:
    """Write down what an environment takes that is about to come here; files that it shares with others count, too."""
    total = sum(path.lstat().st_size for path in made.rglob("*") if not path.is_symlink())
    _mark(target).write_text(str(total))


def tidy(directory: Path, limit: int) -> list[str]:
    """Remove environments that nobody uses: of long ago, and those used least lately, while all take more than `limit`
    bytes. Returns their names."""
    now = time.time()
    for half in directory.glob("*.tmp-*"):
        with contextlib.suppress(OSError):
            if now - half.stat().st_mtime > _ABANDONED:
                shutil.rmtree(half, ignore_errors=True)
    marks = sorted(directory.glob("*.used"), key=lambda mark: mark.stat().st_mtime)
    total = sum(_size(mark) for mark in marks)
    removed: list[str] = []
    for mark in marks:
        if (total > limit or now - mark.stat().st_mtime > _UNUSED) and _remove(mark):
            removed.append(mark.stem)
            total -= _size(mark)
            mark.unlink()
    return removed


def _remove(mark: Path) -> bool:
    """Remove an environment, unless somebody uses it."""
    with mark.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(mark.with_suffix(""), ignore_errors=True)
        return True


def _mark(target: Path) -> Path:
    """The file whose lock says that an environment is used, whose time when that was, and whose content its size."""
    return target.with_suffix(".used")


def _size(mark: Path) -> int:
    return int(mark.read_text() or 0)
