"""`@mesh.asgi_app`, `@mesh.wsgi_app` and `@mesh.fastapi_endpoint` mark a function that answers HTTP requests.

The mark stays on the Python function, by which a container knows what to make of it; `@app.function` reads its kind
and the number of requests that one container answers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mesh.decorators import mark, marked_function, name_of
from mesh.exception import InvalidError, UnimplementedError

T = TypeVar("T")

MAX_INPUTS = 100  # requests that a container answers at once, where `@mesh.concurrent` does not say otherwise

_MARK = "__mesh_web__"
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Web:
    """How a function answers requests.

    Attributes:
        kind: `asgi` and `wsgi`: it returns an application of that interface; `fastapi`: it is called for each request.
        method, docs: of an endpoint: the HTTP method, and whether FastAPI's pages about it are there.
    """

    kind: str
    method: str = "GET"
    docs: bool = False


def web_of(raw: object) -> Web | None:
    """How a function answers requests; `None` if it does not."""
    found = getattr(raw, "__dict__", {}).get(_MARK)
    return found if isinstance(found, Web) else None


def web_options(raw: object) -> dict[str, Any]:
    """What the mark of a function says, as options of its `FunctionSpec`. `@mesh.concurrent` goes before it."""
    web = web_of(raw)
    return {} if web is None else {"web": web.kind, "max_inputs": MAX_INPUTS}


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
    100 requests at once; in Modal it is one. Stands below `@app.function()`. `get_web_url()` says where it is.

    Raises:
        InvalidError: the function is async or has parameters; it is marked twice, or above `@app.function()`.
    """
    return _application("asgi_app", "asgi", args, label, custom_domains, requires_proxy_auth)


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
    return _application("wsgi_app", "wsgi", args, label, custom_domains, requires_proxy_auth)


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

    Raises:
        InvalidError: the function is a generator (return a `StreamingResponse`); another method than HTTP has; it is
            marked twice, or above `@app.function()`.
    """
    _check_options("fastapi_endpoint", args, label, custom_domains, requires_proxy_auth)
    if method not in _METHODS:
        raise InvalidError(f"fastapi_endpoint: method must be one of {', '.join(_METHODS)}, not {method!r}")

    def decorate(marked: T) -> T:
        raw = _raw("fastapi_endpoint", marked)
        if inspect.isgeneratorfunction(raw) or inspect.isasyncgenfunction(raw):
            raise InvalidError(f"{name_of(raw)!r} is a generator: return a StreamingResponse of one")
        mark(raw, "fastapi_endpoint", _MARK, Web("fastapi", method, docs))
        return marked

    return decorate


def _application(
    decorator: str,
    kind: str,
    args: tuple[object, ...],
    label: str | None,
    custom_domains: Sequence[str] | None,
    requires_proxy_auth: bool,
) -> Callable[[T], T]:
    _check_options(decorator, args, label, custom_domains, requires_proxy_auth)

    def decorate(marked: T) -> T:
        raw = _raw(decorator, marked)
        if inspect.iscoroutinefunction(raw) or inspect.isasyncgenfunction(raw):
            raise InvalidError(
                f"{name_of(raw)!r} is async: make it a plain def that returns the application; what is to be awaited "
                "goes into the application's lifespan"
            )
        if inspect.signature(raw).parameters:
            raise InvalidError(f"{name_of(raw)!r} has parameters, and is called without any: take them out")
        mark(raw, decorator, _MARK, Web(kind))
        return marked

    return decorate


def _check_options(
    decorator: str,
    args: tuple[object, ...],
    label: str | None,
    custom_domains: Sequence[str] | None,
    requires_proxy_auth: bool,
) -> None:
    if args:
        raise InvalidError(f"did you forget the parentheses? Write @mesh.{decorator}(), not @mesh.{decorator}")
    for option, value in (("label", label), ("requires_proxy_auth", requires_proxy_auth)):
        if value:
            raise UnimplementedError(f"{decorator}({option}=…) is not built yet")
    if custom_domains:
        raise UnimplementedError(f"{decorator}(custom_domains=…): point the domain at `mesh gateway` instead")


def _raw(decorator: str, marked: object) -> Callable[..., Any]:
    raw = marked_function(decorator, marked)
    if isinstance(raw, type) or not callable(raw):
        raise InvalidError(f"@mesh.{decorator}() is for functions, and is on {name_of(raw)!r}")
    if "." in name_of(raw).rpartition("<locals>.")[2]:
        raise UnimplementedError(f"{name_of(raw)!r}: @mesh.{decorator}() on methods of a class is not built yet")
    if web_of(raw) is not None:
        raise InvalidError(f"{name_of(raw)!r} has two web decorators: keep one")
    return raw
