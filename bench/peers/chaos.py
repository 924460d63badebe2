"""A worker and the server are killed while calls come in: what is lost, what runs twice, how long calls then wait."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers.roster import Contestant
from peers.stage import Stage, stage

RATE, SECONDS = 60, 4.0
LEASE = 5
PATIENCE = 15.0
_KILL_WORKER, _RESTART_WORKER, _KILL_SERVER = 1.0, 1.5, 2.5  # seconds after the beginning
_SUPERVISOR = 0.5  # seconds after which a worker that has ended is started again


def run(contestant: Contestant, environment: Path) -> dict[str, float]:
    """Once; the counts are of accepted calls."""
    with stage(contestant, environment, lease=LEASE) as at:
        at.start_workers(apart=True)
        ledger = at.folder / "ledger"
        ledger.touch()
        ledger.chmod(0o666)
        at.send(do="chaos", ledger=str(ledger), rate=RATE, seconds=SECONDS, patience=PATIENCE)
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            killing = pool.submit(_kill, at, ended)
            try:
                answer = at.answer()
            finally:
                ended.set()
            killing.result()  # a server that did not come back is no fault of the peer
        return judged(answer, ledger.read_text())


def _kill(at: Stage, ended: threading.Event) -> None:
    """Kill as planned, then start again whatever ends by itself, as a supervisor does."""
    began = time.monotonic()

    def until(seconds: float) -> None:
        ended.wait(max(0.0, began + seconds - time.monotonic()))

    until(_KILL_WORKER)
    at.kill_worker(0)
    until(_RESTART_WORKER)
    at.restart_worker(0)
    until(_KILL_SERVER)
    at.store.kill()
    at.store.start()
    while not ended.wait(_SUPERVISOR):
        for number, worker in enumerate(at.workers):
            if worker.poll() is not None:
                at.restart_worker(number)


def judged(answer: dict[str, Any], ledger: str) -> dict[str, float]:
    """What became of the calls: `lost` have no result that can be read, `doubled` have run more than once, and `wait`
    is the longest time from a call's acceptance to the end of its run, of those not lost."""
    runs: collections.Counter[str] = collections.Counter()
    first: dict[str, float] = {}
    for line in ledger.splitlines():
        number, _, moment = line.partition(" ")
        runs[number] += 1
        first.setdefault(number, float(moment))
    accepted: dict[str, float] = answer["accepted"]
    lost = {str(number) for number in answer["lost"]}
    waits = [0.0]
    for number, at in accepted.items():
        with contextlib.suppress(KeyError):
            waits.append(first[number] - at if number not in lost else 0.0)
    return {
        "accepted": len(accepted),
        "refused": answer["refused"],
        "lost": len(lost),
        "doubled": sum(runs[number] > 1 for number in accepted),
        "wait": max(waits),
    }
