"""The inside of a container: read a frame, run the user's function, write what it came to.

`python -m mesh.executor` is started by a worker with two sockets, one for frames and one for cancels, and a page of
memory that says when an input began. The main thread reads frames and runs sync functions itself; async functions run
as tasks of one loop that reads frames between them. Nothing here talks to NATS. User code runs in this process and may
do anything, so: the sockets are moved out of its way, prints cannot reach them, a forked copy never answers, and what
it raises, whatever it is, becomes an outcome.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import faulthandler
import inspect
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mesh import context, frames, serialization
from mesh.context import Running
from mesh.exception import InvalidError, RequestSizeError
from mesh.frames import Outcome, Ready, Start, StartFailed, Stop, Waiting, Work
from mesh.generating import Generators
from mesh.output import Output, replace_output
from mesh.protocol import Failure, Format, State
from mesh.usercode import UserCode, is_ours, load, start_failure
from mesh.wire import Cancels, Wire

_LOWEST_DESCRIPTOR = 100  # sockets are moved above this: programs use the low ones by number
_OOM_SCORE = 800  # of 1,000; a worker has 0 as a rule


# --- running inputs --------------------------------------------------------------------------------------------------


class Executor:
    """Runs one function's inputs."""

    def __init__(self, wire: Wire, start: Start, outputs: tuple[Output, Output], mark: frames.BeginMark) -> None:
        self._wire = wire
        self._mark = mark
        self._start = start
        self._outputs = outputs
        self._cancels = Cancels(wire)
        self._generators = Generators(wire, self._cancels)
        self._code = UserCode(functions={})

    def prepare(self) -> bool:
        """Import the user's code; false (and told to the worker) if that fails."""
        context.enter_container(
            context.Container(
                self._start.app,
                self._start.function,
                self._start.environment,
                lambda waiting: self._wire.send(Waiting(waiting)),
            )
        )
        try:
            self._code = load(self._start)
        except BaseException as error:  # a module may raise anything, also SystemExit
            self._wire.send(StartFailed(start_failure(error, self._start.bundle).encode()))
            return False
        self._cancels.install()
        self._wire.send(Ready())
        return True

    def serve(self) -> None:
        """Run inputs until the worker says stop, or is gone."""
        if any(_is_async(function) for function in self._code.functions.values()):
            asyncio.run(self._serve_async())
            return
        while isinstance(work := self._wire.receive(), Work):
            outcome = self._run(work)
            if outcome is not None:
                self._wire.send(outcome)

    # A sync function: this thread runs it.

    def _run(self, work: Work) -> Outcome | None:
        token = context.current.set(_running(work))
        outcome: Outcome | None
        try:
            try:
                if self._begin(work.seq):
                    args, kwargs = serialization.decode_arguments(Format(work.format), work.body)
                    value = self._code.function(work.method)(*args, **kwargs)
                    outcome = self._succeeded(work, self._generators.send(work, value) if work.generator else value)
                else:
                    outcome = self._off(work.seq)
            finally:
                self._cancels.running.discard(work.seq)
        except BaseException as error:  # whatever user code raises is its outcome
            outcome = self._failed(work, error)
        outcome = self._final(work, outcome)
        context.current.reset(token)
        return outcome

    # An async function: a task each, on one loop.

    async def _serve_async(self) -> None:
        loop = self._cancels.loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def readable() -> None:
            if not self._wire.read():
                self._wire.inbox.append(Stop())
            ready.set()

        loop.add_reader(self._wire.protocol, readable)
        while True:
            while not self._wire.inbox:
                ready.clear()
                await ready.wait()
            work = self._wire.inbox.popleft()
            if not isinstance(work, Work):
                break
            task = self._cancels.tasks[work.seq] = loop.create_task(self._run_task(work))
            await asyncio.wait([task])
            del self._cancels.tasks[work.seq]
        loop.remove_reader(self._wire.protocol)

    async def _run_task(self, work: Work) -> None:
        context.current.set(_running(work))
        outcome: Outcome | None
        try:
            try:
                if self._begin(work.seq):
                    args, kwargs = serialization.decode_arguments(Format(work.format), work.body)
                    value = self._code.function(work.method)(*args, **kwargs)
                    value = await value if inspect.isawaitable(value) else value
                    if work.generator:
                        value = await self._generators.send_from_loop(work, value)
                    outcome = self._succeeded(work, value)
                else:
                    outcome = self._off(work.seq)
            finally:
                self._cancels.running.discard(work.seq)
        except BaseException as error:  # whatever user code raises is its outcome
            outcome = self._failed(work, error)
        outcome = self._final(work, outcome)
        if outcome is not None:
            self._wire.send(outcome)

    # What both share.

    def _begin(self, seq: int) -> bool:
        """From here on a cancel interrupts the input; false if it must not begin at all."""
        self._mark.note(seq)
        self._cancels.running.add(seq)
        self._cancels.begun = seq
        return seq not in self._cancels.dropped and seq not in self._cancels.named

    def _off(self, seq: int) -> Outcome | None:
        """An input that must not begin: given back (the worker knows), or cancelled."""
        if seq in self._cancels.dropped:
            return None
        return Outcome(seq, State.CANCELLED, Format.MSGPACK, b"")

    def _succeeded(self, work: Work, value: Any) -> Outcome:
        if inspect.iscoroutine(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            kind = type(value).__name__
            value.close() if not inspect.isasyncgen(value) else None
            raise InvalidError(
                f"{self._start.function!r} returned a {kind}: make it an async function, or await it inside"
                if kind == "coroutine"
                else f"{self._start.function!r} returned a {kind}; a function that returns one needs is_generator=True"
            )
        if not work.keep_result:
            return Outcome(work.seq, State.SUCCEEDED, Format.JSON, b"null")
        format, body = serialization.encode(value)
        if len(body) > self._start.result_limit:
            raise RequestSizeError(
                f"the result of {self._start.function!r} takes {len(body):,} bytes; the limit is "
                f"{self._start.result_limit:,}: return a path or a key to where the data is"
            )
        return Outcome(work.seq, State.SUCCEEDED, format, body)

    def _failed(self, work: Work, error: BaseException) -> Outcome:
        if work.seq in self._cancels.named:
            return Outcome(work.seq, State.CANCELLED, Format.MSGPACK, b"")
        failure = serialization.pack_exception(error, is_ours)
        body = failure.encode()
        if len(body) > self._start.result_limit:
            body = _shortened(failure, self._start.result_limit).encode()
        return Outcome(work.seq, State.FAILED, Format.MSGPACK, body)

    def _final(self, work: Work, outcome: Outcome | None) -> Outcome | None:
        """The outcome after everything the input printed. A value that came after its cancel does not count."""
        for output in self._outputs:
            output.end(work.seq)
        _flush_c_output()
        if outcome is not None and work.seq in self._cancels.named and outcome.state != State.CANCELLED:
            outcome = Outcome(work.seq, State.CANCELLED, Format.MSGPACK, b"")
        self._cancels.forget(work.seq)
        self._cancels.stay_installed()
        return outcome


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _running(work: Work) -> Running:
    return Running(work.call, work.index, work.attempt, work.last_error, work.seq)


def _shortened(failure: Failure, limit: int) -> Failure:
    """A failure whose parts are too large: text and traceback cut, without the exception itself."""
    room = limit // 8  # a character may take 4 bytes
    return Failure(
        type=failure.type,
        text=failure.text[:room],
        traceback=failure.traceback[-room:],
        bases=failure.bases,
    )


def _flush_c_output() -> None:
    """What C code printed must not come after the outcome."""
    if _libc is not None:
        _libc.fflush(None)


_libc: ctypes.CDLL | None = ctypes.CDLL(None) if sys.platform == "linux" else None


# --- becoming a container --------------------------------------------------------------------------------------------


def _moved(descriptor: int) -> socket.socket:
    """The socket behind a descriptor, at a number that user code does not use by accident."""
    import fcntl

    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
    os.close(descriptor)
    return socket.socket(fileno=high)


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
    mark = frames.BeginMark(page)
    os.close(page)
    start = wire.receive()
    if not isinstance(start, Start):
        os._exit(1)
    outputs = replace_output(wire)
    sys.argv = [str(Path(start.bundle) / start.function)] if start.bundle else [start.function]
    random.seed()
    executor = Executor(wire, start, outputs, mark)
    served = executor.prepare()
    if served:
        executor.serve()
    for output in outputs:
        output.end(0)
    with contextlib.suppress(BaseException):  # hooks of user code
        atexit._run_exitfuncs()
    _flush_c_output()
    os._exit(0 if served else 1)  # threads of user code do not keep a container


if __name__ == "__main__":
    main()
