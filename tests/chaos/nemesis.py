"""Who does what the plan says: kills, stops, starts again, cuts and swallows; and writes down whom it hit when."""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.server import NatsServer
from tests.chaos.fleet import DRAIN_LIMIT, SYNC, Fleet, Seat
from tests.chaos.plan import Fault, Planned
from tests.support import alive, children_of, until

_AGAIN = 0.3  # seconds until a fault that found nobody to hit is tried again
_TICK = 0.1
_PATIENCE = 60.0  # seconds after its time that a plan may still take, where the machine is slow


@dataclass(slots=True)
class Hit:
    """A fault that happened, from `start` to `end` (seconds since 1970).

    Attributes:
        workers, containers: whose executions it may have interrupted, by process; `everyone`: everybody's.
    """

    fault: Fault
    start: float
    end: float
    workers: set[int] = field(default_factory=set[int])
    containers: set[int] = field(default_factory=set[int])
    everyone: bool = False
    text: str = ""


class Nemesis:
    """Does the faults of a plan to a fleet."""

    def __init__(self, fleet: Fleet, planned: list[Planned]) -> None:
        self.hits: list[Hit] = []
        self._fleet = fleet
        self._began = time.monotonic()
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._mending: dict[int, Callable[[], None]] = {}
        self._server_is_up = True
        self._open = True
        for one in planned:
            self._at(one.at, functools.partial(self._do, one))

    @property
    def counts(self) -> Counter[Fault]:
        return Counter(hit.fault for hit in self.hits)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def run(self, seconds: float, every_tick: Callable[[], None]) -> None:
        """Do everything that is planned, also where that takes longer than its time; then mend it all."""
        while self.elapsed < seconds or (self._due and self.elapsed < seconds + _PATIENCE):
            while self._due and self._due[0][0] <= self.elapsed:
                heapq.heappop(self._due)[2]()
            self._fleet.replace()
            self._fleet.watch_leaving()
            every_tick()
            time.sleep(_TICK)
        for mend in list(self._mending.values()):
            mend()

    def _at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (moment, next(self._order), action))

    def _do(self, planned: Planned) -> None:
        hit = getattr(self, f"_{planned.fault}")(planned)
        if hit is None:
            self._at(self.elapsed + _AGAIN, lambda: self._do(planned))
        else:
            self.hits.append(hit)

    def _for(self, length: float, hit: Hit, mend: Callable[[], None]) -> None:
        """The fault lasts; then it is mended, once."""
        number = next(self._order)

        def once() -> None:
            if self._mending.pop(number, None):
                mend()
                hit.end = time.time()

        self._mending[number] = once
        self._at(self.elapsed + length, once)

    # --- whom --------------------------------------------------------------------------------------------------------

    def _seat(self, kind: str, pick: float) -> Seat:
        seats = self._fleet.of(kind)
        return seats[int(pick * len(seats))]

    def _container(self, pick: float) -> int | None:
        pids = sorted(pid for seat in self._fleet.of("worker") for pid in seat.containers())
        return pids[int(pick * len(pids))] if pids else None

    def _proxied(self) -> set[int]:
        return {seat.pid for seat in self._fleet.of("worker") if seat.proxied}

    # --- what --------------------------------------------------------------------------------------------------------

    def _container_kill(self, planned: Planned) -> Hit | None:
        pid = self._container(planned.pick)
        if pid is None:
            return None
        now = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return Hit(planned.fault, now, time.time(), containers={pid})

    def _container_stop(self, planned: Planned) -> Hit | None:
        pid = self._container(planned.pick)
        if pid is None:
            return None
        try:
            handle = os.pidfd_open(pid)  # its number may be another's by the time it goes on
        except ProcessLookupError:
            return None
        hit = Hit(planned.fault, time.time(), time.time(), containers={pid})

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGCONT)
            os.close(handle)

        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGSTOP)
        self._for(planned.length, hit, go_on)
        return hit

    def _zygote_kill(self, planned: Planned) -> Hit:
        seat = self._seat("worker", planned.pick)
        hit = Hit(planned.fault, time.time(), time.time(), text=seat.log.stem)
        for pid in seat.zygotes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)  # so that it forks no container after these
                hit.containers.update(children_of(pid))
                os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(alive, hit.containers)), what="the containers end with their zygote")
        hit.end = time.time()
        return hit

    def _worker_kill(self, planned: Planned) -> Hit:
        seat = self._seat("worker", planned.pick)
        hit = Hit(planned.fault, time.time(), time.time(), workers={seat.pid}, text=seat.log.stem)
        seat.killed = True
        seat.process.kill()
        seat.process.wait()
        return hit

    def _worker_stop(self, planned: Planned) -> Hit:
        seat = self._seat("worker", planned.pick)
        process = seat.process
        hit = Hit(planned.fault, time.time(), time.time(), workers={seat.pid}, text=seat.log.stem)
        process.send_signal(signal.SIGSTOP)
        self._for(planned.length, hit, lambda: process.send_signal(signal.SIGCONT))
        return hit

    def _worker_term(self, planned: Planned) -> Hit:
        seat = self._seat("worker", planned.pick)
        now = time.time()
        hit = Hit(planned.fault, now, now + DRAIN_LIMIT, workers={seat.pid}, text=seat.log.stem)
        self._fleet.dismiss(seat)
        return hit

    def _client_kill(self, planned: Planned) -> Hit:
        seat = self._seat("client", planned.pick)
        hit = Hit(planned.fault, time.time(), time.time(), text=seat.log.stem)
        seat.killed = True
        seat.process.kill()
        seat.process.wait()
        return hit

    def _server_kill(self, planned: Planned) -> Hit | None:
        if not self._server_is_up:
            return None
        hit = Hit(planned.fault, time.time(), time.time(), everyone=True)
        self._fleet.server.kill()
        self._server_is_up = False
        self._for(planned.length, hit, self._start_server)
        return hit

    def _start_server(self) -> None:
        store, port = self._fleet.mesh.directory / "nats", self._fleet.server.port
        self._fleet.server = NatsServer.start(store, port=port, sync=SYNC)
        self._server_is_up = True

    def _server_stop(self, planned: Planned) -> Hit | None:
        if not self._server_is_up:
            return None
        server = self._fleet.server
        hit = Hit(planned.fault, time.time(), time.time(), everyone=True)
        os.kill(server.pid, signal.SIGSTOP)
        self._for(planned.length, hit, lambda: _go_on(server))
        return hit

    def _cut(self, planned: Planned) -> Hit | None:
        if not self._open:
            return None
        start = time.time()
        count = self._fleet.proxy.cut()
        return Hit(planned.fault, start, time.time(), text=f"{count} connections") if count else None

    def _blackhole(self, planned: Planned) -> Hit | None:
        if not self._open:
            return None
        hit = Hit(planned.fault, time.time(), time.time(), workers=self._proxied())
        self._fleet.proxy.swallow()
        self._open = False

        def open_again() -> None:
            self._open = True
            if planned.pick < 0.5:  # what was under way is lost as often as it arrives late
                self._fleet.proxy.cut()
            self._fleet.proxy.forward()

        self._for(planned.length, hit, open_again)
        return hit


def _go_on(server: NatsServer) -> None:
    if server.running():
        os.kill(server.pid, signal.SIGCONT)
