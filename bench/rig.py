"""What is measured: a server, an environment and perhaps a worker, in a directory of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mesh import client
from mesh._sync import bridge
from mesh.config import Settings
from mesh.deploy import import_file
from mesh.server import NatsServer, find_nats_server


class Rig:
    """A server, an environment and perhaps a worker.

    Args:
        sync: when the server writes to disk: `always`, `1s`, `2m`. monitored: its monitoring port is open, to count
            messages.
    """

    def __init__(self, folder: Path, sync: str = "2m", *, monitored: bool = False) -> None:
        self.folder = folder
        self._sync = sync
        self._monitor = _free_port() if monitored else 0
        program = _monitored(folder, self._monitor) if monitored else None
        self.server = NatsServer.start(folder / "nats", sync=sync, program=program)
        self.settings = Settings.load(
            {"nats_url": self.server.url, "cache_dir": str(folder / "cache"), "calls_size": "2G", "results_size": "2G"}
        )
        client.use_settings(self.settings)
        self.worker: subprocess.Popen[bytes] | None = None

    # --- a worker ----------------------------------------------------------------------------------------------------

    def start_worker(self, containers: int = 2) -> float:
        """Start the worker; returns the seconds until it is ready."""
        began = time.monotonic()
        ours, theirs = socket.socketpair()
        variables = {**os.environ, "MESH_NATS_URL": self.server.url, "MESH_CACHE_DIR": str(self.folder / "cache")}
        command = ["worker", "--quiet", "--containers", str(containers), "--ready-fd", str(theirs.fileno())]
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "mesh", *command], env=variables, pass_fds=(theirs.fileno(),)
        )
        theirs.close()
        if not ours.recv(1):
            raise SystemExit(f"the worker ended with {self.worker.wait()}")
        ours.close()
        return time.monotonic() - began

    def stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.send_signal(signal.SIGTERM)
            self.worker.wait()
            self.worker = None

    def restart_server(self) -> None:
        """Kill the server, and start it anew where it was, with what it had."""
        port = self.server.port
        self.server.kill()
        self.server = NatsServer.start(self.folder / "nats", sync=self._sync, port=port)

    # --- user code ---------------------------------------------------------------------------------------------------

    def load(self, name: str, source: str) -> ModuleType:
        """A user's module, imported here."""
        path = self.folder / "src" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        sys.modules.pop(name, None)
        return import_file(path)

    # --- what the server says ----------------------------------------------------------------------------------------

    def messages(self) -> tuple[int, int]:
        """Messages the server took from clients, and gave to them."""
        values = self._ask("varz")
        return values["in_msgs"], values["out_msgs"]

    def stored(self) -> int:
        """Bytes of all messages that JetStream holds."""
        return int(self._ask("jsz")["bytes"])

    def _ask(self, page: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._monitor}/{page}") as answer:
            values: dict[str, Any] = json.load(answer)
        return values

    def close(self) -> None:
        bridge().run(client.close())
        client.use_settings(None)
        self.stop_worker()
        self.server.kill()


@contextlib.contextmanager
def rig(sync: str = "2m", *, monitored: bool = False) -> Iterator[Rig]:
    """A rig that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as name:
        path = list(sys.path)
        made = Rig(Path(name), sync, monitored=monitored)
        try:
            yield made
        finally:
            made.close()
            sys.path[:] = path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _monitored(folder: Path, port: int) -> Path:
    """The server's program with its monitoring port open, which the mesh itself has no use for."""
    script = folder / "nats-server"
    script.write_text(f'#!/bin/sh\nexec {find_nats_server()} -m {port} "$@"\n')
    script.chmod(0o755)
    return script
