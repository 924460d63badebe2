"""The inside of a container of a web function: requests go to the user's application, its answers come back.

A request is a `Work` whose body holds the ASGI scope and the first events for the application; further ones come as
`Feed` frames, and what the application sends goes out as the chunks of a flow: msgpack, one event after the other. All
of this happens on the container's loop. Credit works both ways, so neither a slow client nor a slow application makes
the other fill anybody's memory.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgpack

from mesh.flow import WINDOW, Outflow
from mesh.frames import Chunk, Credit, Feed, Gone, Work
from mesh.wire import Wire

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]

_FEW = 4  # events an application may have before it, and more are asked for


def encode(event: Event) -> bytes:
    """One event as bytes of a flow."""
    packed: bytes = msgpack.packb(event, default=_plain)
    return packed


def _plain(value: Any) -> Any:
    """Frameworks give headers as any iterable, and bodies as anything that holds bytes."""
    return bytes(value) if isinstance(value, bytearray | memoryview) else list(value)


def decoder() -> msgpack.Unpacker:
    """Finds the events in the chunks of a flow."""
    return msgpack.Unpacker(max_buffer_size=0, raw=False)


def pack_request(scope: Mapping[str, Any], events: list[Event], *, more: bool) -> bytes:
    """The body of a request's `Work`. `more`: other events come after these."""
    return encode({"scope": dict(scope), "events": events, "more": more})


# --- requests --------------------------------------------------------------------------------------------------------


class Requests:
    """The requests that this container answers."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._live: dict[int, _Request] = {}
        wire.on_credit = wire.on_request = self._on_frame

    def _on_frame(self, frame: Credit | Feed | Gone) -> None:
        request = self._live.get(frame.seq)
        if request is not None:
            request.on_frame(frame)

    async def answer(self, work: Work, respond: Application) -> None:
        """Have the application answer one request. What it raises is shown as the container's output."""
        request = self._live[work.seq] = _Request(self._wire, work)
        try:
            await respond(request.scope, request.receive, request.send)
            await request.finish()
        except Exception:  # whoever made the request learns only that it failed
            sys.stderr.write(traceback.format_exc())
            await request.finish()
            raise
        finally:
            del self._live[work.seq]


class _Request:
    """One request, as its application has it."""

    def __init__(self, wire: Wire, work: Work) -> None:
        told = msgpack.unpackb(work.body)
        self.scope = _scope(told["scope"])
        self._wire = wire
        self._seq = work.seq
        self._events: deque[Event] = deque(told["events"])
        self._more: bool = told["more"]
        self._decoder = decoder()
        self._fed = self._allowed = 0
        self._out = Outflow()
        self._start: Event | None = None
        self._gone = False
        self._news = asyncio.Event()

    def on_frame(self, frame: Credit | Feed | Gone) -> None:
        """Something about it came from the worker."""
        match frame:
            case Credit():
                self._out.grant(frame.number)
                self._flush()
            case Feed():
                self._fed += 1
                self._decoder.feed(frame.body)
                self._events.extend(self._decoder)
            case Gone():
                self._gone = True
        self._news.set()

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Wait until what comes from the worker makes it true, or the client has gone."""
        while not reached() and not self._gone:
            self._news.clear()
            await self._news.wait()

    # --- in ----------------------------------------------------------------------------------------------------------

    async def receive(self) -> Event:
        """ASGI's `receive`."""
        self._ask()
        while not self._events:
            news = self._news
            if self._gone:
                return self._disconnect()
            news.clear()
            await news.wait()
        event = self._events.popleft()
        self._ask()
        return event

    def _ask(self) -> None:
        """Allow more chunks, when the application has little left before it."""
        if self._more and len(self._events) <= _FEW and self._allowed - self._fed <= WINDOW // 2:
            self._allowed = self._fed + WINDOW
            self._wire.send(Credit(self._seq, self._allowed))

    def _disconnect(self) -> Event:
        if self.scope["type"] == "websocket":
            return {"type": "websocket.disconnect", "code": 1006}
        return {"type": "http.disconnect"}

    # --- out ---------------------------------------------------------------------------------------------------------

    async def send(self, event: Event) -> None:
        """ASGI's `send`. The beginning of a response waits for the first of its body.

        Raises:
            OSError: the client has gone.
        """
        if self._gone:
            raise OSError("the client has gone")
        if event["type"] == "http.response.start":
            self._start = event
            return
        start, self._start = self._start, None
        if start is not None:
            self._out.write(encode(start))
        self._out.write(encode(event))
        self._flush()
        await self._until(lambda: not self._out.is_full)

    def _flush(self) -> None:
        while (chunk := self._out.take(whole=False)) is not None:
            self._wire.send(Chunk(self._seq, chunk))

    async def finish(self) -> None:
        """Wait until all has been sent."""
        await self._until(lambda: self._out.is_empty)


def _scope(told: Event) -> Event:
    """A scope as it was before it travelled: pairs are tuples in ASGI."""
    scope = dict(told)
    scope["headers"] = [(name, value) for name, value in told["headers"]]
    for end in ("client", "server"):
        if scope.get(end) is not None:
            scope[end] = tuple(scope[end])
    return scope
