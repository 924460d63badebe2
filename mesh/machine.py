"""What this machine has: cores and memory, as far as this process may use them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def cores() -> float:
    """Cores that this process may use: those it is bound to, or fewer where its cgroup has a quota."""
    bound = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, period = [*_words(_CGROUP / "cpu.max"), "max", "max"][:2]
    if not quota.isdigit():  # version 1 of cgroups
        quota, period = ("".join(_words(_CGROUP / "cpu" / name)) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min(bound, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else bound


def memory() -> int:
    """MiB of memory that this process may use: the machine's, or what its cgroup allows."""
    total = next((int(words[1]) >> 10 for words in map(str.split, _lines(_MEMINFO)) if words[0] == "MemTotal:"), 0)
    limits = [*_words(_CGROUP / "memory.max"), *_words(_CGROUP / "memory" / "memory.limit_in_bytes")]
    return min([total, *(int(limit) >> 20 for limit in limits if limit.isdigit())])


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):  # not Linux, or no cgroup of this version
        return path.read_text().splitlines()
    return []
