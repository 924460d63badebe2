"""One request that a gateway has: on its way to a container, and its answer on the way back to the client."""

from __future__ import annotations

import asyncio
import logging
import select
import time
from collections.abc import MutableMapping
from typing import Any

from mesh.asgi import Event, Receive, Send, decoder, encode, pack_request
from mesh.broker import Broker
from mesh.broker.exchanges import Exchange, Receipt
from mesh.flow import Outflow
from mesh.judge import Kind
from mesh.places import Place, Refused
from mesh.protocol import PoolKey, new_call_id
from mesh.status import why_nowhere

logger = logging.getLogger("mesh.gateway")

Scope = MutableMapping[str, Any]

_INLINE = 256 << 10  # bytes of a body that goes with the request itself
_PATIENCE = 3.0  # seconds that a worker is looked for: one may just be about to listen
_LOOK_AGAIN = 0.1
_LOOK_AT_CLIENT = 1.0  # seconds between looks whether it is there, while nothing of it is read
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
_SHOWN = (
    Kind.NOT_STARTED,
    Kind.REFUSED,
    Kind.CRASHED,
    Kind.OUT_OF_MEMORY,
    Kind.EXPIRED,
)  # whose text the client is told


class _Left(Exception):
    """The client has gone."""


class Visit:
    """A request, and what its client is told.

    Args:
        transport: of the client's connection; `None` where that is a WebSocket.
    """

    def __init__(
        self,
        broker: Broker,
        place: Place,
        scope: Scope,
        receive: Receive,
        send: Send,
        transport: asyncio.Transport | None,
    ) -> None:
        self._broker = broker
        self._place = place
        self._scope = scope
        self._receive = receive
        self._send = send
        self._transport = transport
        self._news = asyncio.Event()
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
        began = time.monotonic()
        deadline = began + self._place.limit
        clock = asyncio.get_running_loop().call_later(self._place.limit, self._news.set)
        try:
            while not await self._try(first, inline, began, deadline):  # noqa: ASYNC110 - nobody tells of a worker
                await asyncio.sleep(_LOOK_AGAIN)
        finally:
            clock.cancel()

    async def _try(self, first: Event, inline: bool, began: float, deadline: float) -> bool:
        """Give it to a worker; false if none had it, or it was given back before it began."""
        exchange = await self._submit([first] if inline else [], more=not inline)
        listening = asyncio.create_task(self._listen(first, exchange, None if inline else Outflow()))
        listening.add_done_callback(lambda _: self._news.set())
        try:
            kind, text = await self._bring(exchange, deadline, listening)
        except _Left:
            exchange.leave()
            return True
        finally:
            exchange.close()
            listening.cancel()
        if exchange.refused is not None:
            if exchange.refused is Receipt.BUSY or time.monotonic() - began > _PATIENCE:
                busy = exchange.refused is Receipt.BUSY
                raise Refused(503, "too many requests wait" if busy else await self._why_nowhere())
            return False
        if kind is Kind.RETURNED and inline and not self._begun and time.monotonic() < deadline:
            return False
        self._conclude(kind, text)
        return True

    async def _why_nowhere(self) -> str:
        pool = PoolKey(self._place.app, self._place.function)
        reason = why_nowhere(await self._broker.workers.recent(), str(pool))
        return f"no worker runs this function now{f': {reason}' if reason else ''}"

    async def _submit(self, events: list[Event], *, more: bool) -> Exchange:
        place, call = self._place, new_call_id(self._broker.token)
        request = pack_request(self._scope, events, more=more)
        return await self._broker.web.submit(
            *(place.app, place.function, place.method, call, request), more=more, told=self._news.set
        )

    def _conclude(self, kind: Kind, text: str) -> None:
        """The end, if it is one."""
        if self._begun:
            if not self._done:
                logger.warning("the answer of %s was cut: %s %s", self._place.root, kind, text)
            return  # without its end, which makes the server cut the connection
        status, words = _STATUS.get(kind, (502, "the function was lost"))
        raise Refused(status, f"{words}: {text}" if text and kind in _SHOWN else words)

    # --- from the client ---------------------------------------------------------------------------------------------

    async def _listen(self, first: Event, exchange: Exchange, flow: Outflow | None) -> None:
        """Pass on what the client sends, until it has gone."""
        event = first
        while True:
            if flow is not None:
                await self._pass_in(event, exchange, flow)
            if event["type"] == "http.disconnect":
                raise _Left
            if event["type"] == "websocket.disconnect":
                return
            event = await self._receive()

    async def _pass_in(self, event: Event, exchange: Exchange, flow: Outflow) -> None:
        """Send one event, as the container has room for it. Meanwhile nothing is read of the client, who may go."""
        flow.write(encode(event))
        while True:
            flow.grant(exchange.granted)
            while (chunk := flow.take(whole=False)) is not None:
                exchange.send(chunk)
            if flow.is_empty:
                return
            await self._until_granted(exchange, exchange.granted)

    async def _until_granted(self, exchange: Exchange, granted: int) -> None:
        loop = asyncio.get_running_loop()
        more: asyncio.Future[None] = loop.create_future()

        def told() -> None:
            self._news.set()
            if exchange.granted > granted and not more.done():
                more.set_result(None)

        exchange.told = told
        try:
            while not more.done() and exchange.granted == granted:
                await asyncio.wait((more,), timeout=_LOOK_AT_CLIENT)
                if self._client_has_gone():
                    raise _Left
        finally:
            exchange.told = self._news.set

    def _client_has_gone(self) -> bool:
        """Whether the client has closed its connection, told by the system: what it sent before may lie unread."""
        socket = self._transport.get_extra_info("socket") if self._transport is not None else None
        if socket is None or self._transport is None or self._transport.is_closing():
            return self._transport is not None
        poll = select.poll()
        poll.register(socket.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    # --- to the client -----------------------------------------------------------------------------------------------

    async def _bring(self, exchange: Exchange, deadline: float, listening: asyncio.Task[None]) -> tuple[Kind, str]:
        """Pass on what the application sends; returns how it ended."""
        events = decoder()
        while True:
            self._news.clear()
            while (chunk := exchange.pop()) is not None:
                events.feed(chunk)
                for event in events:
                    await self._pass_on(event)
            if exchange.ended:
                kind, _, text = exchange.word.decode().partition("\n")
                return Kind(kind), text
            if exchange.refused is not None:
                return Kind.RETURNED, ""
            if listening.done() and (failed := listening.exception()) is not None:
                exchange.leave()
                raise _Left if self._begun else failed
            if exchange.error is not None:
                return Kind.EXPIRED, str(exchange.error)
            if not self._begun and time.monotonic() >= deadline:
                exchange.leave()
                return Kind.TIMED_OUT, ""
            await self._news.wait()

    async def _pass_on(self, event: Event) -> None:
        if self._done:
            return
        await self._send(event)
        self._begun = True
        self._done = event["type"] == "http.response.body" and not event.get("more_body", False)
