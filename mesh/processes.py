"""What Linux does for processes: ends them with their parent, gives orphans to an ancestor, and shows their names.

What a container does after its fork costs memory: each line that runs writes to pages that it shared until then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_ARGUMENTS = slice(45, 47)  # of the fields of /proc/self/stat after the name: where the arguments begin and end
_OOM_SCORE = 800  # of 1,000; a worker has 0 as a rule

# Loaded here: not safe to do between fork and exec.
_libc: ctypes.CDLL | None = ctypes.CDLL(None) if sys.platform == "linux" else None


def _prctl(option: int, argument: int | bytes) -> None:
    if _libc is not None:
        _libc.prctl(option, argument, 0, 0, 0)


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when the thread that started it ends. Linux only; a no-op elsewhere."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def go_first_when_out_of_memory() -> None:
    """The system shall kill containers before their worker; what they start inherits that. Raising needs no rights."""
    try:
        score = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # there is no such thing here
    if int(os.read(score, 8)) < _OOM_SCORE:
        os.write(score, b"%d" % _OOM_SCORE)
    os.close(score)


def kill(pid: int) -> None:
    """Kill a process, and its group if it leads one. Only a parent may do that: the id of its child stays its child's
    until it has waited for it."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def children() -> dict[int, int]:
    """The processes whose parent this one is, each with its session; those included that have ended and were not
    waited for. (Where the kernel has a list of children, it says itself not to trust it.)"""
    own, found = b"%d" % os.getpid(), {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - a Path for each takes as long as all the rest
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                _, parent, _, session, *_ = _stat(name)
                if parent == own:
                    found[int(name)] = int(session)
    return found


def _stat(process: str) -> list[bytes]:
    """The fields of its stat after the name, which may hold anything."""
    descriptor = os.open(f"/proc/{process}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096).rpartition(b") ")[2].split()
    finally:
        os.close(descriptor)


def variables(pid: int) -> bytes:
    """The environment variables that a process had when its program was started; none where it does not say."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def set_title(name: str, title: str) -> None:
    """Show this process under a name (15 characters) and as a command line: for `ps` and whoever looks for it.

    The command line is cut to the length it had when the program was started.
    """
    _prctl(_PR_SET_NAME, name.encode()[:15])
    try:
        start, end = map(int, _stat("self")[_ARGUMENTS])
    except (OSError, ValueError):
        return  # this system does not say where it is
    if 0 < start < end:
        room = end - start
        ctypes.memmove(start, title.encode()[: room - 1].ljust(room, b"\0"), room)
