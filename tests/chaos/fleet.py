"""The processes of a run: a server, workers, clients; each ended one is replaced at once, as a supervisor would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from mesh.processes import end_with_parent
from mesh.server import NatsServer
from tests.chaos.kinds import CRASH_BUDGET
from tests.chaos.proxy import Proxy
from tests.support import ROOT, Mesh, WorkerProcess, until

WORKERS = (False, True, True)  # whether each connects through the proxy
CLIENTS = (False, True, True)
CONTAINERS = 16  # of each worker
SYNC = "2m"  # a SIGKILL leaves what the kernel has been given; only a loss of power would not
DRAIN_LIMIT = 60.0  # seconds a worker may take to stop
_UNREACHABLE = 6  # the exit code of who finds no server when it starts


@dataclass(slots=True)
class Seat:
    """A place for a worker or a client that is never left empty.

    Attributes:
        killed: the process that has it now was killed by us.
    """

    kind: str
    proxied: bool
    process: subprocess.Popen[bytes]
    log: Path
    killed: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def containers(self) -> list[int]:
        return WorkerProcess(self.process, self.log).containers()

    def zygotes(self) -> list[int]:
        return WorkerProcess(self.process, self.log).zygotes()


@dataclass(slots=True)
class Fleet:
    """All processes of a run, and what went wrong with them that nobody wanted to go wrong."""

    mesh: Mesh
    server: NatsServer
    proxy: Proxy
    seed: int
    seats: list[Seat] = field(default_factory=list[Seat])
    leaving: dict[subprocess.Popen[bytes], tuple[Path, float]] = field(
        default_factory=dict[subprocess.Popen[bytes], tuple[Path, float]]
    )
    started: int = 0
    wrong: list[str] = field(default_factory=list[str])

    # --- starting ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Workers first: that calls wait while nobody is there yet is no news."""
        for proxied in WORKERS:
            self.seats.append(self._start("worker", proxied))
        until(lambda: all("is ready" in seat.log.read_text() for seat in self.seats), 60, "the workers are ready")
        for proxied in CLIENTS:
            self.seats.append(self._start("client", proxied))

    def _start(self, kind: str, proxied: bool) -> Seat:
        self.started += 1
        name = f"{kind}-{self.started}"
        log = self.mesh.directory / f"{name}.log"
        command = {
            "worker": ["-m", "mesh", "worker", "--verbose", "--quiet", "--containers", str(CONTAINERS)],
            "client": ["-m", "tests.chaos.clients", name, str(self.seed), str(self.mesh.directory)],
        }[kind]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                env={**self.mesh.variables, **self._variables(proxied)},
                cwd=ROOT if kind == "client" else self.mesh.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        return Seat(kind, proxied, process, log)

    def _variables(self, proxied: bool) -> dict[str, str]:
        port = self.proxy.port if proxied else self.server.port
        return {
            "MESH_NATS_URL": f"nats://127.0.0.1:{port}",
            "MESH_CRASH_BUDGET": str(CRASH_BUDGET),
            "MESH_GRACE": "2",  # shorter than the slow calls, so that some are handed back
            "MESH_CANCEL_GRACE": "5",
            "MESH_SLOT_TTL": "5",  # so that some stops outlast it
            "MESH_CALLER_SILENCE": "20",  # longer than any fault, so that only the dead are silent for so long
            "MESH_SWEEP_INTERVAL": "10",
            "MESH_SUBMIT_TIMEOUT": "2" if proxied else "30",  # so that some submissions stay without answer
        }

    def of(self, kind: str) -> list[Seat]:
        return [seat for seat in self.seats if seat.kind == kind]

    # --- looking after them ------------------------------------------------------------------------------------------

    def replace(self) -> None:
        """Fill every empty seat, and say which were left by themselves."""
        for seat in self.seats:
            code = seat.process.poll()
            if code is None:
                continue
            if not seat.killed and not (code == _UNREACHABLE and "is ready" not in seat.log.read_text()):
                self.wrong.append(f"{seat.log.stem} ended by itself with {code}: {_tail(seat.log)}")
            self.refill(seat)

    def refill(self, seat: Seat) -> None:
        fresh = self._start(seat.kind, seat.proxied)
        seat.process, seat.log, seat.killed = fresh.process, fresh.log, False

    def dismiss(self, seat: Seat) -> None:
        """SIGTERM; somebody else has the seat from now on."""
        seat.process.send_signal(signal.SIGTERM)
        self.leaving[seat.process] = (seat.log, time.monotonic())
        self.refill(seat)

    def watch_leaving(self) -> None:
        """A worker that was told to stop stops soon, and well."""
        for process, (log, since) in list(self.leaving.items()):
            code = process.poll()
            if code is None and time.monotonic() - since < DRAIN_LIMIT:
                continue
            if code is None:
                self.wrong.append(f"{log.stem} did not stop within {DRAIN_LIMIT:g} s: {_tail(log)}")
                process.kill()
                process.wait()
            elif code and "is ready" in log.read_text():  # before that nobody listens to SIGTERM
                self.wrong.append(f"{log.stem} was told to stop, and ended with {code}: {_tail(log)}")
            del self.leaving[process]

    # --- ending ------------------------------------------------------------------------------------------------------

    def stop(self, kind: str, limit: float) -> list[Seat]:
        """SIGTERM to all of a kind; returns those that have not ended well within `limit` seconds."""
        seats = self.of(kind)
        self.seats = [seat for seat in self.seats if seat.kind != kind]
        for seat in seats:
            seat.process.terminate()
        deadline = time.monotonic() + limit
        for seat in seats:
            with contextlib.suppress(subprocess.TimeoutExpired):
                seat.process.wait(max(0.0, deadline - time.monotonic()))
        late = [seat for seat in seats if seat.process.poll() != 0]
        for seat in late:
            seat.process.kill()
            seat.process.wait()
        return late

    def close(self) -> None:
        """End everything, however it is."""
        for process in [*(seat.process for seat in self.seats), *self.leaving]:
            process.kill()
            process.wait()
        self.proxy.close()
        self.server.kill()


def left_over(environment: str) -> list[int]:
    """Processes of an environment that still run, by the variable that all of them were started with."""
    mark = f"MESH_ENVIRONMENT={environment}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _tail(log: Path) -> str:
    return " · ".join(log.read_text(errors="replace").splitlines()[-6:])
