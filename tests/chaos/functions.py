"""What the clients call. Every function first writes down that it runs, so that executions can be counted."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mesh
from tests.chaos.kinds import CAPS

app = mesh.App("chaos")


def _worker() -> int:
    """The process of the worker that this container belongs to: its nearest ancestor that is one."""
    pid = os.getppid()
    while pid > 1:
        try:
            if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return 0  # it died, and so does this container
    return 0


_WORKER = _worker()


def _note(directory: str, nonce: str) -> None:
    """One line for one execution, in one write, so that lines of many processes never mix."""
    call, attempt = mesh.current_function_call_id(), mesh.current_attempt()
    _write(f"{directory}/effects", f"{time.time():.6f} {call} {attempt} {os.getpid()} {_WORKER} {nonce}")


def _write(path: str, line: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


@contextmanager
def _seat(directory: str, name: str) -> Iterator[None]:
    """Take one of as many seats as the function may have containers, and write down which: -1 if there is none left.

    A seat is a lock on a file, so the kernel frees it when whoever has it dies, and not before.
    """
    taken, file = -1, -1
    for number in range(CAPS[name]):
        file = os.open(f"{directory}/seat-{name}-{number}", os.O_WRONLY | os.O_CREAT, 0o600)
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = number
            break
        os.close(file)
    _write(f"{directory}/seats", f"{time.time():.6f} {name} {taken} {os.getpid()} {_WORKER}")
    try:
        yield
    finally:
        if taken >= 0:
            os.close(file)


@app.function()
def quick(directory: str, nonce: str, n: int) -> int:
    _note(directory, nonce)
    return n * 2


@app.function()
async def awaiting(directory: str, nonce: str, n: int) -> int:
    _note(directory, nonce)
    await asyncio.sleep(n % 100 / 1000)
    return n * 2


@app.function(scaledown_window=2)
def slow(directory: str, nonce: str, n: int) -> int:
    """Half a second to three seconds; its containers end soon when they have nothing to do."""
    _note(directory, nonce)
    time.sleep(0.5 + n % 26 / 10)
    return n * 2


@app.function()
def failing(directory: str, nonce: str, n: int) -> int:
    _note(directory, nonce)
    raise ValueError(f"{n} will never do")


@app.function(retries=mesh.Retries(max_retries=2))
def flaky(directory: str, nonce: str, n: int) -> int:
    _note(directory, nonce)
    if mesh.current_attempt() == 1:
        raise ValueError("not at the first try")
    return n * 2


@app.function()
def crashing(directory: str, nonce: str, n: int) -> int:
    """Ends its container, by a signal or by an exit, until its crash budget is spent."""
    _note(directory, nonce)
    if n % 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    os._exit(3)


@app.function()
def crashing_once(directory: str, nonce: str, n: int) -> int:
    _note(directory, nonce)
    try:
        os.close(os.open(f"{directory}/crashed-{nonce}", os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return n * 2
    os._exit(3)


@app.function()
def large(directory: str, nonce: str, n: int, data: bytes) -> bytes:
    _note(directory, nonce)
    return data


@app.function(timeout=1, startup_timeout=60)
def late(directory: str, nonce: str, n: int) -> int:
    _note(directory, nonce)
    time.sleep(60)
    return n * 2


@app.function(scaledown_window=2)
def sleepy(directory: str, nonce: str, n: int) -> int:
    """What clients cancel; sometimes it is faster, or they die before they do."""
    _note(directory, nonce)
    time.sleep(6)
    return n * 2


@app.function(max_containers=CAPS["single"], scaledown_window=2)
def single(directory: str, nonce: str, n: int) -> int:
    """Nobody else runs it meanwhile, on any worker."""
    _note(directory, nonce)
    with _seat(directory, "single"):
        time.sleep(n % 100 / 1000)
    return n * 2


@app.function(max_containers=CAPS["few"], single_use_containers=True)
def few(directory: str, nonce: str, n: int) -> int:
    """At most so many run it, each in a container of its own."""
    _note(directory, nonce)
    with _seat(directory, "few"):
        time.sleep(n % 300 / 1000)
    return n * 2
