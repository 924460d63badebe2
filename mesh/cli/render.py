"""How commands speak: tables on a terminal, plain lines in a pipe, JSON where asked for, and exit codes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from mesh import exception


class ExitCode(IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1  # the user's function or code
    USAGE = 2
    NOT_FOUND = 3
    TIMED_OUT = 4  # waiting
    CANCELLED = 5
    UNREACHABLE = 6  # the server
    REFUSED = 7  # permission, limit, conflict
    INTERRUPTED = 130


_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (exception.NotFoundError, ExitCode.NOT_FOUND),
    (exception.OutputExpiredError, ExitCode.NOT_FOUND),
    (exception.NotReadyError, ExitCode.TIMED_OUT),
    (exception.ConnectionError, ExitCode.UNREACHABLE),
    (exception.AuthError, ExitCode.REFUSED),
    (exception.PermissionDeniedError, ExitCode.REFUSED),
    (exception.ResourceExhaustedError, ExitCode.REFUSED),
    (exception.ConflictError, ExitCode.REFUSED),
    (exception.RequestSizeError, ExitCode.REFUSED),
    (exception.ServiceError, ExitCode.UNREACHABLE),
    (exception.VersionError, ExitCode.REFUSED),
    (exception.InvalidError, ExitCode.USAGE),
    (exception.UnimplementedError, ExitCode.USAGE),
    (exception.ImageBuildError, ExitCode.FAILED),
    (exception.RemoteError, ExitCode.CANCELLED),
)


def exit_code(error: BaseException) -> ExitCode:
    """The exit code an error of mesh stands for."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILED)


def say_error(text: str, word: str = "error") -> None:
    """One message to stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    color = "red" if word == "error" else "yellow"
    console.print(f"[bold {color}]{word}:[/] {escape_markup(text)}")


def say_exception(error: BaseException) -> None:
    """What a call raised: its type and text, and the remote traceback."""
    say_error(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        sys.stderr.write(f"{note.strip()}\n")


def say(text: str) -> None:
    """Progress, for people: to stderr, so that stdout holds only what was asked for. May hold rich's markup."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
    """A table on a terminal, without its empty columns; in a pipe one line a row, cells between tabs, no heading."""
    listed = list(rows)
    if not sys.stdout.isatty():
        for row in listed:
            sys.stdout.write("\t".join(" ".join(cell.split()) for cell in row) + "\n")
        return
    console = Console(highlight=False)
    if not listed:
        console.print(f"[dim]{empty}[/]")
        return
    shown = [place for place in range(len(columns)) if any(row[place] for row in listed)]
    table = Table(*(columns[place] for place in shown), box=None, pad_edge=False, header_style="bold")
    for row in listed:
        table.add_row(*(escape_markup(row[place]) for place in shown))
    console.print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and values, one a line; what is empty is left out."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value:
            sys.stdout.write(f"{name:<{width}}  {value}\n")


def ago(seconds: float | None) -> str:
    """A moment in the past as a person says it."""
    if seconds is None:
        return ""
    age = max(0.0, time.time() - seconds)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if age >= size:
            return f"{age / size:.0f}{unit} ago"
    return f"{age:.0f}s ago"


def duration(started: float | None, finished: float | None) -> str:
    """How long something took, or takes."""
    if started is None:
        return ""
    took = (finished or time.time()) - started
    if took < 1:
        return f"{took * 1000:.0f} ms"
    return f"{took:.1f} s" if took < 120 else f"{took / 60:.0f} min"


def as_json(value: Any) -> dict[str, Any]:
    """A dataclass's fields."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
