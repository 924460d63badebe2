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
import importlib
import inspect
import io
import os
import random
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from mesh import context, frames, serialization
from mesh.context import Running
from mesh.exception import DeserializationError, ExecutionError, InputCancellation, InvalidError, RequestSizeError
from mesh.frames import Cancel, Drop, Dropped, Log, Outcome, Ready, Start, StartFailed, Stop, Waiting, Work
from mesh.protocol import Failure, Format, State

_LOWEST_DESCRIPTOR = 100  # sockets are moved above this: programs use the low ones by number
_MAX_LINE = 8 << 10  # characters of one line of output
_MAX_OUTPUT = 1 << 20  # characters of output of one input
_READ_SIZE = 1 << 16
_OOM_SCORE = 800  # of 1,000; a worker has 0 as a rule


class Wire:
    """The two sockets to the worker. Only the process that was started as the container may write to them."""

    def __init__(self, protocol: socket.socket, control: socket.socket) -> None:
        self.protocol = protocol
        self.control = control
        self.inbox: deque[frames.Frame] = deque()
        self.interrupt: Callable[[], None] = lambda: None
        self._buffer = frames.Buffer()
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._main = threading.get_ident()
        self._sending = 0
        self._deferred = False
        os.register_at_fork(after_in_child=self._close_in_child)

    def _close_in_child(self) -> None:
        """A process the user forks holds no end of the conversation."""
        with contextlib.suppress(OSError):
            self.protocol.close()
            self.control.close()

    def send(self, frame: frames.Frame) -> None:
        """Write one frame, whole: an interrupt of the main thread waits. A forked copy of the user's ends instead."""
        if os.getpid() != self._owner:
            os._exit(0)
        data = frames.encode(frame)
        main = threading.get_ident() == self._main
        self._sending += main
        try:
            with self._lock:
                self.protocol.sendall(data)
        except OSError:
            os._exit(1)  # the worker is gone, or the user's code closed the socket: nobody can be told
        finally:
            self._sending -= main
        if main and self._deferred:
            self._deferred = False
            self.interrupt()

    def may_interrupt(self) -> bool:
        """Whether the main thread can be interrupted now; if not, `interrupt` is called once it can."""
        self._deferred = self._sending > 0
        return not self._deferred

    def receive(self) -> frames.Frame | None:
        """The next frame; `None` once the worker has gone."""
        while not self.inbox:
            if not self.read():
                return None
        return self.inbox.popleft()

    def read(self) -> bool:
        """Take what has come; false once the worker has gone."""
        try:
            data = self.protocol.recv(_READ_SIZE)
        except OSError:
            return False
        self.inbox.extend(self._buffer.feed(data))
        return bool(data)


