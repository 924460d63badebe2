"""The worker's side of its zygotes: started at first need, asked for processes, and mourned if somebody kills them.

There is one for each interpreter, and set of the variables that it and the C library read as they start. Nothing is
waited for where one starts: what is asked of it meanwhile waits in its socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mesh import frames, processes
from mesh.background import Background
from mesh.frames import Ended, Fork, Forked, Frame, LiveUntil, NotForked

logger = logging.getLogger("mesh.worker")

_AT_START = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "OPENSSL_", "LC_", "LANG", "HOME")  # how such variables begin
_IDLE_LIMIT = 600.0  # seconds after which a zygote without containers ends, but for the worker's own
_FORK_LIMIT = 60.0  # seconds after which one that does not answer is killed
_TRIES = 3  # at a fork, where zygotes end instead
_BUSY_PAUSE = 0.01  # seconds, where a zygote does not take what it is asked as fast as that comes
_CLOSING_LIMIT = 15.0  # seconds that zygotes have to end everything
_SWEEP_PAUSE = 0.05
_DATAGRAM = 1 << 16  # bytes, more than any has
_TITLE_ROOM = " " * 160  # an argument that makes room for the longer command lines of containers


@dataclass(frozen=True, slots=True)
class _Key:
    """What a zygote is started with: containers that agree in this have the same one."""

    interpreter: str
    variables: tuple[tuple[str, str], ...]
    modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, variables: Mapping[str, str], interpreter: str = sys.executable, modules: tuple[str, ...] = ()) -> _Key:
        """For containers with these variables. What is to import modules of others has all of these but the mesh's."""
        if modules:
            chosen = [pair for pair in variables.items() if not pair[0].startswith("MESH_")]
        else:
            chosen = [pair for pair in variables.items() if pair[0].startswith(_AT_START)]
        return cls(interpreter, tuple(sorted(chosen)), modules)


class ZygoteEndedError(OSError):
    """The zygote ended before it could fork."""


class Process:
    """A container's process.

    Attributes:
        ended: its end, once it has come. What the process started and left is killed by then.
    """

    def __init__(self, zygote: _Zygote, number: int) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.pid = 0
        self.pidfd = -1
        self.forked: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[Ended] = loop.create_future()
        self._zygote = zygote

    def signal(self, number: int) -> None:
        """Send it a signal; nothing, once it has ended."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """End it, and everything it started with it."""
        self.signal(signal.SIGKILL)

    def live_until(self, moment: float) -> None:
        """Have it killed at this moment of the monotonic clock, whatever becomes of the worker, unless told of a later
        one before."""
        self._zygote.tell(LiveUntil(self.number, moment))

    def end(self, ended: Ended) -> None:
        """It has ended; called by whoever waited for it."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.ended.set_result(ended)


def _refuse(process: Process, error: OSError) -> None:
    if not process.forked.done():
        process.forked.set_exception(error)


