"""An app on the wire for the length of a block: what `app.run()` is."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from mesh import context
from mesh._sync import bridge
from mesh.exception import InvalidError

if TYPE_CHECKING:
    import asyncio

    from mesh.app import App
    from mesh.broker import Broker

logger = logging.getLogger("mesh")


class AppRun:
    """An app on the wire for the length of a block. Renews itself, so that the mesh notices when this process dies."""

    def __init__(self, app: App, name: str, environment: str | None, detach: bool) -> None:
        self._app = app
        self._name = name
        self._environment = environment
        self._detach = detach
        self._renewing: asyncio.Task[None] | None = None
        self._output = contextlib.AsyncExitStack()

    async def __aenter__(self) -> App:
        import asyncio

        from mesh import client

        refuse_in_container("app.run()")
        broker = await client.broker(self._environment)
        wire = await self._app.start_run(broker, self._name)
        self._renewing = asyncio.get_running_loop().create_task(self._renew(broker, wire))
        if context.output_enabled():
            await self._output.enter_async_context(_shown_logs(broker, wire))
        return self._app

    async def _renew(self, broker: Broker, wire: str) -> None:
        import asyncio

        from mesh.broker.fleet import RENEW_APP

        while True:
            await asyncio.sleep(RENEW_APP)
            try:
                await broker.runs.renew(wire, broker.client)
            except Exception as error:  # noqa: BLE001 - the server is away; the next renewal may still be in time
                logger.debug("renewing %s: %r", wire, error)

    async def __aexit__(self, *_: object) -> None:
        from mesh import client, deploy

        wire = self._app.off_wire()
        broker = await client.broker(self._environment)
        if wire is not None and not self._detach:
            await deploy.end_run(broker, wire)
        if self._renewing is not None and not self._detach:
            self._renewing.cancel()
        await self._output.aclose()

    def __enter__(self) -> App:
        return bridge().run(self.__aenter__())

    def __exit__(self, *exc: object) -> None:
        bridge().run(self.__aexit__())


@contextlib.asynccontextmanager
async def _shown_logs(broker: Broker, wire: str) -> AsyncGenerator[None, None]:
    """Write what the app's functions print to this process's own output, as it comes."""

    async def show(message: Any) -> None:
        stream = sys.stderr if (message.headers or {}).get("Mesh-Stream") == "stderr" else sys.stdout
        stream.write(context.shown(message.data.decode("utf-8", "replace")))
        stream.flush()

    subscription = await broker.follow_logs(wire, show)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the connection may be gone; there is nothing to keep then
            await subscription.drain()  # type: ignore[no-untyped-call]


def refuse_in_container(what: str) -> None:
    """A script that runs or deploys itself outside of its `__main__` guard would do so in every container."""
    if not context.is_local() and context.current.get() is None:
        raise InvalidError(
            f'{what} ran while a container imported this module: put it under `if __name__ == "__main__":`'
        )
