"""Options that many commands have, and how they become settings."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from mesh.broker import Broker
from mesh.config import Settings
from mesh.exception import InvalidError
from mesh.protocol import State, parse_time
from mesh.status import Filter

T = TypeVar("T")

Env = Annotated[str | None, typer.Option("--env", "-e", help="The environment.", metavar="NAME")]
Url = Annotated[str | None, typer.Option("--url", help="The NATS server, nats://user:password@host:port.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AppName = Annotated[str, typer.Option("--app", help="Only of this app.")]
FunctionName = Annotated[str, typer.Option("--function", help="Only of this function, class or method.")]
ErrorText = Annotated[str, typer.Option("--error", help="Only with this in the last error.")]
Since = Annotated[str, typer.Option("--since", help="Not before: `2h`, `30m`, `3d`, or an RFC 3339 time.")]
Until = Annotated[str, typer.Option("--until", help="Not after; as --since.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_moment(option: str, text: str) -> float:
    """Seconds since 1970 from an age such as `2h`, or a time.

    Raises:
        InvalidError: it is neither.
    """
    age = _AGE.fullmatch(text)
    if age:
        return time.time() - float(age[1]) * _UNIT_SECONDS[age[2]]
    try:
        return parse_time(text)
    except InvalidError:
        raise InvalidError(
            f"{option} {text!r}: say an age such as 30m, 2h or 3d, or a time such as 2026-01-31T12:00Z"
        ) from None


def parse_filter(app: str, function: str, error: str, since: str, until: str, state: str = "") -> Filter:
    """What the options of a listing or a bulk command mean."""
    if state and state not in list(State):
        raise InvalidError(f"--state {state!r}: there are {', '.join(State)}")
    return Filter(
        app=app,
        function=function,
        state=state,
        error=error,
        since=parse_moment("--since", since) if since else 0.0,
        until=parse_moment("--until", until) if until else float("inf"),
    )


def confirm(question: str, yes: bool) -> None:
    """Ask, unless told not to; where nobody can be asked, that must have been said.

    Raises:
        InvalidError: nobody can be asked. typer.Abort: the answer is no.
    """
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidError(f"{question} Say --yes where nobody can be asked")
        typer.confirm(question, abort=True)


def with_broker(env: str | None, url: str | None, work: Callable[[Broker], Awaitable[T]]) -> T:
    """Do something with a connection to the mesh that the options and settings name."""
    settings = Settings.load({"environment": env, "nats_url": url})

    async def connected() -> T:
        broker = await Broker.open(settings, role="cli")
        try:
            return await work(broker)
        finally:
            await broker.close()

    return asyncio.run(connected())
