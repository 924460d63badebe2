"""One peer set up to be measured: its server, its workers, and the client that answers questions."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

from peers.roster import Contestant
from peers.stores import STORES, Store

_BENCH = Path(__file__).resolve().parent.parent
_PATIENCE = 90.0  # seconds for one answer of the client


class Broken(Exception):
    """A figure that could not be measured; the text says why."""


class Gone(Broken):
    """Nothing more can be measured here: a worker or the client does not answer. The text has the end of the log."""


class Stage:
    """A peer's processes, once it is open. `lease`: as in `peer.LEASE`."""

    def __init__(self, contestant: Contestant, environment: Path, folder: Path, lease: int) -> None:
        self.entry = contestant.entry
        self.folder = folder
        self.store: Store = STORES[self.entry.store](folder / "store", contestant.durability, environment)
        self.commands: list[str] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self._environment = environment
        self._lease = lease
        self._ending = contextlib.ExitStack()

    def open(self) -> None:
        """Start the server, and the client, which makes what workers have to find."""
        self._ending.callback(self.store.kill)
        self.store.start()
        self.log = self._ending.enter_context((self.folder / "log").open("ab"))
        self.client = self._start(f"python -m peers.client {self.entry.name}", pipes=True)
        self._ending.enter_context(self.client)  # waits for it, and closes its pipes
        self._ending.callback(self.client.kill)
        self.answer()

    def close(self) -> None:
        self.stop_workers()
        self._ending.close()

    def _start(self, command: str, *, pipes: bool = False) -> subprocess.Popen[bytes]:
        """A command of the peer's environment, in a session of its own."""
        url, lease = self.store.url, str(self._lease)
        mesh = {"MESH_NATS_URL": url, "MESH_CACHE_DIR": str(self.folder / "cache"), "MESH_ACK_WAIT": lease}
        if not self._lease:
            del mesh["MESH_ACK_WAIT"]
        variables = {
            **os.environ,
            "PATH": f"{self._environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(_BENCH),
            "PYTHONWARNINGS": "ignore",
            "PEERS_URL": url,
            "PEERS_LEASE": lease,
            **mesh,
        }
        return subprocess.Popen(
            shlex.split(command.format(url=url, bench=_BENCH)),
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else self.log,
            stderr=self.log,
            env=variables,
            cwd=self.folder,
            start_new_session=True,
        )

    # --- workers -----------------------------------------------------------------------------------------------------

    def start_workers(self, apart: bool = False) -> None:
        """Start two worker processes, and wait until both have run calls."""
        self.commands = self.entry.workers(apart)
        self.workers = [self._start(command) for command in self.commands]
        if self.entry.pure:
            self.ask(do="round_trips", seconds=0.0, most=20)
        elif self.ask(do="ready", workers=2)["workers"] < 2:
            raise Gone(f"its two workers are not both there: {self.log_end()}")

    def kill_worker(self, number: int) -> None:
        """SIGKILL a worker with everything it has started."""
        for pid in tree(self.workers[number].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.workers[number].wait()

    def restart_worker(self, number: int) -> None:
        self.workers[number] = self._start(self.commands[number])

    def stop_workers(self) -> None:
        """End them as people do, and what is left of them after some seconds as well."""
        groups = [tree(worker.pid) for worker in self.workers]
        for worker in self.workers:
            worker.terminate()
        for number, worker in enumerate(self.workers):
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(2)
            for pid in groups[number]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            worker.wait()
        self.workers = []

    # --- the client --------------------------------------------------------------------------------------------------

    def ask(self, **question: Any) -> dict[str, Any]:
        """One figure.

        Raises:
            Broken: it could not be measured.
        """
        self.send(**question)
        return self.answer()

    def send(self, **question: Any) -> None:
        assert self.client.stdin is not None
        self.client.stdin.write(json.dumps(question).encode() + b"\n")
        self.client.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the client says to what was sent."""
        assert self.client.stdout is not None
        ready, _, _ = select.select([self.client.stdout], [], [], _PATIENCE)
        line = self.client.stdout.readline() if ready else b""
        if not line:
            raise Gone(f"{'its client ended' if ready else f'no answer in {_PATIENCE:.0f} s'}: {self.log_end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Broken(" ".join(answer["error"].strip().splitlines()[-1:])[:300])
        return answer

    def log_end(self) -> str:
        return " ".join((self.folder / "log").read_text(errors="replace")[-300:].split())

    # --- what it costs -----------------------------------------------------------------------------------------------

    def cpu(self) -> dict[str, float]:
        """Seconds of CPU so far: of the server, the workers and the client."""
        return {
            "server": spent(tree(self.store.pid)),
            "workers": sum(spent(tree(worker.pid)) for worker in self.workers),
            "client": spent([self.client.pid]),
        }

    def memory(self) -> float:
        """MB that all processes of the workers hold."""
        held = 0.0
        for worker in self.workers:
            for pid in tree(worker.pid):
                with contextlib.suppress(OSError, StopIteration):
                    held += machine.usage(pid).memory / 1e6
        return held


@contextlib.contextmanager
def stage(contestant: Contestant, environment: Path, lease: int = 0) -> Iterator[Stage]:
    """A stage that leaves nothing behind."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)  # PostgreSQL's user has to get through
        made = Stage(contestant, environment, folder, lease)
        try:
            made.open()
            yield made
        finally:
            made.close()


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += machine.children(parent)
    return found


def spent(pids: list[int]) -> float:
    """Seconds of CPU of processes, with those of their children that have ended."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return total
