"""`@mesh.asgi_app`, `@mesh.wsgi_app`, `@mesh.fastapi_endpoint` and `@mesh.web_server` mark what answers HTTP requests.

The mark stays on the Python function, by which a container knows what to make of it; `@app.function` and `@app.cls`
read what of it is recorded, and the number of requests that one container answers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mesh.decorators import is_method, mark, marked_function, name_of
from mesh.exception import InvalidError
from mesh.spec import check_number, check_whole
from mesh.webspec import WebSpec, check_domains, check_label

T = TypeVar("T")

MAX_INPUTS = 100  # requests that a container answers at once, where `@mesh.concurrent` does not say otherwise

_MARK = "__mesh_web__"
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Web:
    """How a function answers requests.

    Attributes:
        spec: what is recorded of it.
        method, docs: of an endpoint: the HTTP method, and whether FastAPI's pages about it are there.
        port, startup_timeout: of a server: where it listens, and how many seconds it has until then.
    """

    spec: WebSpec
    method: str = "GET"
    docs: bool = False
    port: int = 0
    startup_timeout: float = 0.0


def web_of(raw: object) -> Web | None:
    """How a function answers requests; `None` if it does not."""
    found = getattr(raw, "__dict__", {}).get(_MARK)
    return found if isinstance(found, Web) else None


def web_options(raw: object) -> dict[str, Any]:
    """What the mark of a function says, as options of its `FunctionSpec`. `@mesh.concurrent` goes before it."""
    web = web_of(raw)
    return {} if web is None else {"web": web.spec, "max_inputs": MAX_INPUTS}


# --- what users write ------------------------------------------------------------------------------------------------


def asgi_app(
    *args: object,
    label: str | None = None,
    custom_domains: Sequence[str] | None = None,
    requires_proxy_auth: bool = False,
) -> Callable[[T], T]:
    """Serve the ASGI application that the function returns: FastAPI, Starlette, Django and others.

    The function takes nothing, and is called once in each container; what it imports need not be installed where it
    is deployed. The application's lifespan begins before the first request and ends with the container. Each request
    has the function's `timeout`. Where `@mesh.concurrent` (above or below) does not say otherwise, a container answers
    100 requests at once; in Modal it is one. Stands below `@app.function()`, or on a method of a class, which is called
    after its enter hooks; `get_web_url()` says where it is.

    Args:
        label: what the name of a host begins with that leads to it, `<label>.example.com` for example, whatever name
            the gateway is reached by; made of the names of app and function by default. `-dev` is added in single runs.
            Two functions cannot have one label: the later deploy is refused.
        custom_domains: whole names of hosts that lead to it, too. They must lead to the gateway; encryption is up to
            what stands before that. Single runs have none.
        requires_proxy_auth: let only those in who send the headers `Mesh-Key` and `Mesh-Secret` of a token made with
            `mesh proxy-token create`; others get 401.

    Raises:
        InvalidError: the function is async or has parameters; it is marked twice, or above `@app.function()`; a label
            or a domain that cannot be one.
    """
    spec = _spec("asgi_app", "asgi", args, label, custom_domains, requires_proxy_auth)
    return _application("asgi_app", Web(spec=spec))


def wsgi_app(
    *args: object,
    label: str | None = None,
    custom_domains: Sequence[str] | None = None,
    requires_proxy_auth: bool = False,
) -> Callable[[T], T]:
    """Serve the WSGI application that the function returns, such as Flask's or Django's: a thread for each request.

    All else is as with `@mesh.asgi_app()`.

    Raises:
        InvalidError: as with `@mesh.asgi_app()`.
    """
    spec = _spec("wsgi_app", "wsgi", args, label, custom_domains, requires_proxy_auth)
    return _application("wsgi_app", Web(spec=spec))


def web_server(
    port: int,
    *,
    startup_timeout: float = 5.0,
    label: str | None = None,
    custom_domains: Sequence[str] | None = None,
    requires_proxy_auth: bool = False,
) -> Callable[[T], T]:
    """Serve what listens on a port: a server of any kind, which the function starts, in a process or in a thread.

    The function takes nothing, is called once in each container, and returns when it has started the server, which
    must listen on 127.0.0.1 or on all addresses, and is never reached but through the gateway's requests: HTTP/1.1 and
    WebSockets, streamed both ways. It is given paths as they are below the function's own, which is in the header
    `X-Forwarded-Prefix`. It ends with the container; where it ends before, the container does, and another one starts.

    Containers have no network of their own here: two of one worker cannot listen on one port. The second waits until
    it is free, so give such a function `max_containers=1`, or a port of 0: then the server must listen on the port
    that the variable `PORT` names, another one in each container. All else is as with `@mesh.asgi_app()`.

    Args:
        port: where the server listens: 1 to 65535, or 0.
        startup_timeout: seconds until it listens at most; after that, the container has failed to start.

    Raises:
        InvalidError: as with `@mesh.asgi_app()`; a port or a time that cannot be one.
    """
    if callable(port):
        raise InvalidError("web_server needs a port: write @mesh.web_server(8000), not @mesh.web_server")
    check_whole("web_server: port", port, 0, 65535)
    check_number("web_server: startup_timeout", startup_timeout, 0.1, 86_400)
    spec = _spec("web_server", "server", (), label, custom_domains, requires_proxy_auth)
    return _application("web_server", Web(spec=spec, port=port, startup_timeout=startup_timeout))


def fastapi_endpoint(
    *args: object,
    method: str = "GET",
    label: str | None = None,
    custom_domains: Sequence[str] | None = None,
    docs: bool = False,
    requires_proxy_auth: bool = False,
) -> Callable[[T], T]:
    """Call the function for each request, with arguments out of it by FastAPI's rules, and answer with its value.

    FastAPI must be installed where its containers run. Pages of any origin may call it (CORS is open).

    Args:
        method: the HTTP method it answers to. docs: show FastAPI's pages at `/docs`.
        label, custom_domains, requires_proxy_auth: as with `@mesh.asgi_app()`.

    Raises:
        InvalidError: the function is a generator (return a `StreamingResponse`); another method than HTTP has; it is
            marked twice, or above `@app.function()`.
    """
    spec = _spec("fastapi_endpoint", "fastapi", args, label, custom_domains, requires_proxy_auth)
    if method not in _METHODS:
        raise InvalidError(f"fastapi_endpoint: method must be one of {', '.join(_METHODS)}, not {method!r}")

    def decorate(marked: T) -> T:
        raw = _raw("fastapi_endpoint", marked)
        if inspect.isgeneratorfunction(raw) or inspect.isasyncgenfunction(raw):
            raise InvalidError(f"{name_of(raw)!r} is a generator: return a StreamingResponse of one")
        mark(raw, "fastapi_endpoint", _MARK, Web(spec=spec, method=method, docs=docs))
        return marked

    return decorate


def _application(decorator: str, web: Web) -> Callable[[T], T]:
    def decorate(marked: T) -> T:
        raw = _raw(decorator, marked)
        if inspect.iscoroutinefunction(raw) or inspect.isasyncgenfunction(raw):
            raise InvalidError(
                f"{name_of(raw)!r} is async: make it a plain def that returns the application; what is to be awaited "
                "goes into the application's lifespan"
            )
        if list(inspect.signature(raw).parameters)[is_method(raw) :]:
            raise InvalidError(f"{name_of(raw)!r} has parameters, and is called without any: take them out")
        mark(raw, decorator, _MARK, web)
        return marked

    return decorate


def _spec(
    decorator: str,
    kind: str,
    args: tuple[object, ...],
    label: str | None,
    custom_domains: Sequence[str] | None,
    requires_proxy_auth: bool,
) -> WebSpec:
    if args:
        raise InvalidError(f"did you forget the parentheses? Write @mesh.{decorator}(), not @mesh.{decorator}")
    return WebSpec(
        kind=kind,
        label=check_label(decorator, label),
        domains=check_domains(decorator, custom_domains),
        protected=bool(requires_proxy_auth),
    )


def _raw(decorator: str, marked: object) -> Callable[..., Any]:
    raw = marked_function(decorator, marked)
    if isinstance(raw, type) or not callable(raw):
        raise InvalidError(f"@mesh.{decorator}() is for functions and methods, and is on {name_of(raw)!r}")
    if web_of(raw) is not None:
        raise InvalidError(f"{name_of(raw)!r} has two web decorators: keep one")
    return raw