class _Zygote:
    """The worker's end of one zygote.

    Attributes:
        processes: that it has forked, or was asked to, by their numbers. idle_since: when the last of them ended.
    """

    def __init__(self, key: _Key, mark: Mapping[str, str], nursery: Nursery) -> None:
        self.key = key
        self.processes: dict[int, Process] = {}
        self.idle_since = time.monotonic()
        self.gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._nursery = nursery
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            self._program = subprocess.Popen(
                [key.interpreter, "-P", "-m", "mesh.zygote", str(theirs.fileno()), _TITLE_ROOM, *key.modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env={**dict(key.variables), **mark},
                start_new_session=True,
            )
        self._pidfd = os.pidfd_open(self._program.pid)
        self._loop.add_reader(self._pidfd, self._on_end)
        self._loop.add_reader(self._control, self._on_report)

    @property
    def pid(self) -> int:
        return self._program.pid

    async def fork(self, descriptors: Sequence[int], until: float) -> Process:
        """A new process.

        Raises:
            ZygoteEndedError: there is nobody to fork it. OSError: the system refused it.
        """
        process = Process(self, next(self._numbers))
        self.processes[process.number] = process
        try:
            async with asyncio.timeout(_FORK_LIMIT):
                while not self.tell(Fork(process.number, until), descriptors):  # noqa: ASYNC110 - rare, and short
                    await asyncio.sleep(_BUSY_PAUSE)
                await process.forked
        except TimeoutError:
            logger.error("a zygote, process %d, did not answer for %g s, and is killed", self.pid, _FORK_LIMIT)
            self.kill()
            raise ZygoteEndedError("it was killed") from None
        return process

    def tell(self, request: Frame, descriptors: Sequence[int] = ()) -> bool:
        """Ask for something; false where it cannot take that now."""
        try:
            socket.send_fds(self._control, [frames.encode(request)], descriptors)
        except BlockingIOError:
            return False
        except OSError:  # it is ending, which is noticed by itself
            pass
        return True

    def hang_up(self) -> None:
        """Let it end everything, and itself."""
        with contextlib.suppress(OSError):  # it has ended
            self._control.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        self._program.kill()

    # --- what it says ------------------------------------------------------------------------------------------------

    def _on_report(self) -> None:
        if not self._read_reports():
            self._loop.remove_reader(self._control)  # it has ended, or is about to

    def _read_reports(self) -> bool:
        """Take what there is; false once nothing more will come."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, _DATAGRAM, 1)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._take(frames.decode(data[frames.HEADER_SIZE :]), descriptors)

    def _take(self, report: Frame, descriptors: Sequence[int]) -> None:
        match report:
            case Forked():
                self._on_forked(self.processes[report.number], report.pid, descriptors)
            case NotForked():
                _refuse(self._forget(report.number), OSError(f"no process for a container: {report.error}"))
            case Ended():
                self._forget(report.number).end(report)
            case _:
                raise AssertionError(f"a zygote does not say {report}")

    def _on_forked(self, process: Process, pid: int, descriptors: Sequence[int]) -> None:
        process.pid = pid
        if not descriptors:  # the kernel leaves it out where this process has too many
            self.tell(LiveUntil(process.number, 0.0))
            _refuse(process, OSError("no process for a container: too many open files"))
            return
        (process.pidfd,) = descriptors
        if process.forked.done():  # nobody wants it any more
            process.kill()
        else:
            process.forked.set_result(None)

    def _forget(self, number: int) -> Process:
        process = self.processes.pop(number)
        if not self.processes:
            self.idle_since = time.monotonic()
            self._nursery.on_idle(self)
        return process

    # --- its end -----------------------------------------------------------------------------------------------------

    def _on_end(self) -> None:
        """It has ended, and the kernel kills its containers, which are this process's children now."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._read_reports()
        self._loop.remove_reader(self._control)
        self._control.close()
        code = self._program.wait()
        for process in list(self.processes.values()):
            if process.pidfd >= 0:
                self._loop.add_reader(process.pidfd, self._bury, process)
            else:
                del self.processes[process.number]
                _refuse(process, ZygoteEndedError(f"it ended with status {code}"))
        self._nursery.on_gone(self, code)
        self.gone.set_result(code)

    def _bury(self, process: Process) -> None:
        self._loop.remove_reader(process.pidfd)
        status, peak = int(signal.SIGKILL), 0
        with contextlib.suppress(ChildProcessError):  # the zygote had waited for it, and could not say so any more
            _, status, usage = os.wait4(process.pid, 0)
            peak = usage.ru_maxrss << 10
            processes.kill(process.pid)
        del self.processes[process.number]
        process.end(Ended(process.number, status, peak, False))


class Nursery:
    """The zygotes of one worker."""

    def __init__(self) -> None:
        self.mark = {"MESH_NURSERY": secrets.token_hex(8)}
        self._zygotes: dict[_Key, _Zygote] = {}
        self._all: set[_Zygote] = set()
        self._warm: _Key | None = None
        self._closing = False
        self._background = Background()

    @property
    def interpreters(self) -> set[str]:
        """Those that have a zygote."""
        return {zygote.key.interpreter for zygote in self._all}

    def warm(self, variables: Mapping[str, str]) -> None:
        """Start the zygote for containers with these variables before the first of them is wanted, and keep it."""
        self._warm = _Key.of(variables)
        self._zygote(self._warm)

    def prepare(self, variables: Mapping[str, str], interpreter: str, modules: tuple[str, ...]) -> None:
        """Start a zygote that imports modules, for containers that will be forked with these arguments."""
        with contextlib.suppress(OSError):  # the worker is stopping
            self._zygote(_Key.of(variables, interpreter, modules))

    async def fork(
        self,
        variables: Mapping[str, str],
        descriptors: Sequence[int],
        until: float = math.inf,
        interpreter: str = sys.executable,
        modules: tuple[str, ...] = (),
    ) -> Process:
        """A process for a container that will have these variables.

        Args:
            descriptors: what it gets, as `frames.Fork` says; they stay open here. modules: what it may have imported.

        Raises:
            OSError: there is none to be had.
        """
        for tries_left in reversed(range(_TRIES)):
            try:
                return await self._zygote(_Key.of(variables, interpreter, modules)).fork(descriptors, until)
            except ZygoteEndedError as error:
                if not tries_left:
                    raise OSError(f"no process for a container: {_TRIES} zygotes ended instead; {error}") from None
        raise AssertionError("the last try returns or raises")

    def _zygote(self, key: _Key) -> _Zygote:
        if self._closing:
            raise OSError("the worker is stopping")
        processes.adopt_orphans()  # those of zygotes that are killed
        if key not in self._zygotes:
            self._zygotes[key] = _Zygote(key, self.mark, self)
            self._all.add(self._zygotes[key])
        return self._zygotes[key]

    async def close(self) -> None:
        """End them all, and whatever they have forked."""
        self._closing = True
        for zygote in self._all:
            zygote.hang_up()
        ending = [zygote.gone for zygote in self._all]
        if ending and (await asyncio.wait(ending, timeout=_CLOSING_LIMIT))[1]:
            for zygote in self._all:
                zygote.kill()
        await self._background.cancel()

    # --- what zygotes say --------------------------------------------------------------------------------------------

    def on_idle(self, zygote: _Zygote) -> None:
        """It has no processes any more."""
        if zygote.key != self._warm:
            asyncio.get_running_loop().call_later(_IDLE_LIMIT, self._retire, zygote)

    def _retire(self, zygote: _Zygote) -> None:
        long_ago = time.monotonic() - _IDLE_LIMIT
        if not zygote.processes and zygote.idle_since <= long_ago and self._zygotes.get(zygote.key) is zygote:
            del self._zygotes[zygote.key]
            zygote.hang_up()

    def on_gone(self, zygote: _Zygote, code: int) -> None:
        """It has ended. The next need starts another."""
        self._all.discard(zygote)
        if self._zygotes.get(zygote.key) is zygote:
            del self._zygotes[zygote.key]
            if not self._closing:
                logger.warning(
                    "a zygote, process %d, ended with status %d, and its containers with it", zygote.pid, code
                )
                self._background.spawn(self._end_strays(zygote))

    async def _end_strays(self, zygote: _Zygote) -> None:
        """Kill what its containers have started: all of it has come to this process, also what has its own session."""
        sessions = {process.pid for process in zygote.processes.values()}
        killed: set[int] = set()
        while (strays := self._strays(sessions)) or killed or zygote.processes:
            for pid in strays:
                processes.kill(pid)
            killed |= strays
            await asyncio.sleep(_SWEEP_PAUSE)
            killed = {pid for pid in killed if not _waited(pid)}

    def _strays(self, sessions: set[int]) -> set[int]:
        """Children of this process that came to it from containers: of their sessions, or with the mark of ours."""
        known = {zygote.pid for zygote in self._all} | sessions
        (mark,) = (f"{name}={value}".encode() for name, value in self.mark.items())
        return {
            pid
            for pid, session in processes.children().items()
            if pid not in known and (session in sessions or mark in processes.variables(pid))
        }


def _waited(pid: int) -> bool:
    """Whether a child has ended; then it is gone for good."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
