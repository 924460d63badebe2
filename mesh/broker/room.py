"""How full the store is: what lets submissions be refused a little early, so that settling normally has room.

A client asks now and then while it submits, never for each call: what it was told last is compared in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.broker.connection import Connection, NoResponders, StoreError, Unanswered
from mesh.exception import Error, PermissionDeniedError, ResourceExhaustedError
from mesh.topology import MiB, Topology

FULL = 0.9  # of its size; from here on submissions are refused
_FRESH = 2.0  # seconds what was heard is good without asking again
_STALE = 10.0  # seconds after which it is asked for before a submission instead of beside it
_ONE_LOOK = 2.0  # seconds a look may take


@dataclass(frozen=True, slots=True)
class Level:
    """How full one thing is.

    Attributes:
        name: the stream, or `account`. what: the same for people. used, size: bytes; size 0: no limit.
        advice: what makes room, and the size to raise. refuses: what is refused where it is full.
    """

    name: str
    what: str
    used: int
    size: int
    advice: str
    refuses: str = "calls"

    @property
    def share(self) -> float:
        return self.used / self.size if self.size > 0 else 0.0

    @property
    def is_full(self) -> bool:
        return self.share >= FULL

    def __str__(self) -> str:
        if not self.size:
            return f"{self.what} holds {_mib(self.used)}, and has no limit"
        return f"{self.what} is {100 * self.share:.0f} % full ({_mib(self.used)} of {_mib(self.size)})"


async def levels(connection: Connection, topology: Topology) -> list[Level]:
    """How full the queue, the results and the account are.

    Raises:
        StoreError, Unanswered, NoResponders, PermissionDeniedError: it cannot be told.
    """
    results = topology.bucket_stream("results")
    calls_info, results_info, account = await asyncio.gather(
        connection.api(f"STREAM.INFO.{topology.calls}", timeout=_ONE_LOOK),
        connection.api(f"STREAM.INFO.{results}", timeout=_ONE_LOOK),
        connection.api("INFO", timeout=_ONE_LOOK),
    )
    return list(_levels(topology, calls_info, results_info, account))


def _levels(
    topology: Topology, calls: Mapping[str, Any], results: Mapping[str, Any], account: Mapping[str, Any]
) -> Iterator[Level]:
    for name, what, info, setting, advice in (
        (topology.calls, "the queue", calls, "calls_size", "wait until workers have caught up, or start more of them"),
        (topology.bucket_stream("results"), "the bucket of results", results, "results_size", "keep results shorter"),
    ):
        raising = f"`nats stream edit {name} --max-bytes SIZE` (of a new environment: the setting {setting})"
        size = max(0, int(info["config"]["max_bytes"]))
        advised = f"{advice}; more room: {raising}"
        yield Level(name, f"{what}, {name},", int(info["state"]["bytes"]), size, advised)
    size = max(0, int(account["limits"]["max_storage"]))
    advice = "delete what nobody needs; more room: max_file of the account, in the server's configuration"
    yield Level("account", "the account's storage", int(account["storage"]), size, advice)


def _mib(size: int) -> str:
    return f"{size / MiB:,.1f} MiB"


class Room:
    """Whether there is room for another call, as far as this client has heard.

    What it heard is good for two seconds. After that a submission asks anew: beside it where there was room and
    something was heard lately, else before it. Where the server does not tell, it decides by itself.
    """

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._heard = float("-inf")
        self._full: Level | None = None
        self._looking: asyncio.Task[None] | None = None
        self._allowed = True

    async def check(self, doing: str) -> None:
        """Refuse what would take the room that settling needs.

        Raises:
            ResourceExhaustedError: something is 90 % full or more; the text says what, and what helps.
        """
        age = time.monotonic() - self._heard
        if age > _FRESH and self._allowed and self._connection.is_up:
            looking = self._look()
            if self._full is not None or age > _STALE:
                await asyncio.shield(looking)
        if self._full is not None:
            raise self._refusal(doing)

    async def refused(self, doing: str, error: StoreError) -> ResourceExhaustedError:
        """What to raise where the server itself refused: something filled up since it was last looked at."""
        await asyncio.shield(self._look())
        return self._refusal(doing) if self._full else ResourceExhaustedError(f"{doing}: nothing was stored: {error}")

    def _refusal(self, doing: str) -> ResourceExhaustedError:
        assert self._full is not None
        return ResourceExhaustedError(f"{doing}: nothing was stored, because {self._full}; {self._full.advice}")

    def _look(self) -> asyncio.Task[None]:
        """Look now; all who ask meanwhile share it."""
        if self._looking is None or self._looking.done():
            self._looking = self._connection.spawn(self._hear())
        return self._looking

    async def _hear(self) -> None:
        try:
            found = await levels(self._connection, self._topology)
            self._full = max((level for level in found if level.is_full), key=lambda level: level.share, default=None)
        except PermissionDeniedError:
            self._allowed = False  # this user may not ask, and each try is a violation in the server's log
        except (StoreError, Unanswered, NoResponders, Error):
            self._full = None  # whatever is wrong, the submission itself is told
        self._heard = time.monotonic()
