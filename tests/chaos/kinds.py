"""The kinds of calls, and what each must come to."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

CANCELLED = "RemoteError"  # what `get` raises for a cancelled call
CAPS = {"single": 1, "few": 3}  # `max_containers` of those that have one
CRASH_BUDGET = 8  # of the workers; innocent calls must never use it up, and `crashing` must


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One of the functions.

    Attributes:
        share: how many of 400 calls are of this kind. executions: how often a call of it runs where nothing happens.
        error: name of the exception it ends with; empty where it ends with a value.
        cancelled: its clients cancel it, so that it ends with `CANCELLED`, unless it is faster.
    """

    name: str
    share: int
    executions: int = 1
    error: str = ""
    cancelled: bool = False

    def expected(self, n: int) -> str:
        """What a call of this kind with `n` must come to, as `told` or `raised` tell it."""
        if self.error:
            return self.error
        return told(payload(n) if self.name == "large" else n * 2)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="quick", share=187),
        Kind(name="awaiting", share=60),
        Kind(name="slow", share=36),
        Kind(name="failing", share=30, error="ValueError"),
        Kind(name="flaky", share=24, executions=2),
        Kind(name="crashing", share=1, executions=CRASH_BUDGET, error="InternalFailure"),
        Kind(name="crashing_once", share=6, executions=2),
        Kind(name="large", share=16),
        Kind(name="sleepy", share=16, cancelled=True),
        Kind(name="single", share=4),
        Kind(name="few", share=12),
        Kind(name="late", share=8, error="FunctionTimeoutError"),
    )
}


def payload(n: int) -> bytes:
    """The argument of a large call: 100 to 300 KB that nobody could make up."""
    return random.Random(n).randbytes(100_000 + n % 200_000)


def told(value: object) -> str:
    """A value in a few characters, the same for equal values."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:16]}"
    return repr(value)


def raised(name: str) -> str:
    """An exception by the name of its class alone, as it is told of those of values."""
    return name.rpartition(".")[2]
