"""Options that many commands have, and how they become settings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from mesh.broker import Broker
from mesh.config import Settings

T = TypeVar("T")

Env = Annotated[str | None, typer.Option("--env", "-e", help="The environment.", metavar="NAME")]
Url = Annotated[str | None, typer.Option("--url", help="The NATS server, nats://user:password@host:port.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


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
