"""The inside of a container: read a frame, run the user's function, write what it came to.

`python -m mesh.executor` is started by a worker with two sockets, one for frames and one for cancels, and a page of
memory that says when inputs began. How inputs run is `serving`'s. Nothing here talks to NATS. User code runs in this
process and may do anything, so: the sockets are moved out of its way, prints cannot reach them, a forked copy never
answers, and what it raises, whatever it is, becomes an outcome.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from mesh import context
from mesh.frames import BeginMarks, Ready, Start, StartFailed, Waiting
from mesh.output import Output, flush_c_output, replace_output
from mesh.serving import Serving
from mesh.usercode import load, start_failure
from mesh.wire import Wire

_LOWEST_DESCRIPTOR = 100  # sockets are moved above this: programs use the low ones by number
_OOM_SCORE = 800  # of 1,000; a worker has 0 as a rule


# --- becoming a container --------------------------------------------------------------------------------------------


def _moved(descriptor: int) -> socket.socket:
    """The socket behind a descriptor, at a number that user code does not use by accident."""
    import fcntl

    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
    os.close(descriptor)
    return socket.socket(fileno=high)


_libc: ctypes.CDLL | None = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent(parent: int) -> None:
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it died before that was set


def _go_first_when_out_of_memory() -> None:
    """The system shall kill containers before their worker; what they start inherits that. Raising needs no rights."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):  # there is no such thing here
        if int(score.read_text()) < _OOM_SCORE:
            score.write_text(str(_OOM_SCORE))


def main() -> NoReturn:
    """Serve as a container until the worker says stop. Never returns into the interpreter's own clean-up."""
    protocol, control, page, parent = (int(argument) for argument in sys.argv[1:5])
    _die_with_parent(parent)
    _go_first_when_out_of_memory()
    faulthandler.enable(2)  # a segfault leaves a traceback in the function's output
    wire = Wire(_moved(protocol), _moved(control))
    marks = BeginMarks(page)
    os.close(page)
    start = wire.receive()
    if not isinstance(start, Start):
        os._exit(1)
    outputs = replace_output(wire)
    sys.argv = [str(Path(start.bundle) / start.function)] if start.bundle else [start.function]
    random.seed()
    serving = prepare(wire, start, outputs, marks)
    if serving is not None:
        serving.serve()
    for output in outputs:
        output.end(0)
    with contextlib.suppress(BaseException):  # hooks of user code
        atexit._run_exitfuncs()
    flush_c_output()
    os._exit(0 if serving is not None else 1)  # threads of user code do not keep a container


def prepare(wire: Wire, start: Start, outputs: tuple[Output, Output], marks: BeginMarks) -> Serving | None:
    """Import the user's code, and run its enter hooks; `None` (and told to the worker) if that fails."""
    context.enter_container(
        context.Container(
            start.app,
            start.function,
            start.environment,
            lambda seq, waiting: wire.send(Waiting(seq, waiting)),
        )
    )
    try:
        serving = Serving(wire, start, load(start), outputs, marks)
        serving.prepare()
    except BaseException as error:
        wire.send(StartFailed(start_failure(error, start.bundle).encode()))
        return None
    wire.send(Ready())
    return serving


if __name__ == "__main__":
    main()
