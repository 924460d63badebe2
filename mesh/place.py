"""Where web functions are on the web: a path for each, below the address of a gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.exception import ServiceError
from mesh.webspec import DEV

if TYPE_CHECKING:
    from mesh.broker import Broker

DEFAULT_PORT = 8700


def path_of(app: str, name: str, function: str) -> str:
    """The path of a web function. `app` is its app's name on the wire, `name` the one for people."""
    return f"/{name}{DEV}/{function}" if app.startswith("ap-") else f"/{app}/{function}"


async def web_url(broker: Broker, app: str, function: str) -> str:
    """Where a web function answers.

    Raises:
        ServiceError: no gateway is running.
    """
    from mesh.broker import translated

    async with translated("looking for a gateway"):
        gateways = await broker.web.gateways()
        head, _ = await broker.registry.head(app)
    if not gateways:
        raise ServiceError("no gateway is running, by which web functions are reached: start one with `mesh gateway`")
    return gateways[0] + path_of(app, head.name if head is not None else app, function)
