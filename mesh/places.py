"""Which web function a request is for: told by its path, `/<app>/<function>/…`, or by the name of its host."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import PlainTextResponse

from mesh.broker import Broker
from mesh.place import path_of
from mesh.protocol import class_of, method_of
from mesh.records import AppHead, AppState, FunctionRecord, HostRecord
from mesh.webspec import DEV

_TRUST = 5.0  # seconds that tokens are taken for those that there are


class Refused(Exception):
    """There is no answer of an application; this one stands for it."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        retry = {"retry-after": "1"} if status == 503 else {}
        self.response = PlainTextResponse(f"{text}\n", status, {**retry, **(headers or {})})


@dataclass(frozen=True, slots=True)
class Place:
    """A web function, and where it is in a path."""

    app: str
    function: str  # or class
    method: str
    root: str
    limit: float  # seconds until it must have begun to answer
    protected: bool


class Places:
    """The web functions that there are."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._heads: dict[str, AppHead] = {}
        self._hosts: dict[str, HostRecord] = {}
        self._hosts_known = False
        self._records: dict[tuple[str, str, str], FunctionRecord | None] = {}

    async def watch(self) -> None:
        """Know of deployments from now on."""
        await self._broker.registry.watch(self._on_head, lambda subject, error: None)
        await self.reread()

    async def reread(self) -> None:
        """Read everything anew, in case that a push was missed."""
        self._heads = await self._broker.registry.heads()
        self._hosts_known = False

    def _on_head(self, head: AppHead) -> None:
        self._heads[head.app] = head
        self._hosts_known = False

    async def find(self, path: str, host: str) -> Place:
        """The function that a request is for. The name of a host goes before the path.

        Raises:
            Refused: there is none.
        """
        claim = await self._claim(host)
        if claim is not None:
            place = await self._place(self._heads.get(claim.app), claim.function, "", host)
            if place is not None:
                return place
        _, name, function = (*path.split("/", 3), "", "")[:3]
        head = self._head(name)
        root = path_of(head.app, head.name, function) if head is not None else ""
        place = await self._place(head, function, root, "")
        if place is None:
            raise Refused(404, f"no web function at /{name}/{function}" if function else "a path is /<app>/<function>/")
        return place

    async def _place(self, head: AppHead | None, function: str, root: str, host: str) -> Place | None:
        """A function where it is deployed now, and still wants the name of the host that led to it."""
        record = await self._record(head, class_of(function)) if head is not None else None
        web = record.spec.webs.get(function) if record is not None else None
        if head is None or record is None or web is None:
            return None
        if host and not {host, host.partition(".")[0]} & set(web.hosts(head.app, head.name, function)):
            return None
        limit = record.spec.timeout + record.spec.start_limit
        return Place(head.app, class_of(function), method_of(function), root, limit, web.protected)

    async def _claim(self, host: str) -> HostRecord | None:
        """What a host's name leads to: the whole of it, or its first part."""
        label, _, domain = host.partition(".")
        if not domain:
            return None
        if not self._hosts_known:
            self._hosts_known = True
            self._hosts = await self._broker.hosts.all()
        return self._hosts.get(host) or self._hosts.get(label)

    def _head(self, name: str) -> AppHead | None:
        """An app by the name it has in a path; of several single runs the newest."""
        deployed = self._heads.get(name)
        if deployed is not None and deployed.state is AppState.DEPLOYED:
            return deployed
        if not name.endswith(DEV):
            return None
        runs = [h for h in self._heads.values() if h.state is AppState.EPHEMERAL and h.name + DEV == name]
        return max(runs, key=lambda head: head.deployed_at, default=None)

    async def _record(self, head: AppHead, function: str) -> FunctionRecord | None:
        version = head.functions.get(function)
        if version is None:
            return None
        key = (head.app, function, version)
        if key not in self._records:
            found = await self._broker.registry.function(head.app, function)
            self._records[key] = found if found is not None and found.spec.webs else None
        return self._records[key]


# --- who is let in ---------------------------------------------------------------------------------------------------


def new_token() -> tuple[str, str]:
    """A key, and the secret that belongs to it."""
    return f"mk-{secrets.token_hex(8)}", f"ms-{secrets.token_urlsafe(32)}"


def digest_of(secret: str) -> str:
    """What is stored of a token's secret, which is random, and long enough that no salt is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Tokens:
    """The proxy tokens that open functions with `requires_proxy_auth`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._digests: Mapping[str, str] = {}
        self._read = 0.0

    async def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Let a request in.

        Raises:
            Refused: it shows no token.
        """
        if time.monotonic() - self._read > _TRUST:
            self._digests = await self._broker.web.tokens()
            self._read = time.monotonic()
        key = headers.get(b"mesh-key", b"").decode("latin1")
        shown = digest_of(headers.get(b"mesh-secret", b"").decode("latin1"))
        if not secrets.compare_digest(self._digests.get(key, ""), shown):
            raise Refused(401, "send the headers Mesh-Key and Mesh-Secret of a token made by `mesh proxy-token create`")
