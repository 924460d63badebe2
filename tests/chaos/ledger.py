"""What is known of every call: written by the clients while they run, read when all is over."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Ledger:
    """One client's own file: a line for each thing that happens to one of its calls, written before it goes on."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, event: str, nonce: str, **facts: Any) -> None:
        line = json.dumps({"event": event, "nonce": nonce, "at": time.time(), **facts})
        os.write(self._file, line.encode() + b"\n")


@dataclass(slots=True)
class Call:
    """One call, as its client saw it.

    Attributes:
        nonce: what the client calls it by; an argument of the call, so that executions of calls without id are known.
        how: `spawn`, `remote` or `leave` (spawned, and never asked for).
        ids: its id, once known; from an error's text where the submission had no answer.
        accepted: when `spawn` returned, or `remote` with a value. unsure: the submission had no answer.
        refused: why it was not submitted at all. given: what the client got for it.
        cancelled: when `cancel` returned: nothing of it runs from then on.
    """

    nonce: str
    kind: str
    n: int
    how: str
    tried: float
    ids: set[str] = field(default_factory=set[str])
    accepted: float = 0.0
    unsure: bool = False
    refused: str = ""
    given: str | None = None
    cancelled: float = 0.0
    lines: list[str] = field(default_factory=list[str])

    def take(self, line: dict[str, Any]) -> None:
        """One more line about it."""
        if line.get("call"):
            self.ids.add(line["call"])
        match line["event"]:
            case "accepted":
                self.accepted = line["at"]
            case "unsure":
                self.unsure = True
            case "refused":
                self.refused = line["error"]
            case "cancelled":
                self.cancelled = line["at"]
            case "given":
                self.accepted = self.accepted or line["at"]
                self.given = line["value"]
            case _:
                pass


@dataclass(frozen=True, slots=True)
class Execution:
    """One execution, as the function itself wrote it down."""

    at: float
    call: str
    attempt: int
    container: int
    worker: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Seat:
    """A seat of a capped function, as an execution of it found one: which, -1 if none was left."""

    at: float
    function: str
    number: int
    container: int
    worker: int


@dataclass(slots=True)
class Book:
    """Everything that clients and functions have written so far; `read` takes what is new."""

    directory: Path
    calls: dict[str, Call] = field(default_factory=dict[str, Call])
    executions: dict[str, list[Execution]] = field(default_factory=dict[str, list[Execution]])
    seats: list[Seat] = field(default_factory=list[Seat])
    broken: list[str] = field(default_factory=list[str])
    interrupted: int = 0
    _offsets: dict[Path, int] = field(default_factory=dict[Path, int])

    def read(self) -> None:
        for path in sorted(self.directory.glob("ledger-*")):
            for text in self._new_lines(path):
                self._take(json.loads(text), text)
        for text in self._new_lines(self.directory / "effects"):
            at, call, attempt, container, worker, nonce = text.split()
            execution = Execution(float(at), call, int(attempt), int(container), int(worker), nonce)
            self.executions.setdefault(call, []).append(execution)

        for text in self._new_lines(self.directory / "seats"):
            at, function, number, container, worker = text.split()
            self.seats.append(Seat(float(at), function, int(number), int(container), int(worker)))

    def _new_lines(self, path: Path) -> Iterator[str]:
        """Whole lines only: a client may have been killed in the middle of one."""
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offsets[path] = self._offsets.get(path, 0) + len(whole)
        yield from whole.decode().splitlines()

    def _take(self, line: dict[str, Any], text: str) -> None:
        nonce = line["nonce"]
        if line["event"] == "try":
            self.calls[nonce] = Call(nonce, line["kind"], line["n"], line["how"], line["at"])
        elif line["event"] == "broken":
            self.broken.append(text)
        elif line["event"] == "interrupted":
            self.interrupted += 1
        else:
            self.calls[nonce].take(line)
        if nonce in self.calls:
            self.calls[nonce].lines.append(text)

    @property
    def accepted(self) -> list[Call]:
        return [call for call in self.calls.values() if call.accepted]
