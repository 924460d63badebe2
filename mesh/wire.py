"""A container's two sockets to its worker: frames, and which inputs are to be interrupted (`interrupts` reads that)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator

from mesh import frames
from mesh.frames import Credit, Feed, Gone

_READ_SIZE = 1 << 16


class Wire:
    """The two sockets to the worker. Only the process that was started as the container may write to them."""

    def __init__(self, protocol: socket.socket, control: socket.socket) -> None:
        self.protocol = protocol
        self.control = control
        self.inbox: deque[frames.Frame] = deque()
        self.interrupt: Callable[[], None] = lambda: None
        self.on_credit: Callable[[Credit], None] = lambda credit: None
        self.on_request: Callable[[Feed | Gone], None] = lambda frame: None
        self._buffer = frames.Buffer()
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._main = threading.get_ident()
        self._undisturbed = 0
        self._deferred = False
        os.register_at_fork(after_in_child=self._close_in_child)

    def _close_in_child(self) -> None:
        """A process the user forks holds no end of the conversation, and no lock of a thread it does not have."""
        self._lock = threading.RLock()
        with contextlib.suppress(OSError):
            self.protocol.close()
            self.control.close()

    @property
    def is_copy(self) -> bool:
        """Whether this is a process that the user's code forked."""
        return os.getpid() != self._owner

    def send(self, frame: frames.Frame) -> None:
        """Write one frame, whole: an interrupt of the main thread waits. A forked copy of the user's ends instead."""
        if self.is_copy:
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
        if threading.get_ident() != self._main:
            yield
            return
        self._undisturbed += 1
        try:
            yield
        finally:
            self._undisturbed -= 1
            if self._deferred and not self._undisturbed:
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

    def read_on(self) -> None:
        """Read beside everything else, from now on: generators that are still to end need credit for that."""

        def read() -> None:
            while self.read():
                pass

        threading.Thread(target=read, name="mesh-credit", daemon=True).start()

    def read(self) -> bool:
        """Take what has come; false once the worker has gone. Credit goes to its generator, the rest waits."""
        try:
            data = self.protocol.recv(_READ_SIZE)
        except OSError:
            return False
        for frame in self._buffer.feed(data):
            if isinstance(frame, Credit):
                self.on_credit(frame)
            elif isinstance(frame, Feed | Gone):
                self.on_request(frame)
            else:
                self.inbox.append(frame)
        return bool(data)
