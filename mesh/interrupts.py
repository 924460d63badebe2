"""Which inputs of a container are to be interrupted, and how: told by the worker on the control socket and a SIGUSR1.

The handler runs in the main thread between two bytecodes. It interrupts only the input that was named, once, and only
while that one runs; an input that has not begun is never begun. How depends on where it runs: in the main thread the
handler raises, a task is cancelled, in another thread CPython is asked to raise as soon as it runs Python code.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
from typing import Protocol

from mesh import frames
from mesh._sync import bridge
from mesh.exception import InputCancellation
from mesh.frames import Cancel, Drop, Dropped
from mesh.wire import Wire

_READ_SIZE = 1 << 16


# --- where inputs run ------------------------------------------------------------------------------------------------


class Place(Protocol):
    """Where one run of the user's function takes place."""

    def interrupt(self, *, forced: bool) -> bool:
        """Interrupt it, once; true where it is the main thread, and so the caller, that is to raise."""
        ...

    def leave(self) -> None:
        """It has ended: what was asked for and did not happen must not hit what comes next."""
        ...


class MainThread:
    """The thread that reads frames: an input that it runs itself."""

    def __init__(self) -> None:
        self._interrupted = False

    def interrupt(self, *, forced: bool) -> bool:
        before, self._interrupted = self._interrupted, True
        return not before

    def leave(self) -> None:
        pass


class Task:
    """A task of the main thread's loop. One that blocks the loop cannot see that it was cancelled."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task
        self._loop = task.get_loop()
        self._interrupted = self._forced = False

    def interrupt(self, *, forced: bool) -> bool:
        if not self._interrupted:
            self._interrupted = True
            self._loop.call_soon_threadsafe(self._task.cancel)
        elif forced and not self._forced and asyncio.current_task(self._loop) is self._task:
            self._forced = True
            return True
        return False

    def leave(self) -> None:
        pass


class Thread:
    """The thread that makes this: one of several that run inputs."""

    def __init__(self) -> None:
        self._ident = threading.get_ident()
        self._thread = ctypes.c_ulong(self._ident)
        self._interrupted = False

    def interrupt(self, *, forced: bool) -> bool:
        if not self._interrupted:
            self._interrupted = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, ctypes.py_object(InputCancellation))
            bridge().wake(self._ident)
        return False

    def leave(self) -> None:
        if self._interrupted:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, None)


# --- what was named --------------------------------------------------------------------------------------------------


class Interrupts:
    """What the worker wants interrupted, or given back."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._buffer = frames.Buffer()
        self._named: set[int] = set()
        self._forced: set[int] = set()
        self._dropped: set[int] = set()
        self._begun = 0  # the newest that was; inputs come with growing numbers
        self._running: dict[Place, frozenset[int]] = {}
        self._lock = threading.RLock()  # a signal may come while its handler runs
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

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

    # --- what inputs do ----------------------------------------------------------------------------------------------

    def enter(self, place: Place, seqs: list[int]) -> list[int]:
        """These begin together, and can be interrupted from here on. Returns those that were not called off before."""
        with self._lock:
            self._begun = max(self._begun, seqs[-1])
            self._running[place] = frozenset(seqs)  # first of all: a cancel that comes now must find them
            if not (self._named or self._dropped):
                return seqs
            begun = [seq for seq in seqs if seq not in self._named and seq not in self._dropped]
            self._running[place] = frozenset(begun)
        if begun and self._named.issuperset(begun) and place.interrupt(forced=False):  # since that was looked at
            raise _interruption()
        return begun

    def leave(self, place: Place) -> None:
        """They are not interrupted any more. May itself be interrupted, once: then it is to be called again."""
        with self._lock:
            self._running.pop(place, None)
            place.leave()

    def alone(self) -> int:
        """The number of the input that runs alone, or of the first of a batch; 0 if none runs, or several."""
        running = tuple(self._running.values())
        return min(running[0], default=0) if len(running) == 1 else 0

    def is_named(self, seq: int) -> bool:
        """Whether an input was cancelled, or ran out of time."""
        return seq in self._named

    def is_dropped(self, seq: int) -> bool:
        """Whether an input was given back before it began."""
        return seq in self._dropped

    def forget(self, seq: int) -> None:
        """The input has ended."""
        for known in (self._named, self._forced, self._dropped):
            known.discard(seq)

    # --- what the worker says ----------------------------------------------------------------------------------------

    def _on_signal(self, _signum: int, _frame: object) -> None:
        with contextlib.suppress(OSError):  # nothing more to read
            while data := self._wire.control.recv(_READ_SIZE):
                for frame in self._buffer.feed(data):
                    self._take(frame)
        if self._wire.may_interrupt():
            self.interrupt()

    def _take(self, frame: frames.Frame) -> None:
        if isinstance(frame, Cancel):
            self._named.add(frame.seq)
            if frame.force:
                self._forced.add(frame.seq)
        elif isinstance(frame, Drop):
            with self._lock:
                given_back = frame.seq > self._begun  # one that has ended may still be thought to wait
                if given_back:
                    self._dropped.add(frame.seq)
            with contextlib.suppress(OSError):  # the worker is gone
                self._wire.control.send(frames.encode(Dropped(frame.seq, given_back)))

    def interrupt(self) -> None:
        """Interrupt what was named and runs; of a batch, where all of it was."""
        here = False
        with self._lock:
            for place, seqs in self._running.items():
                if seqs and seqs <= self._named:
                    here = place.interrupt(forced=bool(seqs & self._forced)) or here
        if here:
            raise _interruption()


def _interruption() -> InputCancellation:
    return InputCancellation("the input was cancelled, or ran out of time")
