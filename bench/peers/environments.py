"""A virtual environment for each peer, made once and kept."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

from peers.roster import Entry
from peers.stores import Missing


def prepare(entry: Entry, cache: Path) -> Path:
    """The environment of a peer; of the checkout where it needs nothing of its own.

    Raises:
        Missing: it does not install; the text holds why.
    """
    if not entry.packages:
        return Path(sys.prefix)
    place = cache / entry.environment
    mark = place / "bench-stamp"
    stamp = hashlib.sha256("\n".join([sys.version, *entry.packages]).encode()).hexdigest()
    if mark.exists() and mark.read_text() == stamp:
        return place
    print(f"installing {' '.join(entry.packages)} (once)", flush=True)
    venv.EnvBuilder(with_pip=False, clear=True, symlinks=True).create(place)
    command = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet"]
    done = subprocess.run([*command, *entry.packages], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Missing(f"does not install: {lines[-1] if lines else done.returncode}")
    mark.write_text(stamp)
    return place


def version(entry: Entry, place: Path) -> str:
    """Of the package the peer is."""
    name = entry.distribution or entry.environment
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return subprocess.run([place / "bin" / "python", "-c", code], capture_output=True, text=True).stdout.strip()
