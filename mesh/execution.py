"""What came of an input in a container, told as an execution: from an outcome, or from the end of the container."""

from __future__ import annotations

import time
from pathlib import Path

from mesh.container import Exit
from mesh.exception import InternalFailure, OutOfMemoryError
from mesh.frames import Outcome
from mesh.judge import Execution, Kind, cancelled
from mesh.protocol import Failure, Format, State, failure
from mesh.runs import Assignment

TIMEOUT = "its timeout"
ABANDONED = "abandoned"  # its container is killed for another reason than this input, which goes back
HALF_WAY = "the generator ended half-way, and is not begun again, since some of its items may have been taken: {}"


def of_outcome(assignment: Assignment, outcome: Outcome, file: Path | None = None) -> Execution:
    """What an outcome says, seen together with why the input was cancelled, if it was. `file` holds what is large."""
    started = _started(assignment)
    if outcome.state == State.SUCCEEDED:
        kind, format = Kind.SUCCEEDED, Format(outcome.format)
        return Execution(kind=kind, format=format, body=outcome.body, file=file, started=started)
    if outcome.state == State.CANCELLED:
        return of_stop(assignment)
    return Execution(kind=Kind.FAILED, failure=Failure.decode(outcome.body), file=file, started=started)


def of_stop(assignment: Assignment) -> Execution:
    """Why an input was interrupted says what came of it."""
    started = _started(assignment)
    if assignment.stopped == TIMEOUT:
        return Execution(kind=Kind.TIMED_OUT, started=started)
    if assignment.stopped == ABANDONED:
        if assignment.work.generator:
            return _half_way(InternalFailure, "its worker stopped", started)
        return Execution(kind=Kind.RETURNED, text="the worker is stopping")
    return cancelled(assignment.stopped, started)


def of_loss(assignment: Assignment, exit: Exit) -> Execution:
    """The container ended while the input ran."""
    if assignment.stopped == ABANDONED and not assignment.work.generator:
        return Execution(kind=Kind.RETURNED, text=f"container {exit.text}", started=_started(assignment))
    if assignment.stopped:
        return of_stop(assignment)
    if assignment.work.generator:
        kind_of_error = OutOfMemoryError if exit.out_of_memory else InternalFailure
        return _half_way(kind_of_error, f"container {exit.text}", _started(assignment))
    if exit.lapsed:
        return Execution(kind=Kind.RETURNED, text=f"container {exit.text}", started=_started(assignment))
    kind = Kind.OUT_OF_MEMORY if exit.out_of_memory else Kind.CRASHED
    return Execution(kind=kind, text=f"container {exit.text}", started=_started(assignment))


def _half_way(error: type[InternalFailure], text: str, started: float) -> Execution:
    """The end of a generator whose container is lost: not another try, as for other inputs."""
    return Execution(kind=Kind.FAILED, failure=failure(error, HALF_WAY.format(text)), started=started)


def _started(assignment: Assignment) -> float:
    return time.time() - (time.monotonic() - assignment.began)
