"""The inside of a container: read a frame, run the user's function, write what it came to.

A process that a zygote forked comes here with two sockets to the worker, one for frames and one for cancels, and a page
of memory that says when inputs began. How inputs run is `serving`'s. Nothing here talks to NATS. User code runs in this
process and may do anything, so: prints cannot reach the sockets, a forked copy never answers, and what it raises,
whatever it is, becomes an outcome.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from mesh import context
from mesh.frames import BeginMarks, Ready, Start, StartFailed, Waiting
from mesh.output import Output, flush_c_output, replace_output
from mesh.protocol import failure
from mesh.serving import Serving
from mesh.usercode import NeverStartsError, load, start_failure
from mesh.wire import Wire


def _reseed() -> None:
    """What was forked from one process must not draw the same numbers."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")  # as a rule nobody has loaded it yet
    if numpy_random is not None:
        numpy_random.seed()


def main(wire: Wire, marks: BeginMarks) -> NoReturn:
    """Serve as a container until the worker says stop. Never returns into the interpreter's own clean-up."""
    faulthandler.enable(2)  # a segfault leaves a traceback in the function's output
    start = wire.receive()
    if not isinstance(start, Start):
        os._exit(1)
    outputs = replace_output(wire)
    sys.argv = [str(Path(start.bundle) / start.function)] if start.bundle else [start.function]
    _reseed()
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
            start.image,
        )
    )
    found = (set(sys.modules), dict(os.environ))
    try:
        serving = Serving(wire, start, load(start), outputs, marks)
        serving.prepare()
    except NeverStartsError as error:
        wire.send(StartFailed(failure(TypeError, str(error)).encode(), for_good=True))
        return None
    except BaseException as error:
        wire.send(StartFailed(start_failure(error, start.bundle).encode()))
        return None
    wire.send(Ready(_common_modules(start, *found)))
    return serving


def _common_modules(start: Start, imported: set[str], variables: Mapping[str, str]) -> str:
    """What the next version of a page that is being written need not import: installed modules, where importing has
    left no thread, which a fork would lose, and the user's code no variable, which they may be imported to read."""
    is_written = start.web and start.app.startswith("ap-")
    if not is_written or os.environ != variables or len(list(Path("/proc/self/task").iterdir())) > 1:
        return ""
    installed = (sys.prefix, sys.base_prefix)
    modules = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
    return " ".join(name for name, file in modules if name not in imported and file and file.startswith(installed))
