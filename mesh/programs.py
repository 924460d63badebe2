"""Programs that a worker runs for images: behind everything else, with what they need of its variables, and ended with
whatever they started."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

_KEPT = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "SSL_", "UV_", "PIP_", "NETRC", "PYENV_ROOT", "SUDO_")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_AS_UV_SAYS = {  # pip's settings: uv reads none of them, and a machine that is set up for one has them
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
_NICENESS = 10
_LONGEST_OUTPUT = 1 << 16  # bytes of it that are kept, the last ones


def variables() -> dict[str, str]:
    """Those of the worker's own that tell programs where packages come from; none of the mesh's."""
    own = os.environ
    kept = {name: own[name] for name in own if name.startswith(_KEPT) or name.upper() in _PROXIES}
    certificates = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}  # the system's; the newer name, and the older
    return {**certificates, **_of_pip(own), **kept, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}


def _of_pip(own: Mapping[str, str]) -> dict[str, str]:
    """What pip is told by its files and variables, as uv is told it."""
    found = {}
    for option, name in _AS_UV_SAYS.items():
        value = own.get(f"PIP_{option.upper().replace('-', '_')}") or _pip_files(own).get(option)
        if value:
            found[name] = " ".join(value.split())
    return found


def _pip_files(own: Mapping[str, str]) -> dict[str, str]:
    home = Path(own.get("HOME", "/"))
    files = [Path("/etc/pip.conf"), home / ".pip" / "pip.conf", home / ".config" / "pip" / "pip.conf"]
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error):
        parser.read([*files, own.get("PIP_CONFIG_FILE", "")], encoding="utf-8")
    return {k: v for section in ("global", "install") if parser.has_section(section) for k, v in parser.items(section)}


async def run(command: Sequence[str], own: Mapping[str, str] | None = None, cwd: str | Path = "/") -> tuple[int, str]:
    """Run a program to its end; returns its exit code and what it printed. Cancelling kills it."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(variables() if own is None else own),
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.setpriority(os.PRIO_PGRP, process.pid, _NICENESS)
    output = b""
    try:
        while piece := await process.stdout.read(_LONGEST_OUTPUT):
            output = (output + piece)[-_LONGEST_OUTPUT:]
        return await process.wait(), output.decode("utf-8", "replace").strip()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
