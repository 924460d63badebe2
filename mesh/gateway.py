"""The gateway: HTTP and WebSockets in, requests to the web functions of one environment out.

It is an ASGI application under uvicorn, and has the events of another one, which is in some container, pass through:
what its server says goes there, what comes from there goes to its server. It talks to NATS alone, so workers need no
open port. A function's path is `/<app>/<function>/`, with `-dev` after the name of an app of a single run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

import uvicorn
from starlette.responses import RedirectResponse, Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mesh.asgi import Event, Receive, Send
from mesh.background import Background
from mesh.broker import Broker, NoResponders, StoreError, Unanswered
from mesh.broker.web import RENEW_GATEWAY
from mesh.exception import Error, InvalidError
from mesh.place import DEFAULT_PORT
from mesh.places import Places, Refused, Tokens
from mesh.visit import Scope, Visit

logger = logging.getLogger("mesh.gateway")

MAX_BODY = 4 << 30  # bytes of a request, by default

_TRANSPORT = "mesh.transport"  # in a scope
_REREAD = 10.0  # seconds between reads of all heads, in case a push was missed
_PORTS = 100  # that are tried, from the usual one on
_PASSED = (
    *("type", "asgi", "http_version", "server", "client", "scheme", "method", "path", "raw_path", "query_string"),
    *("headers", "subprotocols", "extensions"),
)


# --- one request -----------------------------------------------------------------------------------------------------


class Gateway:
    """The application.

    Args:
        max_body: bytes a request may bring.
    """

    def __init__(self, broker: Broker, *, max_body: int = MAX_BODY) -> None:
        self.places = Places(broker)
        self._tokens = Tokens(broker)
        self._broker = broker
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._pass(scope, receive, send)
        except Refused as refused:
            await _respond(refused.response, scope, receive, send)
        except (Unanswered, StoreError, Error) as error:
            logger.warning("%s: %s", scope["path"], error)
            await _respond(Refused(503, "the mesh is not reached").response, scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        place = await self.places.find(scope["path"], _host(headers))
        if place.protected:
            await self._tokens.check(headers)
        if scope["path"] == place.root and _wants_page(scope):
            query = scope["query_string"].decode()
            response = RedirectResponse(f"{place.root}/{f'?{query}' if query else ''}", 307)
            await _respond(response, scope, receive, send)
            return
        told = {name: scope[name] for name in _PASSED if name in scope}
        told["root_path"] = place.root
        if scope["path"] == place.root:
            told["path"], told["raw_path"] = f"{place.root}/", scope["raw_path"] + b"/"
        limited = _limited(scope, receive, self._max_body)
        await Visit(self._broker, place, told, limited, send, scope.get(_TRANSPORT)).run()


def _host(headers: Mapping[bytes, bytes]) -> str:
    """The name of the host that a client asked for; empty for an address of IPv6."""
    name = headers.get(b"host", b"").decode("latin1").lower()
    return "" if name.startswith("[") else name.partition(":")[0]


def _wants_page(scope: Scope) -> bool:
    """Whether somebody looks at a page, whose relative links need a slash at the end of its path."""
    headers = dict(scope["headers"])
    return (
        scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and b"text/html" in headers.get(b"accept", b"")
    )


def _limited(scope: Scope, receive: Receive, limit: int) -> Receive:
    """What a request brings, if it is not too much."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    too_much = Refused(413, f"a request may bring {limit:,} bytes")
    if length.isdigit() and int(length) > limit:
        raise too_much
    count = 0

    async def counted() -> Event:
        nonlocal count
        event = await receive()
        count += len(event.get("body", b""))
        if count > limit and scope["type"] == "http":
            raise too_much
        return event

    return counted


async def _respond(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer in place of an application."""
    if scope["type"] == "http":
        await response(scope, receive, send)
        return
    if "websocket.http.response" in scope.get("extensions", {}):
        start = {"type": "websocket.http.response.start", "status": response.status_code}
        await send({**start, "headers": response.raw_headers})
        await send({"type": "websocket.http.response.body", "body": response.body})
    else:
        await send({"type": "websocket.close", "code": 1011})


# --- the server ------------------------------------------------------------------------------------------------------


def bind(host: str, port: int | None) -> socket.socket:
    """A socket to listen on: at the port asked for; else at the usual one, or the next that is free.

    Raises:
        InvalidError: it is in use.
    """
    tried = [port] if port is not None else [*range(DEFAULT_PORT, DEFAULT_PORT + _PORTS), 0]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in tried:
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, number))
        except OSError as error:
            listening.close()
            if number == tried[-1]:
                raise InvalidError(f"cannot listen on {host}, port {number}: {error.strerror}") from None
        else:
            return listening
    raise AssertionError("unreachable: the last port raises")


def address_of(listening: socket.socket) -> str:
    """The URL at which a gateway on this machine is reached."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class _Protocol(HttpToolsProtocol):
    """uvicorn's, which says what it speaks by: nothing else tells that a client has gone while nothing is read."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast("dict[str, Any]", self.scope)[_TRANSPORT] = self.transport


class _Server(uvicorn.Server):
    """uvicorn, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def _log_as_mesh_does(access_log: bool) -> None:
    """Requests, and what uvicorn finds wrong, go where the mesh's own lines go."""
    for name, level in (("uvicorn.access", logging.INFO), ("uvicorn.error", logging.WARNING)):
        if access_log or level > logging.INFO:
            theirs = logging.getLogger(name)
            theirs.handlers, theirs.propagate = logging.getLogger("mesh").handlers, False
            theirs.setLevel(level)


async def serve(
    broker: Broker,
    listening: socket.socket,
    stop: asyncio.Event,
    *,
    max_body: int = MAX_BODY,
    grace: float = 30.0,
    access_log: bool = True,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Run a gateway until told to stop; then requests under way may go on for the grace."""
    gateway, name, url = Gateway(broker, max_body=max_body), secrets.token_hex(4), address_of(listening)
    await gateway.places.watch()
    config = uvicorn.Config(
        gateway,
        lifespan="off",
        interface="asgi3",
        http=_Protocol,
        ws="websockets-sansio",
        log_config=None,
        access_log=access_log,
        server_header=False,
        timeout_graceful_shutdown=int(grace),
    )
    _log_as_mesh_does(access_log)
    server, background = _Server(config), Background()
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    announced = await broker.web.announce(name, url)

    async def renew() -> None:
        nonlocal announced
        while True:
            await asyncio.sleep(RENEW_GATEWAY)
            with contextlib.suppress(Unanswered, NoResponders, StoreError, Error):  # the next one may be in time
                announced = await broker.web.announce(name, url)
                await gateway.places.reread()

    renewing = background.spawn(renew())
    ready()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    renewing.cancel()
    with contextlib.suppress(Unanswered, NoResponders, StoreError, Error):  # it lapses by itself
        await broker.web.withdraw(announced)
    server.should_exit = True
    await serving
    stopping.cancel()
    await background.cancel()
