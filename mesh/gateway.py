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
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import uvicorn
from starlette.responses import RedirectResponse, Response

from mesh.asgi import Event, Receive, Send, decoder, encode, pack_request
from mesh.background import Background
from mesh.broker import Broker, NoResponders, StoreError, Unanswered
from mesh.broker.flows import Reader, Writer
from mesh.broker.web import RENEW_GATEWAY, Receipt
from mesh.exception import Error, InvalidError
from mesh.flow import SILENCE, Outflow
from mesh.judge import Kind
from mesh.place import DEFAULT_PORT
from mesh.places import Place, Places, Refused, Tokens
from mesh.protocol import new_call_id

logger = logging.getLogger("mesh.gateway")

Scope = MutableMapping[str, Any]

MAX_BODY = 4 << 30  # bytes of a request, by default

_INLINE = 256 << 10  # bytes of a body that goes with the request itself
_PATIENCE = 3.0  # seconds that a worker is looked for: one may just be about to listen
_LOOK_AGAIN = 0.1
_REREAD = 10.0  # seconds between reads of all heads, in case a push was missed
_PORTS = 100  # that are tried, from the usual one on
_PASSED = (
    *("type", "asgi", "http_version", "server", "client", "scheme", "method", "path", "raw_path", "query_string"),
    *("headers", "subprotocols", "extensions"),
)
_STATUS = {  # of what came of a request without an answer
    Kind.SUCCEEDED: (500, "the function ended without an answer"),
    Kind.FAILED: (500, "Internal Server Error"),
    Kind.TIMED_OUT: (504, "the function ran out of time"),
    Kind.CRASHED: (502, "the container of the function ended"),
    Kind.OUT_OF_MEMORY: (502, "the container of the function ran out of memory"),
    Kind.RETURNED: (503, "the worker of the function is stopping"),
    Kind.NOT_STARTED: (503, "the function does not start"),
    Kind.REFUSED: (503, "the function cannot run"),
}


class _Left(Exception):
    """The client has gone."""


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
        visit = _Visit(self._broker, place, told, _limited(scope, receive, self._max_body), send)
        await visit.run()


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


