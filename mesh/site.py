"""What of a container answers requests: the user's application, made once, with its lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mesh.asgi import Application, Event, Receive, Send
from mesh.exception import ExecutionError, InvalidError
from mesh.proxy import serve
from mesh.web import Web

_INTERFACE = {"version": "3.0", "spec_version": "2.0"}


class Site:
    """A user's application, and its lifespan.

    Args:
        raw: the user's function. limit: requests at once.
    """

    def __init__(self, raw: Callable[..., Any], web: Web, limit: int) -> None:
        self._raw = raw
        self._web = web
        self._limit = limit

    def make(self) -> None:
        """Have the user make the application. Outside of any loop, which may be what they need for it."""
        self._application = _application(self._raw, self._web, self._limit)
        self._lifespan = _Lifespan(self._application)

    async def begin(self) -> None:
        """Before the first request.

        Raises:
            ExecutionError: the application says that it cannot start.
        """
        await self._lifespan.begin()

    async def end(self) -> None:
        """After the last request.

        Raises:
            ExecutionError: the application says that its end went wrong.
        """
        await self._lifespan.end()

    async def respond(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._application({**scope, "state": dict(self._lifespan.state)}, receive, send)


def _application(raw: Callable[..., Any], web: Web, limit: int) -> Application:
    if web.spec.kind == "fastapi":
        return _endpoint(raw, web)
    if web.spec.kind == "server":
        return serve(raw, web.port, web.startup_timeout)
    made: Any = raw()
    if not callable(made):
        raise InvalidError(f"{raw.__qualname__!r} must return an application, and returned {made!r}")
    application: Any = made
    if web.spec.kind == "wsgi":
        from a2wsgi import WSGIMiddleware

        application = WSGIMiddleware(application, workers=limit)
    return application  # type: ignore[no-any-return]  # it may be anything; its first request tells


def _endpoint(raw: Callable[..., Any], web: Web) -> Application:
    """A FastAPI application with one endpoint."""
    from fastapi import FastAPI  # the user's
    from fastapi.middleware.cors import CORSMiddleware

    application: Any = FastAPI(title=raw.__name__, openapi_url="/openapi.json" if web.docs else None)
    application.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    application.add_api_route("/", raw, methods=[web.method])
    made: Application = application
    return made


class _Lifespan:
    """The lifespan of an application: begun before its first request, ended after its last.

    Attributes:
        state: what the application keeps there for its requests.
    """

    def __init__(self, application: Application) -> None:
        self.state: Event = {}
        self._application = application
        self._task: asyncio.Task[None] | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._answers: asyncio.Queue[Event | None] = asyncio.Queue()

    async def begin(self) -> None:
        """Raises:
        ExecutionError: the application says that it cannot start.
        """
        self._task = asyncio.create_task(self._run())
        await self._go_on("startup")

    async def end(self) -> None:
        """Raises:
        ExecutionError: the application says that its end went wrong.
        """
        if self._task is not None and not self._task.done():
            await self._go_on("shutdown")
            await self._task

    async def _go_on(self, stage: str) -> None:
        self._events.put_nowait({"type": f"lifespan.{stage}"})
        answer = await self._answers.get()
        if answer is not None and answer["type"] == f"lifespan.{stage}.failed":
            raise ExecutionError(f"the application's {stage} failed: {answer.get('message', '')}")

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": _INTERFACE, "state": self.state}
        try:
            await self._application(scope, self._events.get, self._answers.put)
        except BaseException:  # noqa: BLE001 - an application without lifespan may raise anything at this scope
            pass
        finally:
            self._answers.put_nowait(None)
