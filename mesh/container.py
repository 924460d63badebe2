"""The worker's side of one container: start it, give it inputs, cancel them, and know for certain when it has ended.

A container is one process in a session of its own. Only the kernel's word that it exited ends it here: the end of a
socket proves nothing, since what user code forked may hold it. Whatever the container started is killed with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mesh import frames
from mesh.environments import Built
from mesh.exception import FunctionTimeoutError, InternalFailure, OutOfMemoryError
from mesh.frames import (
    Cancel,
    Chunk,
    Credit,
    Drop,
    Dropped,
    Ended,
    Feed,
    Frame,
    Gone,
    Home,
    Log,
    Outcome,
    Ready,
    Start,
    StartFailed,
    Stop,
    Waiting,
)
from mesh.mask import Mask
from mesh.memory import MIB, MemoryWatch
from mesh.nursery import Nursery, Process
from mesh.pipes import Pipes
from mesh.protocol import Failure, failure
from mesh.runs import Assignment, Run, Runs

logger = logging.getLogger("mesh.worker")

FORCE_AFTER = 5.0  # seconds after which a cancelled task that blocks its loop is interrupted; half the grace at most
# Seconds after which an interrupt is sent again: one that comes just before code blocks in C is seen with the next.
_INTERRUPT_AGAIN = 0.1, 1.0
_LOOK_AGAIN = 1.0  # seconds between looks whether an input that is due has begun at all
_LAST_WORDS = 1.0  # seconds to read what a container wrote before it ended
_LAPSED = "its slot could not be kept"
_KEPT_VARIABLES = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
    *("LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "PYTHONPATH", "VIRTUAL_ENV"),
)


def environment(own: Mapping[str, str], about: Mapping[str, str]) -> dict[str, str]:
    """The variables a container starts with: a few of the worker's (never its credentials), the mesh's, the user's."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", "MESH_IS_REMOTE": "1", **about, **own}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container's process ended.

    Attributes:
        code: its exit status, or minus the signal that killed it. killed: by us, and why.
        peak: the most memory it used, in bytes.
        out_of_memory: who killed it for that, and at which limit; empty if it ended otherwise.
        lapsed: killed at the moment until which it was to live: no fault of its own, nor of its inputs.
    """

    code: int
    killed: str
    peak: int
    out_of_memory: str = ""
    lapsed: bool = False

    @property
    def text(self) -> str:
        """A few words for logs and errors."""
        if self.out_of_memory:
            return f"out of memory: {self.out_of_memory}, peak {self.peak / MIB:,.0f} MiB"
        if self.killed or self.lapsed:
            return f"killed: {self.killed or _LAPSED}"
        if self.code < 0:
            return f"killed by signal {-self.code} ({_signal_name(-self.code)})"
        return f"exited with status {self.code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


class Listener(Protocol):
    """Who is told what a container does: its pool."""

    def on_ready(self, container: Container) -> None: ...
    def on_start_failed(self, container: Container, failure: Failure, *, for_good: bool) -> None: ...
    def on_outcome(self, container: Container, assignment: Assignment, outcome: Outcome) -> None: ...
    def on_dropped(self, container: Container, assignment: Assignment) -> None: ...
    def on_output(self, container: Container, assignment: Assignment | None, stream: int, text: str) -> None: ...
    def on_waiting(self, container: Container) -> None: ...
    def on_timeout(self, container: Container, run: Run) -> None: ...
    def on_given_up(self, container: Container, assignment: Assignment) -> None: ...
    def on_exit(self, container: Container, lost: Sequence[Assignment], exit: Exit) -> None: ...


class Container:
    """One process that runs one function's code.

    Attributes:
        ready: the user's code is imported. stopping: it gets no more inputs. max_inputs: runs at once.
        idle_since: monotonic time since when it has nothing to do. served: inputs it has finished.
        mask: hides the secrets it was started with. modules: what another one may have imported beforehand.
    """

    def __init__(
        self,
        name: str,
        listener: Listener,
        cancel_grace: float,
        watch: MemoryWatch,
        nursery: Nursery,
        max_inputs: int = 1,
    ) -> None:
        self.name = name
        self.mask = Mask()
        self.modules: tuple[str, ...] = ()
        self.started = time.monotonic()
        self.ready = False
        self.stopping = False
        self.exited = False
        self.served = 0
        self.idle_since = time.monotonic()
        self._listener = listener
        self._cancel_grace = cancel_grace
        self._watch = watch
        self._nursery = nursery
        self._process: Process | None = None
        self._until = math.inf
        self._memory: int | None = None
        self.max_inputs = max_inputs
        self._runs = Runs(max_inputs)
        self._retired = False
        self._was_told = False
        self._warm: Callable[[tuple[str, ...]], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytes] = []
        self._finished = asyncio.Event()
        self._said_all = asyncio.Event()
        self._killed = ""
        self._exceeded = False
        self._start_failed = False
        self._timers: list[asyncio.TimerHandle] = []
        self._pipes = Pipes(self._on_printed)

    # --- starting ----------------------------------------------------------------------------------------------------

    async def start(
        self,
        start: Start,
        variables: Mapping[str, str],
        limit: float,
        memory: int | None,
        folder: Path | None = None,
        secrets: Mapping[str, str] | None = None,
        image: Built | None = None,
        modules: tuple[str, ...] = (),
    ) -> None:
        """Start the process. It is told what to be at once; `on_ready` follows, or `on_exit`.

        Args:
            secrets: variables that nobody else may see: they go to the container alone, over its own socket.
            limit: seconds until it must be ready. memory: MiB that it and what it starts may use; `None`: no limit.
            image: what it is started with, if not this process's own Python. modules: what it may have imported before
                it is told what to be.
            folder: where the directory is made that it works in; `None`: where the system has temporary files.
        """
        self._loop = asyncio.get_running_loop()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=folder))
        try:
            begin = await asyncio.to_thread(image.furnish, self.directory) if image else self.directory
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        self._memory = memory
        self.mask = Mask((secrets or {}).values())
        own = {**variables, **self._nursery.mark, "MESH_TASK_ID": self.name}
        interpreter = image.interpreter if image else sys.executable
        self._warm = None if secrets else functools.partial(self._nursery.prepare, own, interpreter)
        conversation, passed = self._open()
        try:
            self._process = await self._nursery.fork(own, passed, self._until, interpreter, modules)
        except BaseException:
            conversation.close()
            self._release()
            raise
        finally:
            for descriptor in passed:
                os.close(descriptor)
        self._process.live_until(self._until)  # which may be another moment by now
        self._process.ended.add_done_callback(self._on_process_end)
        if self._killed:
            self._process.kill()
        self._watch.enter(self.pid, None if memory is None else memory * MIB, self._on_memory_exceeded)
        await self._loop.create_unix_connection(lambda: _Conversation(self), sock=conversation)
        self._send(
            Home(
                f"mesh container {self.name} {start.app}.{start.function}",
                str(begin),
                {**own, **(secrets or {})},
            )
        )
        self._send(replace(start, directory=str(self.directory)))
        self._was_told = True
        if self.stopping:
            self._say_stop()
        self._timers.append(self._loop.call_later(limit, self._start_took_too_long, limit))

    def _open(self) -> tuple[socket.socket, list[int]]:
        """What is between the worker and the process: our end of the conversation, and what the process gets."""
        conversation, theirs = socket.socketpair()
        self._control, their_control = socket.socketpair()
        page = frames.BeginMarks.memfd(self.max_inputs)
        self._marks = frames.BeginMarks(page)
        self._control.setblocking(False)
        self._control_buffer = frames.Buffer()
        self._loop.add_reader(self._control, self._on_control)
        return conversation, [theirs.detach(), their_control.detach(), page, *self._pipes.open(self._loop)]

    def live_until(self, moment: float) -> None:
        """Have it killed at this moment of the monotonic clock, unless told of a later one before.

        Its zygote does that, also while the worker is paused or hangs; its `Exit` says that it `lapsed`.
        """
        self._until = moment
        if self._process is not None:
            self._process.live_until(moment)

    def _start_took_too_long(self, limit: float) -> None:
        if not self.ready and not self.stopping:
            text = f"its imports and set-up took longer than its startup_timeout of {limit:g} s"
            self._fail_start(failure(FunctionTimeoutError, text))
            self.kill(text)

    def _fail_start(self, failed: Failure, *, for_good: bool = False) -> None:
        self.stopping = self._start_failed = True
        self._listener.on_start_failed(self, failed, for_good=for_good)

    @property
    def pid(self) -> int:
        """Of its process; 0 before there is one."""
        return self._process.pid if self._process is not None else 0

    @property
    def load(self) -> int:
        """Inputs it has, running or behind the running ones."""
        return self._runs.inputs

    @property
    def runs(self) -> int:
        """Runs it has, each of one input or of a batch."""
        return self._runs.count

    @property
    def behind(self) -> int:
        """Inputs that wait in it until others end."""
        return self._runs.behind

    @property
    def assignments(self) -> list[Assignment]:
        """Its inputs, the oldest first."""
        return self._runs.assignments

    @property
    def running_for(self) -> float:
        """Seconds the oldest running input has been running; 0 without one."""
        return self._runs.running_for

    @property
    def waiting(self) -> bool:
        """Whether all that it runs waits for other calls."""
        return self._runs.only_wait

    # --- inputs ------------------------------------------------------------------------------------------------------

    def run(self, *assignments: Assignment) -> None:
        """Give it an input, or a batch; it runs when there is room beside those before it."""
        self._runs.add(assignments)
        for assignment in assignments:
            self._send(assignment.work)
        self._begin_next()

    def _begin_next(self) -> None:
        run = self._runs.next()
        if run is not None:
            for member in run.members:
                if member.flow is not None:
                    member.flow.begin()
            run.timers.append(self._loop.call_later(run.timeout, self._check_time, run))

    def _check_time(self, run: Run) -> None:
        """Its time counts from when the container began it; one that keeps the container from that has the grace."""
        began = self._marks.began(run.seqs[0])
        latest = run.began + run.timeout + self._cancel_grace
        left = (latest if began is None else began + run.timeout) - time.monotonic()
        if left > 0:
            run.timers.append(self._loop.call_later(min(left, _LOOK_AGAIN), self._check_time, run))
        else:
            self._listener.on_timeout(self, run)

    def cancel(self, assignment: Assignment, reason: str) -> None:
        """Interrupt one input. One of a batch leaves it, and the others go on."""
        run = self._runs.run_of(assignment.work.seq)
        if run is None or assignment.stopped:
            return
        if len(run.members) > 1:
            assignment.stopped = reason
            self._signal(Cancel(assignment.work.seq, False))
            self._give_up([assignment])
        else:
            self.interrupt(run, reason)

    def interrupt(self, run: Run, reason: str) -> None:
        """End a run, by the ladder: raise in it; later also where it blocks its loop; at last go on without it.

        Its `finally` blocks have the grace to end.
        """
        if run.interrupted:
            return
        run.interrupted = True
        for member in run.members:
            member.stopped = member.stopped or reason
        self._name(run)
        force = Cancel(run.members[0].work.seq, True)
        run.timers += [
            *(self._loop.call_later(delay, self._name, run) for delay in _INTERRUPT_AGAIN),
            self._loop.call_later(min(FORCE_AFTER, self._cancel_grace / 2), self._signal, force),
            self._loop.call_later(self._cancel_grace, self._go_on_without, run, reason),
        ]

    def _name(self, run: Run) -> None:
        """Have it interrupted, which happens once however often it is named."""
        for member in run.members:
            self._signal(Cancel(member.work.seq, False))

    def _go_on_without(self, run: Run, reason: str) -> None:
        """What cannot be interrupted ends with its process: now, or, for their sake, when the others have ended."""
        text = f"it went on for {self._cancel_grace:g} s after {reason}"
        if self._runs.count == 1:
            self.kill(text)
            return
        logger.warning(
            "container %s takes no more inputs, and is killed when the %d others in it have ended: one cannot be "
            "interrupted, %s",
            *(self.name, self._runs.count - 1, text),
        )
        self.stopping = self._retired = True
        self._give_up(run.members.copy())

    def _give_up(self, assignments: Sequence[Assignment]) -> None:
        """These end here, whatever the container still does with them."""
        for assignment in assignments:
            self._runs.remove(assignment)
            self._listener.on_given_up(self, assignment)

    def grant(self, seq: int, number: int) -> None:
        """Let a generator send its chunks up to this one."""
        if self._runs.get(seq) is not None and not self.exited:
            self._send(Credit(seq, number))

    def feed(self, seq: int, body: bytes) -> None:
        """Give it the next bytes of what a request brings."""
        if self._runs.get(seq) is not None and not self.exited:
            self._send(Feed(seq, body))

    def leave(self, seq: int) -> None:
        """Tell it that nobody reads the answer to a request any more."""
        if self._runs.get(seq) is not None and not self.exited:
            self._send(Gone(seq))

    def take_back(self) -> None:
        """Ask for every input that has not begun; `on_dropped` brings those it gives up."""
        for assignment in self.assignments:
            if not assignment.began and not assignment.dropping:
                assignment.dropping = True
                self._signal(Drop(assignment.work.seq))

    def _signal(self, frame: Cancel | Drop) -> None:
        if self._process is None or self.exited or self._runs.get(frame.seq) is None:
            return
        with contextlib.suppress(OSError):  # it is ending; its exit is reported by itself
            self._control.send(frames.encode(frame))
            self._process.signal(signal.SIGUSR1)

    # --- ending ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let it finish what it has and exit; killed if its clean-up takes longer than the grace after that.

        One that is not started yet must not be; one that is just being started is told after what it is to be.
        """
        if self.stopping:
            return
        self.stopping = True
        if self._was_told:
            self._say_stop()

    def _say_stop(self) -> None:
        self._send(Stop())
        if not self.load:
            self._limit_stop()

    def _limit_stop(self) -> None:
        grace = self._cancel_grace
        self._timers.append(self._loop.call_later(grace, self.kill, f"it did not stop within {grace:g} s"))

    def kill(self, reason: str) -> None:
        """End it and everything it started, now."""
        self.stopping = True
        if not self.exited:
            self._killed = self._killed or reason
            if self._process is not None:
                self._process.kill()

    def _on_memory_exceeded(self) -> None:
        self._exceeded = True
        self.kill("out of memory")

    async def ended(self) -> None:
        """Wait until its process is gone and everyone has been told."""
        await self._finished.wait()

    # --- what it says ------------------------------------------------------------------------------------------------

    def _send(self, frame: Frame) -> None:
        """Send at the end of this turn of the loop: several frames of one turn cost one system call."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frames.encode(frame))

    def _flush(self) -> None:
        data, self._outgoing = b"".join(self._outgoing), []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def on_frame(self, frame: Frame) -> None:
        """A frame from the container; called by the conversation."""
        match frame:
            case Outcome():
                self._on_outcome(frame)
            case Log():
                assignment = self._runs.get(frame.seq)
                self._listener.on_output(self, assignment, frame.stream, frame.text)
            case Chunk():
                self._on_chunk(frame)
            case Credit():
                self._on_credit(frame)
            case Ready():
                self.ready = True
                if frame.modules and self._warm is not None:
                    self.modules = tuple(frame.modules.split())
                    self._warm(self.modules)
                self.idle_since = time.monotonic()
                self._listener.on_ready(self)
            case StartFailed():
                self._fail_start(Failure.decode(frame.failure), for_good=frame.for_good)
            case Waiting():
                self._on_waiting(frame)
            case _:
                self.kill("it sent a frame that only a worker sends")

    def _on_chunk(self, chunk: Chunk) -> None:
        assignment = self._runs.get(chunk.seq)
        if assignment is not None and assignment.flow is not None:
            assignment.flow.send(chunk.body)

    def _on_credit(self, credit: Credit) -> None:
        assignment = self._runs.get(credit.seq)
        if assignment is not None and assignment.allow is not None:
            assignment.allow(credit.number)

    def _on_waiting(self, frame: Waiting) -> None:
        run, before = self._runs.run_of(frame.seq), self.waiting
        if run is not None:
            self._runs.set_waiting(run, waiting=frame.waiting)
        if self.waiting != before:
            self._listener.on_waiting(self)

    def _on_outcome(self, outcome: Outcome) -> None:
        assignment = self._runs.get(outcome.seq)
        if assignment is None:
            return
        self._pipes.drain()
        before = self.waiting
        self._runs.remove(assignment)
        self._pipes.forget()
        self.served += 1
        self.idle_since = time.monotonic()
        self._begin_next()
        if self.stopping and not self.load:
            self._end_stopped()
        self._listener.on_outcome(self, assignment, outcome)
        if self.waiting != before:
            self._listener.on_waiting(self)

    def _end_stopped(self) -> None:
        """It was stopped, and has run its last input."""
        if self._retired:
            self.kill("what it still runs cannot be interrupted")
        else:
            self._limit_stop()

    def _on_control(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._control)
            return
        for frame in self._control_buffer.feed(data):
            assignment = self._runs.get(frame.seq) if isinstance(frame, Dropped) else None
            if assignment is not None and isinstance(frame, Dropped) and frame.given_back:
                self._runs.remove(assignment)
                self._listener.on_dropped(self, assignment)

    def _on_printed(self, stream: int, text: str) -> None:
        """It belongs to the running input if there is no doubt which."""
        only = self.assignments[0] if self.load == 1 and not self._retired else None
        self._listener.on_output(self, only, stream, text)

    def on_conversation_end(self) -> None:
        """Nothing more will come over the socket. That does not mean that the process has ended."""
        self._said_all.set()

    def on_broken_conversation(self, reason: str) -> None:
        self.kill(f"what it wrote to its worker made no sense: {reason}")

    # --- its end -----------------------------------------------------------------------------------------------------

    def _on_process_end(self, future: asyncio.Future[Ended]) -> None:
        """What it started has been killed with it."""
        ended = future.result()
        code = os.waitstatus_to_exitcode(ended.status)
        peak = max(ended.peak, self._watch.leave(self.pid))
        out_of_memory = "" if ended.lapsed else self._out_of_memory(code)
        exit = Exit(code, self._killed, peak, out_of_memory, ended.lapsed)
        self._ending = self._loop.create_task(self._end(exit))

    def _out_of_memory(self, code: int) -> str:
        """Who killed it for using too much memory, and at which limit. Of our own kill we know; a SIGKILL that is not
        ours was the system's if that has just killed something for want of memory."""
        if self._exceeded:
            who = "killed by its worker"
        elif code == -signal.SIGKILL and not self._killed and self._watch.system_killed():
            who = "killed by the system's out-of-memory killer"
        else:
            return ""
        return f"{who}, {f'limit {self._memory:,} MiB' if self._memory else 'no limit of its own'}"

    async def _end(self, exit: Exit) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await self._said_all.wait()
        self._pipes.drain()
        self.exited = self.stopping = True
        if not (self.ready or self._start_failed) and (exit.out_of_memory or not (exit.killed or exit.lapsed)):
            kind = OutOfMemoryError if exit.out_of_memory else InternalFailure
            self._fail_start(failure(kind, f"its container {exit.text} while it started"))
        lost = self._runs.clear()
        self._release()
        self._listener.on_exit(self, lost, exit)
        self._finished.set()

    def _release(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._pipes.close()
        self._loop.remove_reader(self._control)
        self._control.close()
        self._marks.close()
        if self._transport is not None:
            self._transport.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class _Conversation(asyncio.Protocol):
    """Cuts the socket's bytes into frames."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._buffer = frames.Buffer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._container._transport = transport  # type: ignore[assignment]  # a Transport, of a stream socket

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._buffer.feed(data):
                self._container.on_frame(frame)
        except frames.BrokenFrameError as error:
            self._container.on_broken_conversation(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._container.on_conversation_end()
