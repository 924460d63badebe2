"""Installs what the system tests need. As root, on Debian, with Go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PLACE = ROOT / ".dev" / "bin"
PACKAGES = {  # of Debian, by a program of each
    "chromium": "chromium",
    "curl": "curl",
    "ip": "iproute2",
    "strace": "strace",
    "systemd-analyze": "systemd",
    "tesseract": "tesseract-ocr",
    "tmux": "tmux",
}


def run(*command: str, **variables: str) -> None:
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, **variables})


def main() -> int:
    run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[system]")
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if missing:
        if os.geteuid() != 0:
            print(f"the system tests need {', '.join(missing)}: install them, or run this as root", file=sys.stderr)
            return 1
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)
    if not (PLACE / "nats").exists():
        go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin:/usr/lib/go/bin")
        if go is None:
            print("the system tests need Go, to build the nats command: https://go.dev/dl", file=sys.stderr)
            return 1
        PLACE.mkdir(parents=True, exist_ok=True)
        run(go, "install", "github.com/nats-io/natscli/nats@latest", GOBIN=str(PLACE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
