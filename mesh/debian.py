"""Debian packages of the worker's own system: which are missing, and installing them where that is allowed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from mesh.programs import run

_INSTALL = ("install", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600", "--")


async def missing(packages: Sequence[str]) -> list[str]:
    """Those of these packages that are not installed; all, where the system has no dpkg. Versions are not looked at."""
    names = [package.partition("=")[0] for package in packages]
    if not names or shutil.which("dpkg-query") is None:
        return list(dict.fromkeys(names))
    _, output = await run(["dpkg-query", "-W", "-f", r"${Package} ${db:Status-Status}\n", *names])
    there = {line.split()[0] for line in output.splitlines() if line.endswith(" installed")}
    return [name for name in dict.fromkeys(names) if name.partition(":")[0] not in there]


async def install(packages: Sequence[str]) -> str:
    """Install packages, as root or by a `sudo` that asks nothing. Returns what apt-get said where that failed."""
    apt = [*([] if os.geteuid() == 0 else ["sudo", "-n"]), "/usr/bin/env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    code, output = await run([*apt, *_INSTALL, *packages])
    if code:  # the lists may be old, or none
        await run([*apt, "update"])
        code, output = await run([*apt, *_INSTALL, *packages])
    return output if code else ""
