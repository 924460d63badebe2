"""What is called, the same for every peer. Standard library only."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

SLEEP = 0.1
SHORT = {"who": 0.005, "ledger": 0.03}
CPU_NS = 1_000_000
BIG = 100_000
ONE_FAILS_IN = 100


def work(kind: str, value: Any) -> Any:
    """Run one call of a kind; returns its value, or the process it ran in where the kind is `who`."""
    if kind == "sleep":
        time.sleep(SLEEP)
    elif kind in SHORT:
        time.sleep(SHORT[kind])
    return _rest(kind, value)


async def work_async(kind: str, value: Any) -> Any:
    """The same, where functions are coroutines."""
    if kind == "sleep":
        await asyncio.sleep(SLEEP)
    elif kind in SHORT:
        await asyncio.sleep(SHORT[kind])
    return _rest(kind, value)


def _rest(kind: str, value: Any) -> Any:
    if kind == "who":
        return os.getpid()
    if kind == "cpu":
        _burn()
    elif kind == "failing" and value % ONE_FAILS_IN == 0:
        raise ValueError(f"{value} is one of those that fail")
    elif kind == "ledger":
        _write_down(value)
    return value


def _burn() -> None:
    until = time.thread_time_ns() + CPU_NS
    while time.thread_time_ns() < until:
        pass


def _write_down(value: Any) -> None:
    """One line for each run: the number it was called with, and when it ended."""
    path, number = value
    ledger = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(ledger, f"{number} {time.time()}\n".encode())
    finally:
        os.close(ledger)


def argument(kind: str, number: int) -> Any:
    """What call number so-and-so of a kind is called with."""
    return f"{number:>{BIG}}" if kind == "big" else number


def expected(kind: str, value: Any) -> Any:
    """What comes of it: the value, or ValueError where it fails."""
    return ValueError if kind == "failing" and value % ONE_FAILS_IN == 0 else value
