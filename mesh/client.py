"""Connections of this process: one for each event loop, opened at first use, closed with the loop.

A connection cannot outlive its loop, and one whose loop has ended still says that it is connected; so the registry
goes by the loop's identity, closes through an async generator that the loop itself finalises (`asyncio.run`, uvloop
and pytest-asyncio all do), and sweeps what belongs to loops that are closed. A fork starts from nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mesh import _sync
from mesh.config import Settings

if TYPE_CHECKING:
    from mesh.broker import Broker


@dataclass(slots=True)
class _Entry:
    """The connection of one loop, with the environments that are used on it."""

    loop: asyncio.AbstractEventLoop
    opening: asyncio.Task[Broker]
    chosen: Settings | None
    environments: dict[str, Broker] = field(default_factory=dict[str, "Broker"])
    closer: AsyncGenerator[None, None] | None = None


_entries: dict[int, _Entry] = {}
_abandoned: list[Any] = []
_settings: Settings | None = None


def use_settings(settings: Settings | None) -> None:
    """Use these settings from now on, also where others are connected; `None` reads them anew."""
    global _settings
    _settings = settings


def settings() -> Settings:
    """The settings of this process."""
    return _settings or Settings.load()


async def broker(environment: str | None = None) -> Broker:
    """The running loop's connection to an environment: the configured one, unless named.

    Raises:
        ConnectionError: no server is known, or it cannot be reached. AuthError: it refuses us.
    """
    loop = asyncio.get_running_loop()
    entry = _entries.get(id(loop))
    if entry is not None and entry.chosen is not _settings:
        await close()  # other settings were chosen since
        entry = None
    if entry is None or entry.loop is not loop:
        entry = _open(loop)
    base = entry.opening.result() if entry.opening.done() else await asyncio.shield(entry.opening)
    if base.connection.is_closed:
        _forget(entry)
        return await broker(environment)
    if environment is None or environment == base.topology.environment:
        return base
    if environment not in entry.environments:
        entry.environments[environment] = base.of_environment(environment)
    return entry.environments[environment]


def _open(loop: asyncio.AbstractEventLoop) -> _Entry:
    """Begin to connect. The entry stands before the connection does, so that many first uses at once share it."""
    for entry in [entry for entry in _entries.values() if entry.loop.is_closed()]:
        _forget(entry)
    entry = _Entry(loop, loop.create_task(_connect()), _settings)
    _entries[id(loop)] = entry
    entry.opening.add_done_callback(lambda task: _opened(entry, task))
    return entry


def _opened(entry: _Entry, task: asyncio.Task[Broker]) -> None:
    if task.cancelled() or task.exception() is not None:
        _forget(entry)  # the next use tries again


async def _connect() -> Broker:
    from mesh.broker import Broker  # imports nats, which takes 100 ms and more

    opened = await Broker.open(settings())
    entry = _entries[id(asyncio.get_running_loop())]
    entry.closer = _until_loop_ends(entry, opened)
    await anext(entry.closer)
    return opened


async def _until_loop_ends(entry: _Entry, opened: Broker) -> AsyncGenerator[None, None]:
    """Stays open as long as the loop does."""
    try:
        yield
    finally:
        _forget(entry)
        for other in entry.environments.values():
            await other.rest()
        await opened.close()


def _forget(entry: _Entry) -> None:
    if _entries.get(id(entry.loop)) is entry:
        del _entries[id(entry.loop)]


async def close() -> None:
    """Close the running loop's connection, if it has one. The next use opens a new one."""
    entry = _entries.get(id(asyncio.get_running_loop()))
    if entry is not None and entry.closer is not None:
        await entry.closer.aclose()


def _after_fork() -> None:
    """In the child: forget the parent's connections, without closing or destroying anything of theirs."""
    _abandoned.append(dict(_entries))
    _entries.clear()


_sync.before_exit(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
