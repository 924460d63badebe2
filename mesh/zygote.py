"""The process that containers are forked from: one starts in milliseconds, and shares its memory with the others.

`python -m mesh.zygote` is started by a worker (`nursery`) with a socket to it. It has imported what containers need,
and nothing of a user's; what a container is to be, secrets included, the container reads from its own socket. One
thread waits for three things: what the worker asks for, the end of children, and the moments at which some must end.

Every container is the parent of what it started and left alone, and its zygote is that of all these once the container
has ended: whatever a zygote finds among its children that is no container is what one has left behind, and is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import itertools
import math
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from mesh import executor, frames, processes
from mesh.frames import Ended, Fork, Forked, Frame, Home, LiveUntil, NotForked
from mesh.wire import Wire

# What a container needs for its function, then what the function needs to call others: in steps, between which the
# first containers are forked.
_PRELOADED = ("mesh.app", "mesh.records", "ssl", "nats", "mesh.broker", "mesh.client", "mesh.map")
_MODULES = 3  # what follows the arguments before: names of modules that containers of one function have in common
_LOWEST_DESCRIPTOR = 100  # sockets are moved above this: programs use the low ones by number
_MOST_DESCRIPTORS = 8  # that come with one request
_DATAGRAM = 1 << 16  # bytes, more than any has
_LAST_LOOKS = 200  # at children that shall end with the worker, before they are left to the kernel
_PAUSE = 50  # milliseconds between these


@dataclass(slots=True)
class _Child:
    """A container. `until`: when it must end, by the monotonic clock; `lapsed`: it was killed for that."""

    number: int
    pid: int
    until: float
    lapsed: bool = False


class Zygote:
    """Forks containers for one worker, and ends them: when they are due, or when the worker has gone."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._control.setblocking(False)
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._children: dict[int, _Child] = {}
        self._reports: deque[tuple[Frame, int | None]] = deque()
        self._worker_gone = False

    def run(self) -> None:
        """Serve the worker until it has gone."""
        for number in (signal.SIGTERM, signal.SIGINT):  # the worker says when to end
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for module in _PRELOADED:
            self._turn(0.0)
            importlib.import_module(module)
            gc.freeze()  # what is forked in between shares it, too
        for module in sys.argv[_MODULES:]:
            self._turn(0.0)
            with contextlib.suppress(Exception):  # a container finds out by itself
                importlib.import_module(module)
            gc.freeze()
        while not self._worker_gone:
            self._turn(math.inf)
        self._end_all()

    def _turn(self, patience: float) -> None:
        """Wait for something to do, `patience` seconds at most, and do it."""
        wanted = select.POLLIN | (select.POLLOUT if self._reports else 0)
        self._poll.register(self._control, wanted)
        due = min((child.until for child in self._children.values() if not child.lapsed), default=math.inf)
        self._wait(min(patience, max(0.0, due - time.monotonic())))
        self._take_requests()
        self._reap()
        self._end_lapsed()
        self._send_reports()

    def _wait(self, seconds: float) -> None:
        self._poll.poll(None if seconds == math.inf else math.ceil(seconds * 1000))
        with contextlib.suppress(BlockingIOError):  # nobody woke us
            self._woken.recv(_DATAGRAM)

    # --- what the worker asks for ------------------------------------------------------------------------------------

    def _take_requests(self) -> None:
        while not self._worker_gone:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, _DATAGRAM, _MOST_DESCRIPTORS)
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if data:
                self._obey(frames.decode(data[frames.HEADER_SIZE :]), descriptors)
            else:
                self._worker_gone = True

    def _obey(self, request: Frame, descriptors: Sequence[int]) -> None:
        if isinstance(request, Fork):
            self._fork(request, descriptors)
        elif isinstance(request, LiveUntil):
            for child in self._children.values():
                if child.number == request.number:
                    child.until = request.until
        for descriptor in descriptors:
            os.close(descriptor)

    def _fork(self, request: Fork, descriptors: Sequence[int]) -> None:
        own = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                self._become_container(own, descriptors)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            self._report(NotForked(request.number, str(error)))
            self._end_strays()  # there may be a process, for which there was no descriptor
        else:
            self._children[pid] = _Child(request.number, pid, request.until)
            self._report(Forked(request.number, pid), pidfd)

    def _become_container(self, zygote: int, descriptors: Sequence[int]) -> NoReturn:
        """In the child, from here on. It must never come back."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for ours in (self._control, self._woken, self._waker):
                ours.close()
            _become_container(zygote, descriptors)
        except BaseException:  # noqa: BLE001 - it is said where the container's output goes
            traceback.print_exc()
        finally:
            os._exit(1)

    def _report(self, report: Frame, descriptor: int | None = None) -> None:
        """Tell the worker, once it listens: it may be paused for long, and that must not pause us."""
        self._reports.append((report, descriptor))

    def _send_reports(self) -> None:
        while self._reports:
            report, descriptor = self._reports[0]
            try:
                socket.send_fds(self._control, [frames.encode(report)], [] if descriptor is None else [descriptor])
            except BlockingIOError:
                return
            except OSError:
                self._worker_gone = True
                return
            self._reports.popleft()
            if descriptor is not None:
                os.close(descriptor)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Wait for what has ended, kill what that leaves behind, and only then say so."""
        ended: list[Ended] = []
        reaped = False
        with contextlib.suppress(ChildProcessError):  # there are no children
            while (waited := os.wait4(-1, os.WNOHANG))[0]:
                reaped = True
                pid, status, usage = waited
                child = self._children.pop(pid, None)
                if child is not None:
                    processes.kill(pid)
                    ended.append(Ended(child.number, status, usage.ru_maxrss << 10, child.lapsed))
        if reaped:
            self._end_strays()
        for report in ended:
            self._report(report)

    def _end_strays(self) -> None:
        for pid in processes.children():
            if pid not in self._children:
                processes.kill(pid)

    def _end_lapsed(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if child.until <= now and not child.lapsed:
                child.lapsed = True
                processes.kill(child.pid)

    def _end_all(self) -> None:
        """Containers, and what they leave; but what the kernel does not let go is not waited for for ever."""
        self._poll.unregister(self._control)
        for _ in range(_LAST_LOOKS):
            for pid in processes.children():
                processes.kill(pid)
            self._reap()
            self._send_reports()
            if not processes.children():
                return
            self._wait(_PAUSE / 1000)


def _become_container(zygote: int, descriptors: Sequence[int]) -> NoReturn:
    """Leave everything of the zygote's behind, take the home that the worker gives, and serve it."""
    os.setsid()
    processes.end_with_parent()
    if os.getppid() != zygote:
        os._exit(1)  # it died before that was set
    processes.adopt_orphans()
    processes.go_first_when_out_of_memory()
    *kept, output, errors = descriptors
    os.dup2(output, 1)
    os.dup2(errors, 2)
    protocol, control, page = (fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR) for one in kept)
    _close_all_but(0, 1, 2, protocol, control, page)
    marks = frames.BeginMarks(page)
    os.close(page)
    wire = Wire(socket.socket(fileno=protocol), socket.socket(fileno=control))
    home = wire.receive()
    if not isinstance(home, Home):
        os._exit(1)  # the worker has gone
    _settle(home)
    gc.enable()
    executor.main(wire, marks)


def _close_all_but(*kept: int) -> None:
    edges = [*sorted(kept), max(*kept, os.sysconf("SC_OPEN_MAX"))]
    for below, above in itertools.pairwise(edges):
        os.closerange(below + 1, above)


def _settle(home: Home) -> None:
    """Take the container's directory, name and variables. Those that Python reads as it starts were the zygote's."""
    for name in list(os.environ):
        del os.environ[name]
    for name, value in home.variables.items():
        os.environ[name] = value
    time.tzset()
    os.chdir(home.directory)
    processes.set_title(home.variables.get("MESH_TASK_ID", "mesh"), home.title)


def main() -> None:
    """Serve the worker at the other end of the socket whose number is the first argument."""
    gc.disable()  # containers share what is never written to, and collecting garbage writes to everything
    control = socket.socket(fileno=int(sys.argv[1]))
    processes.adopt_orphans()
    processes.set_title("mesh-zygote", "mesh zygote")
    gc.freeze()
    Zygote(control).run()


if __name__ == "__main__":
    main()
