"""What one container has to run: its inputs, which of them run, and which wait behind those. Accounting alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mesh.frames import Work


class Flow(Protocol):
    """Where what a generator yields goes."""

    def begin(self) -> None: ...
    def send(self, chunk: bytes) -> None: ...
    def end(self) -> None: ...


@dataclass(slots=True, eq=False)
class Assignment:
    """An input given to a container. `owner` is whatever the pool knows it by.

    Attributes:
        flow: where its items go, if it is a generator's, or a request's answer.
        allow: called with what the container allows of what a request brings; as `flow.grant`.
        began: monotonic time at which it was let run; 0 while it waits behind another one.
        stopped: why it was cancelled, if it was. dropping: it was asked for back.
    """

    work: Work
    owner: Any
    timeout: float
    flow: Flow | None = None
    allow: Callable[[int], None] | None = None
    began: float = 0.0
    stopped: str = ""
    dropping: bool = False


@dataclass(slots=True, eq=False)
class Run:
    """One run of the function: of one input, or of a batch.

    Attributes:
        seqs: of all its inputs; the container tells by the first when it began. members: inputs that it still has.
        waiting: it waits for other calls. interrupted: all of it was.
    """

    seqs: list[int]
    members: list[Assignment]
    began: float = 0.0
    waiting: bool = False
    interrupted: bool = False
    timers: list[asyncio.TimerHandle] = field(default_factory=list[asyncio.TimerHandle])

    @property
    def timeout(self) -> float:
        return self.members[0].timeout


class Runs:
    """The runs of one container, of which it has at most `limit` running. The oldest are first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._assignments: dict[int, Assignment] = {}
        self._runs: dict[int, Run] = {}  # by the number of each input they ever had
        self._all: dict[Run, None] = {}
        self._begun = 0
        self._waiting = 0

    @property
    def assignments(self) -> list[Assignment]:
        return list(self._assignments.values())

    @property
    def inputs(self) -> int:
        return len(self._assignments)

    @property
    def count(self) -> int:
        return len(self._all)

    @property
    def behind(self) -> int:
        """Runs that wait until others end."""
        return len(self._all) - self._begun

    @property
    def running_for(self) -> float:
        """Seconds since the oldest one began; 0 without one."""
        first = next(iter(self._all), None)
        return time.monotonic() - first.began if first is not None and first.began else 0.0

    @property
    def only_wait(self) -> bool:
        """Whether something runs, and all of it waits for other calls."""
        return 0 < self._begun == self._waiting

    def get(self, seq: int) -> Assignment | None:
        return self._assignments.get(seq)

    def run_of(self, seq: int) -> Run | None:
        """The run that has this input, or had it."""
        return self._runs.get(seq)

    def add(self, members: Sequence[Assignment]) -> Run:
        run = Run([member.work.seq for member in members], list(members))
        self._all[run] = None
        for member in members:
            self._assignments[member.work.seq] = member
            self._runs[member.work.seq] = run
        return run

    def next(self) -> Run | None:
        """The run that is to begin now, if one is."""
        if self._begun >= self.limit or self._begun == len(self._all):
            return None
        run = next(run for run in self._all if not run.began)
        self._begun += 1
        run.began = time.monotonic()
        for member in run.members:
            member.began = run.began
        return run

    def remove(self, assignment: Assignment) -> None:
        """An input has ended, or goes elsewhere; and its run, with its last."""
        seq = assignment.work.seq
        del self._assignments[seq]
        if assignment.flow is not None:
            assignment.flow.end()
        run = self._runs[seq]
        run.members.remove(assignment)
        if not run.members:
            self._end(run)

    def _end(self, run: Run) -> None:
        for timer in run.timers:
            timer.cancel()
        self.set_waiting(run, waiting=False)
        self._begun -= bool(run.began)
        del self._all[run]
        for seq in run.seqs:
            del self._runs[seq]

    def set_waiting(self, run: Run, *, waiting: bool) -> None:
        self._waiting += waiting - run.waiting
        run.waiting = waiting

    def clear(self) -> list[Assignment]:
        """End everything; returns the inputs."""
        left = self.assignments
        for assignment in left:
            self.remove(assignment)
        return left