class Cancels:
    """Which inputs are to be interrupted, told by the worker on the control socket and a SIGUSR1.

    The handler runs in the main thread between two bytecodes. It raises only in the input that was named, once, and
    only while that one runs; an input that has not begun is never begun.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._buffer = frames.Buffer()
        self._raised: set[int] = set()
        self.named: set[int] = set()
        self.forced: set[int] = set()
        self.dropped: set[int] = set()
        self.running: set[int] = set()
        self.begun = 0  # the newest that was; inputs come with growing numbers, and begin in their order
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    def install(self) -> None:
        """Listen from now on. User code may use any signal but SIGUSR1."""
        self._wire.control.setblocking(False)
        self._wire.interrupt = self.interrupt
        signal.signal(signal.SIGUSR1, self._on_signal)

    def stay_installed(self) -> None:
        """Listen again where user code took the signal."""
        if (
            signal.getsignal(signal.SIGUSR1) != self._on_signal
            and threading.current_thread() is threading.main_thread()
        ):
            sys.stderr.write("mesh: the function replaced the handler of SIGUSR1, which mesh needs to cancel it\n")
            signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, _signum: int, _frame: object) -> None:
        with contextlib.suppress(OSError):  # nothing more to read
            while data := self._wire.control.recv(_READ_SIZE):
                for frame in self._buffer.feed(data):
                    self._take(frame)
        if self._wire.may_interrupt():
            self.interrupt()

    def _take(self, frame: frames.Frame) -> None:
        if isinstance(frame, Cancel):
            self.named.add(frame.seq)
            if frame.force:
                self.forced.add(frame.seq)
        elif isinstance(frame, Drop):
            given_back = frame.seq > self.begun  # one that has ended may still be thought to wait
            if given_back:
                self.dropped.add(frame.seq)
            with contextlib.suppress(OSError):  # the worker is gone
                self._wire.control.send(frames.encode(Dropped(frame.seq, given_back)))

    def interrupt(self) -> None:
        """Raise in the input that runs here, or cancel its task, if it was named and has not been interrupted yet."""
        for seq in self.running & self.named:
            if self.loop is not None:
                self._interrupt_task(seq, self.loop)
            elif seq not in self._raised:
                self._raised.add(seq)
                raise InputCancellation("the input was cancelled, or ran out of time")

    def _interrupt_task(self, seq: int, loop: asyncio.AbstractEventLoop) -> None:
        task = self.tasks[seq]
        if seq not in self._raised:
            self._raised.add(seq)
            loop.call_soon_threadsafe(task.cancel)
        elif seq in self.forced and asyncio.current_task(loop) is task:
            self.forced.discard(seq)
            raise InputCancellation("the input was cancelled, or ran out of time, while it blocked its event loop")

    def forget(self, seq: int) -> None:
        """The input has ended."""
        for known in (self.running, self.named, self.forced, self.dropped, self._raised):
            known.discard(seq)


class Output(io.TextIOBase):
    """What stands in for sys.stdout and sys.stderr: lines go to the worker with the input that printed them."""

    def __init__(self, wire: Wire, stream: int, descriptor: int) -> None:
        self._wire = wire
        self._stream = stream
        self._descriptor = descriptor
        self._partial: dict[int, str] = {}
        self._sent: dict[int, int] = {}
        self.buffer = _Bytes(self)

    encoding = "utf-8"
    errors = "replace"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        """Stays open: the next input prints here too."""
        self.flush()

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # user code writes anything
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        running = context.current.get()
        seq = running.seq if running else 0
        whole = self._partial.pop(seq, "") + text
        lines, newline, rest = whole.rpartition("\n")
        if newline:
            self._send(seq, lines + newline)
        if len(rest) > _MAX_LINE:
            self._send(seq, rest)
        elif rest:
            self._partial[seq] = rest
        return len(text)

    def flush(self) -> None:
        """Send a line that has no end yet: a program that flushes wants it seen."""
        running = context.current.get()
        seq = running.seq if running else 0
        rest = self._partial.pop(seq, "")
        if rest:
            self._send(seq, rest)

    def reconfigure(self, **_: object) -> None:
        """Nothing to configure: what code calls to have UTF-8, which this is."""

    def end(self, seq: int) -> None:
        """The input has ended: what is left of its output goes before its outcome."""
        rest = self._partial.pop(seq, "")
        if rest:
            self._send(seq, rest + "\n")
        self._sent.pop(seq, None)

    def _send(self, seq: int, text: str) -> None:
        sent = self._sent.get(seq, 0)
        if seq:
            if sent >= _MAX_OUTPUT:
                return
            self._sent[seq] = sent + len(text)
            if sent + len(text) >= _MAX_OUTPUT:
                text = text[: _MAX_OUTPUT - sent] + "\n… output cut: the limit is 1 MiB an input\n"
        if len(text) > _MAX_LINE:
            text = "".join(_cut(line) for line in text.splitlines(keepends=True))
        self._wire.send(Log(seq, self._stream, text))


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, text: Output) -> None:
        self._text = text

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._text.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} … line cut\n"


# --- finding the function --------------------------------------------------------------------------------------------


def _find_function(start: Start) -> Callable[..., Any]:
    """The user's function, imported for real. Whatever that raises is the user's."""
    from mesh import app  # here, because what is imported before the user's code delays every container
    from mesh.records import Code

    if start.bundle:
        sys.path.insert(0, start.bundle)
    code = Code.from_json(start.code)
    if code.by_value:
        function = serialization.loads(code.pickled)
        if not callable(function):
            raise DeserializationError(
                f"the code of {start.function!r} is not a function but {type(function).__name__}"
            )
        return function  # type: ignore[no-any-return]  # callable was just checked
    for module in dict.fromkeys((code.module, code.entry)):
        importlib.import_module(module)
        found = app.find_definition(code.name, code.app)
        if found is not None:
            owner, definition = found
            for running in (owner, *app.including(owner)):
                running.run_as(start.app)
            return definition.function.get_raw_f()
    raise ExecutionError(
        f"importing {code.entry!r} made no function {code.name!r}: it is defined there only under a condition that "
        "does not hold in a container"
    )


def _start_failure(error: BaseException, bundle: str) -> Failure:
    """Why the code could not be imported, with what to do about the usual reasons."""
    packed = serialization.pack_exception(error, _is_ours)
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = (
            f"{error.name!r} is not installed in this function's environment; if it is your own module, it was not "
            "shipped because nothing imports it statically"
        )
    elif isinstance(error, FileNotFoundError) and bundle and str(error.filename).startswith(bundle):
        hint = f"{os.path.relpath(str(error.filename), bundle)} was not shipped: only .py files travel with a deploy"
    text = f"{packed.text} ({hint})" if hint else packed.text
    return Failure(type=packed.type, text=text, traceback=packed.traceback, bases=packed.bases)


def _is_ours(filename: str) -> bool:
    """Whether a frame of a traceback is the machinery's, above the user's own."""
    return filename in _OUR_FILES or filename.startswith("<frozen importlib")


_OUR_FILES = {__file__, importlib.__file__, contextlib.__file__, serialization.__file__, asyncio.runners.__file__}


# --- running inputs --------------------------------------------------------------------------------------------------


class Executor:
    """Runs one function's inputs."""

    def __init__(self, wire: Wire, start: Start, outputs: tuple[Output, Output], mark: frames.BeginMark) -> None:
        self._wire = wire
        self._mark = mark
        self._start = start
        self._outputs = outputs
        self._cancels = Cancels(wire)
        self._function: Callable[..., Any] = lambda: None

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
            self._function = _find_function(self._start)
        except BaseException as error:  # a module may raise anything, also SystemExit
            self._wire.send(StartFailed(_start_failure(error, self._start.bundle).encode()))
            return False
        self._cancels.install()
        self._wire.send(Ready())
        return True

    def serve(self) -> None:
        """Run inputs until the worker says stop, or is gone."""
        if inspect.iscoroutinefunction(self._function):
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
                    outcome = self._succeeded(work, self._function(*args, **kwargs))
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
                    outcome = self._succeeded(work, await self._function(*args, **kwargs))
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
        failure = serialization.pack_exception(error, _is_ours)
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


def _replace_output(wire: Wire) -> tuple[Output, Output]:
    streams: list[TextIO] = [sys.stdout, sys.stderr]
    for stream in streams:
        with contextlib.suppress(Exception):
            stream.flush()
    outputs = Output(wire, 1, 1), Output(wire, 2, 2)
    sys.stdout, sys.stderr = outputs
    return outputs


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
    outputs = _replace_output(wire)
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
