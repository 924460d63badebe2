"""How much memory containers hold, seen from outside, and which of them the system killed for want of it.

No limit of the kernel's is set: rlimits count addresses instead of memory, and each process by itself. The worker looks
at all processes of a container, several times a second, and kills above the limit; so it knows why the container ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

_INTERVAL = 0.25  # seconds between looks; one takes 5 µs for each process of the machine
_RECENT = 2.0  # seconds in which the system's kills are put together with the end of a container
_SHARE = 0.05  # of its time that a worker spends at most on exact looks, which take 3.5 ms a GiB
_PAGE = os.sysconf("SC_PAGESIZE")
_PROC = "/proc"
_COUNTED = ("Pss_Anon", "Pss_Shmem")  # parts of smaps_rollup that the kernel cannot get back by itself


@dataclass(slots=True)
class Usage:
    """The memory of one container that has a limit, in bytes.

    Attributes:
        exceeded: called once with no arguments when its processes hold more than the limit.
        peak: the most they were seen to hold.
    """

    session: int
    limit: int
    exceeded: Callable[[], None]
    peak: int = 0
    look_again: float = -math.inf


class MemoryWatch:
    """Looks at the containers of one worker while there are any, all of them in one pass."""

    def __init__(self) -> None:
        self._containers = 0
        self._limited: dict[int, Usage] = {}
        self._kills: deque[tuple[float, int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, session: int, limit: int | None, exceeded: Callable[[], None]) -> None:
        """A container began. Its processes are those of its session; `limit` is in bytes."""
        self._containers += 1
        if limit is not None:
            self._limited[session] = Usage(session, limit, exceeded)
        if self._timer is None:
            self._look()

    def leave(self, session: int) -> int:
        """A container has ended. Returns its peak, as far as it was looked at."""
        self._containers -= 1
        usage = self._limited.pop(session, None)
        if self._timer is not None and not self._containers:
            self._timer.cancel()
            self._timer = None
        return usage.peak if usage else 0

    def held(self, process: int) -> int:
        """The bytes that a process and its children hold now; 0 if it has ended."""
        held = 0
        for pid in _family(process):
            resident = _resident(pid)
            held += _exact(pid, resident) if resident else 0
        return held

    def system_killed(self) -> bool:
        """Whether the system killed some process for want of memory within the last seconds."""
        return bool(self._kills) and oom_kills() > self._kills[0][1]

    def _look(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._look)
        now = time.monotonic()
        self._kills.append((now, oom_kills()))
        while self._kills[0][0] < now - _RECENT:
            self._kills.popleft()
        if self._limited:
            self._measure(now)

    def _measure(self, now: float) -> None:
        sizes: dict[int, list[tuple[int, int]]] = {session: [] for session in self._limited}
        for pid, session, resident in _processes():
            if session in sizes:
                sizes[session].append((pid, resident))
        for usage in list(self._limited.values()):
            if now >= usage.look_again:
                self._compare(usage, sizes[usage.session])

    def _compare(self, usage: Usage, processes: list[tuple[int, int]]) -> None:
        """What is resident is known at no cost, but counts what forks share several times, and files that were only
        read. So it decides when to look closely, and no more."""
        held = sum(resident for _, resident in processes)
        if held > usage.limit:
            began = time.monotonic()
            held = sum(_exact(pid, resident) for pid, resident in processes)
            usage.look_again = began + (time.monotonic() - began) / _SHARE
        usage.peak = max(usage.peak, held)
        if held > usage.limit:
            usage.exceeded()


def _processes() -> Iterator[tuple[int, int, int]]:
    """Every process with its session and its resident bytes."""
    for name in os.listdir(_PROC):  # noqa: PTH208 - a Path for each takes as long as all the rest
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                stat = _read(f"{_PROC}/{name}/stat")
                fields = stat[stat.rindex(b")") + 2 :].split()
                yield int(name), int(fields[3]), int(fields[21]) * _PAGE


def _family(process: int) -> Iterator[int]:
    """A process, its children, and theirs."""
    yield process
    with contextlib.suppress(OSError):  # it has ended, or the kernel does not tell
        for child in _read(f"{_PROC}/{process}/task/{process}/children").split():
            yield from _family(int(child))


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(_read(f"{_PROC}/{pid}/statm").split()[1]) * _PAGE
    return 0


def _exact(pid: int, resident: int) -> int:
    """The bytes that would be free without this process; `resident` where the kernel does not tell us."""
    try:
        lines = _read(f"{_PROC}/{pid}/smaps_rollup").decode().splitlines()
    except OSError:
        return resident if Path(_PROC, str(pid)).exists() else 0
    parts = dict(line.split(":", 1) for line in lines[1:])
    counted = [int(parts[name].split()[0]) << 10 for name in _COUNTED if name in parts]
    return sum(counted) if counted or not parts else resident


def oom_kills() -> int:
    """How many processes the system has killed for want of memory since it started, those in cgroups included; 0 where
    it does not say."""
    with contextlib.suppress(OSError):
        for line in _read(f"{_PROC}/vmstat").splitlines():
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0


def _read(path: str) -> bytes:
    """A file of /proc, at a third of what `Path.read_bytes` takes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)
