"""A user's own server in a container, as an ASGI application that passes everything on to the port it listens on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mesh.asgi import Application, Event, Receive, Send
from mesh.exception import ExecutionError

if TYPE_CHECKING:
    import httpcore

_HOST = "127.0.0.1"
_LOOK = 0.02  # seconds between looks at the port
_KEPT = 1.0  # seconds an idle connection is kept: servers close theirs after some
_OF_A_HOP = (  # headers that are about one connection; what of them is about the body is made anew
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"upgrade"),
    *(b"proxy-connection",),
)


def serve(start: Callable[[], object], port: int, patience: float) -> Application:
    """Have the user start their server; returns when it listens.

    Raises:
        ExecutionError: it does not, in `patience` seconds; or the port belongs to another process all that time.
    """
    port = port or _free_port()
    os.environ["PORT"] = str(port)
    if not _until(lambda: not _listens(port), patience):
        raise ExecutionError(
            f"port {port} is in use by another process on this machine: containers have no network of their own, so "
            "give the function max_containers=1, or use @mesh.web_server(0) and listen on the port that PORT names"
        )
    start()
    if not _until(lambda: _listens(port), patience):
        raise ExecutionError(f"no server listens on port {port} after {patience:g} s (startup_timeout)")
    return _Proxy(port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((_HOST, port)) == 0


def _until(reached: Callable[[], bool], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK)
    return True


class _Left(Exception):
    """The client has gone."""


class _Proxy:
    """The application."""

    def __init__(self, port: int) -> None:
        import httpcore

        self._port = port
        self._pool = httpcore.AsyncConnectionPool(max_connections=None, keepalive_expiry=_KEPT)

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        try:
            await (self._http if scope["type"] == "http" else self._websocket)(scope, receive, send)
        except _Left:
            pass
        except OSError as error:
            self._ended(error)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._pool.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    def _ended(self, error: OSError) -> None:
        """Nobody listens any more: end the container, for a new one to begin."""
        if _listens(self._port):
            raise error
        os.write(2, f"mesh: the server on port {self._port} has ended ({error}), and so does its container\n".encode())
        os._exit(1)

    # --- HTTP --------------------------------------------------------------------------------------------------------

    async def _http(self, scope: Event, receive: Receive, send: Send) -> None:
        import httpcore

        said = asyncio.Event()  # all that the client had to say
        request = httpcore.Request(
            scope["method"],
            httpcore.URL(scheme="http", host=_HOST, port=self._port, target=_target(scope)),
            headers=_headers(scope),
            content=_content(receive, said) if _has_content(scope) else None,
        )
        if not _has_content(scope):
            await receive()
            said.set()
        exchange = asyncio.create_task(self._exchange(request, send))
        leaving = asyncio.create_task(_left(receive, said))
        try:
            await asyncio.wait((exchange, leaving), return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
        finally:
            for task in (exchange, leaving):
                task.cancel()
            await asyncio.wait((exchange, leaving))

    async def _exchange(self, request: httpcore.Request, send: Send) -> None:
        import httpcore

        try:
            answer = await self._pool.handle_async_request(request)
        except httpcore.ConnectError as error:
            raise ConnectionRefusedError(str(error)) from error
        try:
            headers = [(n.lower(), v) for n, v in answer.headers if n.lower() not in (*_OF_A_HOP, b"transfer-encoding")]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            async for piece in answer.aiter_stream():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    # --- WebSockets --------------------------------------------------------------------------------------------------

    async def _websocket(self, scope: Event, receive: Receive, send: Send) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import InvalidHandshake

        await receive()
        headers = [(n.decode("latin1"), v.decode("latin1")) for n, v in _headers(scope) if _is_ours(n)]
        opening = connect(
            f"ws://{_HOST}:{self._port}{_target(scope).decode('latin1')}",
            additional_headers=headers,
            subprotocols=scope.get("subprotocols") or None,
            compression=None,
            user_agent_header=None,
            max_size=None,
            proxy=None,
        )
        try:
            connection = await opening
        except InvalidHandshake:
            await send({"type": "websocket.close", "code": 1000})
            return
        async with connection:
            await send({"type": "websocket.accept", "subprotocol": connection.subprotocol})
            pumps = {
                asyncio.create_task(_to_server(receive, connection)),
                asyncio.create_task(_to_client(connection, send)),
            }
            _, others = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in others:
                pump.cancel()
            await asyncio.wait(pumps)
        for pump in pumps - others:
            pump.result()


async def _to_server(receive: Receive, connection: Any) -> None:
    from websockets.exceptions import ConnectionClosed

    with contextlib.suppress(ConnectionClosed):
        while (event := await receive())["type"] == "websocket.receive":
            text = event.get("text")
            await connection.send(text if text is not None else event["bytes"])
        await connection.close(event.get("code") or 1000, event.get("reason") or "")


async def _to_client(connection: Any, send: Send) -> None:
    async for message in connection:
        await send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})
    await send({"type": "websocket.close", "code": connection.close_code or 1000, "reason": connection.close_reason})


# --- what is passed on -----------------------------------------------------------------------------------------------


def _target(scope: Event) -> bytes:
    """The path below the function's own, and the query."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    path = raw.partition(b"?")[0].removeprefix(scope.get("root_path", "").encode()) or b"/"
    return path + (b"?" + scope["query_string"] if scope["query_string"] else b"")


def _headers(scope: Event) -> list[tuple[bytes, bytes]]:
    client = (scope.get("client") or ("",))[0]
    passed = [(name, value) for name, value in scope["headers"] if name not in _OF_A_HOP]
    return [
        *passed,
        (b"x-forwarded-for", client.encode()),
        (b"x-forwarded-proto", scope["scheme"].encode()),
        (b"x-forwarded-prefix", scope.get("root_path", "").encode()),
    ]


def _is_ours(name: bytes) -> bool:
    """Whether a header is none of those that open a WebSocket."""
    return not name.startswith(b"sec-websocket-") and name != b"host"


def _has_content(scope: Event) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _content(receive: Receive, said: asyncio.Event) -> AsyncGenerator[bytes, None]:
    """What the client sends."""
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise _Left
        more = event.get("more_body", False)
        if event.get("body"):
            yield event["body"]
    said.set()


async def _left(receive: Receive, said: asyncio.Event) -> None:
    """Until the client has gone, once it has said everything."""
    await said.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
