"""What a caller who goes leaves behind: cancelling his call.

He waits for a moment, and it goes on without him. Where his event loop ends with him, nothing can be done on it any
more (`asyncio.run` cancels everything first, what reads the server's answers included): then it goes on in mesh's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from mesh import client
from mesh._sync import bridge

if TYPE_CHECKING:
    from mesh.broker import Broker

_PATIENCE = 1.5  # seconds a caller who goes waits until his call is cancelled

Cancel = Callable[["Broker"], Awaitable[object]]


async def behind(broker: Broker, cancel: Cancel) -> None:
    """Cancel because the caller goes: wait a moment for that, no longer, and whatever becomes of it.

    What cannot be cancelled from here, workers end once the caller has been silent for some time.
    """
    await asyncio.wait([broker.parting.spawn(_try(broker, cancel))], timeout=_PATIENCE)


async def _try(broker: Broker, cancel: Cancel) -> None:
    try:
        await cancel(broker)
    except BaseException as error:  # this loop ends, or the process, or the server is away
        broker.clients.leave()
        if broker.connection.is_ending and asyncio.get_running_loop() is not bridge().loop():
            elsewhere = _elsewhere(broker.topology.environment, cancel)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(elsewhere, bridge().loop()))
        elif not isinstance(error, Exception):
            raise


async def _elsewhere(environment: str, cancel: Cancel) -> None:
    await behind(await client.broker(environment), cancel)
