"""What every peer can do, as the measuring client sees it. Standard library only: it runs in their environments."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

URL = os.environ.get("PEERS_URL", "")
"""Where the server is."""

LEASE = int(os.environ.get("PEERS_LEASE", "0"))
"""Seconds after which the calls of a lost worker are to be taken over, or 0: the peer's own default."""


class Failed(Exception):
    """The function raised; as a value, that it did."""


class Peer(ABC):
    """A client of one queue. `blocking`: its methods block the thread, so a second one reads results in open loops."""

    blocking = False

    @abstractmethod
    async def open(self) -> None:
        """Connect, and make what workers need to find: streams, tables, deployed code."""

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    async def submit(self, kind: str, value: Any) -> Any:
        """Accept one call of `work(kind, value)`; returns its handle when the store has it."""

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        """Accept many, by the fastest way that the peer documents; one by one where it has none."""
        return [await self.submit(kind, value) for value in values]

    @abstractmethod
    async def result(self, handle: Any, timeout: float) -> Any:
        """The value that the function returned.

        Raises:
            Failed: the function raised. TimeoutError: no result after so many seconds.
        """

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        """All of them, in order; a `Failed` for those that failed."""
        return [await self.outcome(handle, timeout) for handle in handles]

    async def run_many(self, kind: str, values: Sequence[Any], timeout: float) -> list[Any]:
        """Submit many and read what came of them, by the fastest way that the peer documents."""
        return await self.results(await self.submit_many(kind, values), timeout)

    async def outcome(self, handle: Any, timeout: float) -> Any:
        """The value, or a `Failed`."""
        try:
            return await self.result(handle, timeout)
        except Failed as failed:
            return failed


class TogetherPeer(Peer):
    """One that reads many results at once: `results` is its own, and one result is the least of many."""

    async def result(self, handle: Any, timeout: float) -> Any:
        [found] = await self.results([handle], timeout)
        if isinstance(found, Failed):
            raise found
        return found

    @abstractmethod
    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]: ...


async def gather(make: Callable[[Any], Awaitable[Any]], values: Sequence[Any], at_once: int = 20) -> list[Any]:
    """One coroutine for each value, some at a time: connection pools have a connection for each."""
    found: list[Any] = [None] * len(values)
    left = iter(enumerate(values))

    async def some() -> None:
        for number, value in left:
            found[number] = await make(value)

    await asyncio.gather(*(some() for _ in range(min(at_once, len(values)))))
    return found
