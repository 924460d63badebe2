"""A container's two sockets to its worker: frames, and which inputs are to be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator

from mesh import frames
from mesh.exception import InputCancellation
from mesh.frames import Cancel, Credit, Drop, Dropped

_READ_SIZE = 1 << 16


class Wire:
    """The two sockets to the worker. Only the process that was started as the container may write to them."""

    def __init__(self, protocol: socket.socket, control: socket.socket) -> None:
        self.protocol = protocol
        self.control = control
        self.inbox: deque[frames.Frame] = deque()
        self.interrupt: Callable[[], None] = lambda: None
        self.on_credit: Callable[[Credit], None] = lambda credit: None
        self._buffer = frames.Buffer()
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._main = threading.get_ident()
        self._undisturbed = 0
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
        with self.undisturbed():
            try:
                with self._lock:
                    self.protocol.sendall(data)
            except OSError:
                os._exit(1)  # the worker is gone, or the user's code closed the socket: nobody can be told

    @contextlib.contextmanager
    def undisturbed(self) -> Generator[None]:
        """Interrupts of the main thread wait until the block has ended."""
        main = threading.get_ident() == self._main
        self._undisturbed += main
        try:
            yield
        finally:
            self._undisturbed -= main
            if main and self._deferred and not self._undisturbed:
                self._deferred = False
                self.interrupt()

    def may_interrupt(self) -> bool:
        """Whether the main thread can be interrupted now; if not, `interrupt` is called once it can."""
        self._deferred = self._undisturbed > 0
        return not self._deferred

    def receive(self) -> frames.Frame | None:
        """The next frame; `None` once the worker has gone."""
        while not self.inbox:
            if not self.read():
                return None
        return self.inbox.popleft()

    def wait(self) -> bool:
        """Wait until something comes, and take it; only the waiting is interrupted. False once the worker has gone."""
        ready = select.poll()
        ready.register(self.protocol, select.POLLIN)
        ready.poll()
        with self.undisturbed():
            return self.read()

    def read(self) -> bool:
        """Take what has come; false once the worker has gone. Credit goes to its generator, the rest waits."""
        try:
            data = self.protocol.recv(_READ_SIZE)
        except OSError:
            return False
        for frame in self._buffer.feed(data):
            if isinstance(frame, Credit):
                self.on_credit(frame)
            else:
                self.inbox.append(frame)
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
