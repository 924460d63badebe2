"""A whole run: start everything, let it fight, mend it, wait until all has ended, and look at what is there."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from mesh.deploy import import_file
from mesh.server import NatsServer
from tests.chaos import store
from tests.chaos.check import Report, check
from tests.chaos.fleet import SYNC, Fleet, left_over
from tests.chaos.ledger import Book
from tests.chaos.nemesis import Hit, Nemesis
from tests.chaos.plan import Fault, plan
from tests.chaos.proxy import Proxy
from tests.support import Mesh, new_mesh

ACK_WAIT = 3.0  # seconds; short, so that stops and holes outlast it
_SIZES = {"calls_size": "1G", "results_size": "4G", "dead_size": "256M"}
_CLIENTS_END = 90.0  # seconds after everything is mended within which every client has what it waits for
_QUEUE_ENDS = 120.0  # seconds after that within which all else has ended
_NEWS = 5.0  # seconds between two lines of progress
_SHOWN = 20  # findings that are printed whole


@dataclass(slots=True)
class Run:
    """One run, of some seconds of faults.

    Attributes:
        faults: the kinds of them. ack_wait: of the environment, in seconds.
        directory: everything it writes; kept where something is wrong.
    """

    seed: int
    seconds: float
    faults: Collection[Fault] = tuple(Fault)
    ack_wait: float = ACK_WAIT
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mesh-chaos-")))
    book: Book = field(init=False)
    _hits: list[Hit] = field(default_factory=list[Hit])
    _said: float = 0.0

    def __post_init__(self) -> None:
        self.book = Book(self.directory)

    def run(self) -> Report:
        """Do it all; whatever happens, no process is left behind."""
        server = NatsServer.start(self.directory / "nats", sync=SYNC)
        try:
            with new_mesh(server, self.directory, ack_wait=self.ack_wait, **_SIZES) as mesh:
                import_file(Path(__file__).with_name("functions.py")).app.deploy()
                report = self._with(mesh, server)
        finally:
            server.kill()
        if not report.wrong:
            shutil.rmtree(self.directory)
        return report

    def _with(self, mesh: Mesh, server: NatsServer) -> Report:
        before = mesh.ask(store.read)
        fleet = Fleet(mesh, server, Proxy(server.port), self.seed)
        try:
            fleet.start()
            nemesis = Nemesis(fleet, plan(self.seed, self.seconds, self.faults))
            nemesis.run(self.seconds, lambda: self._progress(nemesis))
            self._hits = nemesis.hits
            self._end(fleet)
            after = mesh.ask(store.read)
        finally:
            fleet.close()
        remaining = left_over(mesh.settings.environment)
        self.book.read()
        report = check(self.book, nemesis.hits, before, after)
        report.wrong += [("", text) for text in fleet.wrong]
        report.wrong += [("", f"process {pid} was left behind") for pid in remaining]
        return report

    def _end(self, fleet: Fleet) -> None:
        """Everything is mended: all that was submitted comes to its end, and everybody stops well."""
        self.say("mended; waiting for what is under way")
        fleet.wrong += [
            f"{seat.log.stem} still waited for its calls {_CLIENTS_END:g} s after all was well, or failed"
            for seat in fleet.stop("client", _CLIENTS_END)
        ]
        self._until_nothing_waits(fleet)
        for seat in fleet.stop("worker", 30):
            fleet.wrong.append(f"{seat.log.stem} did not stop as it should: {seat.process.returncode}")
        deadline = time.monotonic() + 60
        while fleet.leaving and time.monotonic() < deadline:
            fleet.watch_leaving()
            time.sleep(0.1)
        self.book.read()

    def _until_nothing_waits(self, fleet: Fleet) -> None:
        """Until the queue is empty, and workers have found that killed clients are silent: for that, they want to have
        been connected for as long as a client may be silent."""
        deadline = time.monotonic() + _QUEUE_ENDS
        while time.monotonic() < deadline:
            fleet.replace()
            if not any(fleet.mesh.ask(store.queue)) and not fleet.mesh.ask(store.waiting_clients):
                return
            time.sleep(0.2)

    def _progress(self, nemesis: Nemesis) -> None:
        if nemesis.elapsed - self._said < _NEWS:
            return
        self._said = nemesis.elapsed
        self.book.read()
        running = sum(len(runs) for runs in self.book.executions.values())
        newest = ", ".join(f"{hit.fault}" for hit in nemesis.hits[-3:])
        self.say(
            f"{nemesis.elapsed:4.0f} s  {len(self.book.accepted):6,} accepted  {running:6,} executions  "
            f"{len(nemesis.hits):3} faults ({newest})"
        )

    # --- telling what is wrong ---------------------------------------------------------------------------------------

    def explained(self, report: Report) -> list[str]:
        """What is known of what is wrong: the first findings with all their lines, of the others the number."""
        lines = []
        for id, text in report.wrong[:_SHOWN]:
            lines.append(f"✗ {id} {text}".replace("  ", " "))
            if id:
                lines += [f"    {line}" for line in self._about(id)]
        if len(report.wrong) > _SHOWN:
            lines.append(f"… and {len(report.wrong) - _SHOWN} more")
        return lines

    def _about(self, id: str) -> list[str]:
        """What ledger, executions and the workers' logs have of a call."""
        known = [line for call in self.book.calls.values() if id in call.ids for line in call.lines]
        runs = self.book.executions.get(id, [])
        known += [f"{run}" for run in runs]
        times = [call.tried for call in self.book.calls.values() if id in call.ids] + [run.at for run in runs]
        known += [f"{hit}" for hit in self._hits if hit.end >= min(times) and hit.start <= max(times)] if times else []
        for log in sorted(self.directory.glob("worker-*.log")):
            known += [f"{log.stem}: {line}" for line in log.read_text(errors="replace").splitlines() if id in line]
        return known