class _Visit:
    """One request on its way to a container, and its answer on the way back."""

    def __init__(self, broker: Broker, place: Place, scope: Scope, receive: Receive, send: Send) -> None:
        self._broker = broker
        self._place = place
        self._scope = scope
        self._receive = receive
        self._send = send
        self._begun = False  # something of the answer has gone to the client
        self._done = False  # all of it has

    async def run(self) -> None:
        """Bring the answer.

        Raises:
            Refused: there is none, and nothing was sent.
        """
        first = await self._receive()
        if first["type"] == "http.disconnect":
            return
        inline = self._scope["type"] == "http" and not first.get("more_body") and len(first.get("body", b"")) <= _INLINE
        deadline = time.monotonic() + self._place.limit
        while not await self._try(first, inline, deadline):  # noqa: ASYNC110 - what is waited for is elsewhere
            await asyncio.sleep(_LOOK_AGAIN)

    async def _try(self, first: Event, inline: bool, deadline: float) -> bool:
        """Give it to a worker; false if it was given back before it began."""
        call = new_call_id(self._broker.token)
        answer = await self._broker.flows.read(call, 0)
        body = None if inline else _Body(self._broker, call)
        listening: asyncio.Task[None] | None = None
        try:
            await self._submit(call, [first] if inline else [], more=not inline)
            listening = asyncio.create_task(self._listen(first, body, answer))
            kind, text = await self._bring(answer, deadline, listening)
        except _Left:
            answer.leave()
            return True
        finally:
            answer.close()
            if listening is not None:
                listening.cancel()
            if body is not None:
                body.close()
        if kind is Kind.RETURNED and inline and not self._begun and time.monotonic() < deadline:
            return False
        self._conclude(kind, text)
        return True

    def _conclude(self, kind: Kind, text: str) -> None:
        """The end, if it is one."""
        if self._begun:
            if not self._done:
                logger.warning("the answer of %s was cut: %s %s", self._place.root, kind, text)
            return  # without its end, which makes the server cut the connection
        status, words = _STATUS.get(kind, (502, "the function was lost"))
        shown = kind in (Kind.NOT_STARTED, Kind.REFUSED, Kind.CRASHED, Kind.OUT_OF_MEMORY) and text
        raise Refused(status, f"{words}: {text}" if shown else words)

    async def _submit(self, call: str, events: list[Event], *, more: bool) -> None:
        """Find a worker for it."""
        place, began = self._place, time.monotonic()
        request = pack_request(self._scope, events, more=more)
        while True:
            try:
                receipt = await self._broker.web.submit(
                    *(place.app, place.function, place.method, call, request), more=more
                )
            except NoResponders:
                receipt = Receipt.AGAIN
            if receipt is Receipt.TAKEN:
                return
            if receipt is Receipt.BUSY or time.monotonic() - began > _PATIENCE:
                busy = receipt is Receipt.BUSY
                raise Refused(503, "too many requests wait" if busy else "no worker runs this function now")
            await asyncio.sleep(_LOOK_AGAIN)

    # --- from the client ---------------------------------------------------------------------------------------------

    async def _listen(self, first: Event, body: _Body | None, answer: Reader) -> None:
        """Pass on what the client sends, until it has gone."""
        event = first
        while True:
            if body is not None:
                await body.send(event)
            if event["type"] == "http.disconnect":
                raise _Left
            if event["type"] == "websocket.disconnect":
                return
            event = await self._receive()

    # --- to the client -----------------------------------------------------------------------------------------------

    async def _bring(self, answer: Reader, deadline: float, listening: asyncio.Task[None]) -> tuple[Kind, str]:
        """Pass on what the application sends; returns how it ended."""
        listening.add_done_callback(lambda _: answer.news.set())
        events = decoder()
        while True:
            answer.news.clear()
            while (chunk := answer.pop()) is not None:
                events.feed(chunk)
                for event in events:
                    await self._pass_on(event)
            if listening.done() and (failed := listening.exception()) is not None:
                answer.leave()
                raise _Left if self._begun else failed
            if answer.error is not None:
                return Kind.EXPIRED, str(answer.error)
            if answer.ended:
                kind, _, text = answer.word.decode().partition("\n")
                return Kind(kind), text
            if not self._begun and time.monotonic() > deadline:
                answer.leave()
                return Kind.TIMED_OUT, ""
            if not await self._heard(answer):
                return Kind.EXPIRED, "its worker fell silent"

    @staticmethod
    async def _heard(answer: Reader) -> bool:
        """Wait for news, which a worker that lives gives every few seconds; false if there is none for too long."""
        try:
            async with asyncio.timeout(SILENCE):
                await answer.news.wait()
        except TimeoutError:
            return False
        return True

    async def _pass_on(self, event: Event) -> None:
        if self._done:
            return
        await self._send(event)
        self._begun = True
        self._done = event["type"] == "http.response.body" and not event.get("more_body", False)


class _Body:
    """What a client sends, as a flow that its container reads."""

    def __init__(self, broker: Broker, call: str) -> None:
        self._flow = Outflow()
        self._granted = asyncio.Event()
        self._writer: Writer = broker.flows.write(call, 0, self._grant, way="in")

    def _grant(self, number: int) -> None:
        self._flow.grant(number)
        self._granted.set()

    async def send(self, event: Event) -> None:
        """Send one event, as the container has room for it."""
        self._writer.begin()
        self._flow.write(encode(event))
        while True:
            self._granted.clear()
            while (chunk := self._flow.take(whole=False)) is not None:
                self._writer.send(chunk)
            if self._flow.is_empty:
                return
            await self._granted.wait()

    def close(self) -> None:
        self._writer.end()


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


class _Server(uvicorn.Server):
    """uvicorn, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


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
        ws="websockets-sansio",
        log_config=None,
        access_log=access_log,
        server_header=False,
        timeout_graceful_shutdown=int(grace),
    )
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
