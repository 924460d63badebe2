"""What crosses the wire for a call: its input, its result, and the headers that carry everything the mesh needs.

The body of a message is the user's bytes and is never looked into here. A hand-made call needs no header at all:
without them it is version 1, JSON, current code. Unknown headers are ignored; an unknown major version is an error.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

import msgpack

from mesh.exception import InvalidError, VersionError
from mesh.payload import Blob, Pieces
from mesh.spec import qualified_name

SHARED_POOL = "_"  # the pool of calls without class parameters or options of their own
VERSION = 1  # the major version of the protocol; `Mesh-Version` on every message

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ID_LENGTH = 26  # 10 characters of time, 8 of randomness, 8 of the client's token
_TOKEN_LENGTH = 8
ERROR_TEXT_LIMIT = 500  # characters of `Mesh-Error`
PREVIEW_LIMIT = 120  # characters of `Mesh-Preview`
SEVERAL = ("map", "spawn_map")  # kinds of calls that have several inputs
END = "cancelled"  # in place of an input's number: all that had not ended
_CALL_ID = re.compile(rf"fc-[{_CROCKFORD}]{{{_ID_LENGTH}}}")
_MAJOR = re.compile(r"[0-9]{1,9}")


class State(StrEnum):
    """What has become of a call. The first three pass, the others are final."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline passed before it first started

    @property
    def final(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING, State.RETRYING)


class Format(StrEnum):
    """How user data is encoded; see `serialization`."""

    JSON = "json"
    MSGPACK = "msgpack"
    PICKLE = "pickle"
    BUFFERS = "buffers"  # a pickle, and beside it the large buffers that it refers to


# --- ids -------------------------------------------------------------------------------------------------------------


_PAIRS = [a + b for a in _CROCKFORD for b in _CROCKFORD]


def _crockford(number: int, length: int) -> str:
    """`number` in an even `length` of characters."""
    return "".join([_PAIRS[(number >> 10 * place) & 1023] for place in range(length // 2 - 1, -1, -1)])


_drawn: list[int] = []


def _random_bits() -> int:
    """40 bits nobody can guess, drawn from the system by the hundred."""
    try:
        return _drawn.pop()
    except IndexError:
        many = secrets.token_bytes(5 * 100)
        _drawn.extend(int.from_bytes(many[at : at + 5]) for at in range(5, len(many), 5))
        return int.from_bytes(many[:5])


def _forget_drawn() -> None:
    """After a fork both sides would draw the same."""
    _drawn.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_drawn)


def new_client_token() -> str:
    """The 8 characters that end every call id of one client, so that one subscription brings it all its results."""
    return _crockford(secrets.randbits(5 * _TOKEN_LENGTH), _TOKEN_LENGTH)


def new_call_id(token: str, at: float | None = None) -> str:
    """A new id, `fc-` and 26 characters. It guards the result: who knows it may read it, so it is made of secrets."""
    moment = time.time() if at is None else at
    return f"fc-{_crockford(int(moment * 1000), 10)}{_crockford(_random_bits(), 8)}{token}"


def is_call_id(text: str) -> bool:
    return _CALL_ID.fullmatch(text) is not None


def call_time(call: str) -> float:
    """When the id was made, in seconds since 1970, by its client's clock."""
    number = 0
    for character in call[3:13]:
        number = number << 5 | _CROCKFORD.index(character)
    return number / 1000


def token_of(call: str) -> str:
    """The token of the client that made the call."""
    return call[-_TOKEN_LENGTH:]


def end_key(call: str) -> str:
    """The key of the result that a cancelled call of several inputs has for all of them that have none."""
    return f"{call}.{END}"


def escape(name: str) -> str:
    """An app's or function's name as one token of a subject or key: a dot would be two. `=` is in no name."""
    return name.replace(".", "=")


def unescape(token: str) -> str:
    """The inverse of `escape`."""
    return token.replace("=", ".")


def class_of(function: str) -> str:
    """What is deployed, and has containers: of a method (`Model.ask`) its class, of a function itself."""
    return function.partition(".")[0]


def method_of(function: str) -> str:
    """The method's own name; empty for a function."""
    return function.partition(".")[2]


# --- time and text in headers ----------------------------------------------------------------------------------------


def format_time(seconds: float) -> str:
    """Seconds since 1970 as RFC 3339 in UTC, to the millisecond."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{_format_second(whole)}.{milliseconds:03d}Z"


@lru_cache(maxsize=8)  # calls come many to a second
def _format_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")


def parse_time(text: str) -> float:
    """The inverse of `format_time`; also takes other zones and precisions, as a person may write them."""
    if len(text) == 24 and text[19] == "." and text[23] == "Z" and text[20:23].isdecimal():  # our own, many a second
        return (1000 * _parse_second(text[:19]) + int(text[20:23])) / 1000  # the sum of both would not be exact
    return _parse_moment(text)


@lru_cache(maxsize=8)
def _parse_second(text: str) -> float:
    return _parse_moment(text + "Z")


def _parse_moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise InvalidError(f"not an RFC 3339 time: {text!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def one_line(text: str, limit: int) -> str:
    """`text` as a header can hold it: printable, on one line, cut to `limit` characters."""
    if len(text) <= limit and text.isprintable():
        return text.strip()
    flat = " ".join(text.split())
    clean = "".join(c if c.isprintable() else "�" for c in flat[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _check_version(headers: Mapping[str, str]) -> None:
    text = headers.get("Mesh-Version", "1")
    major = text.partition(".")[0]
    if not _MAJOR.fullmatch(major):
        raise InvalidError(f"Mesh-Version must be a number, not {text!r}")
    if int(major) != VERSION:
        raise VersionError(
            f"the message speaks version {major} of the protocol, this mesh speaks version {VERSION}: "
            f"upgrade the {'older side' if int(major) > VERSION else 'sender'}"
        )


def _number(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidError(f"{name} must be a number, not {text!r}")
    return number


def _time(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    return None if text is None else parse_time(text)


def _format(headers: Mapping[str, str]) -> Format:
    text = headers.get("Mesh-Format", Format.JSON)
    try:
        return Format(text)
    except ValueError:
        raise InvalidError(f"Mesh-Format must be one of {', '.join(Format)}, not {text!r}") from None


def _blob(headers: Mapping[str, str]) -> Blob | None:
    text = headers.get("Mesh-Blob")
    return None if text is None else Blob.parse(text)


# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolKey:
    """Names a pool: the containers of one function, or class, that are alike."""

    app: str
    function: str
    pool: str = SHARED_POOL

    @property
    def path(self) -> str:
        """What is deployed, `app.function`."""
        return f"{self.app}.{self.function}"

    def __str__(self) -> str:
        """The path; of a pool with options or class parameters of its own, with the pool's name behind a `+`."""
        return self.path if self.pool == SHARED_POOL else f"{self.path}+{self.pool}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an input belongs: every part of its subject."""

    app: str
    function: str
    pool: str
    call: str
    index: int = 0

    @property
    def key(self) -> str:
        """The input's id: the key of its result, and what `current_input_id()` returns."""
        return f"{self.call}.{self.index}"

    @property
    def path(self) -> str:
        """`app.function`, as records, logs and the CLI name it."""
        return f"{self.app}.{self.function}"

    @property
    def pool_key(self) -> PoolKey:
        """The pool whose containers run it."""
        return PoolKey(self.app, class_of(self.function), self.pool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One argument set on its way to a container. `body` is the user's, encoded as `format` says.

    Attributes:
        kind: how the call was made: spawn, remote, map, spawn_map, generator, schedule, or nats for one made by hand.
        client: who made it, `host/pid`.
        parent: the input that was running where the call was made.
        deadline: not started later than this, in seconds since 1970.
        result_ttl: seconds the result is kept; `None` means as long as the environment keeps results.
        keep_result: whether a success keeps its value.
        detach: it goes on when its caller, who waits for it, dies.
        resubmit: the publish is a repetition, so the call may have ended already.
        retry_of: the call this one repeats.
        preview: the arguments for human eyes.
        blob: what holds the body, where that is too large for a message.
        pieces: the body before it is submitted, where it has parts that are too large to be copied together.
    """

    address: Address
    body: bytes
    format: Format = Format.JSON
    kind: str = "nats"
    client: str = ""
    parent: str = ""
    deadline: float | None = None
    result_ttl: float | None = None
    keep_result: bool = True
    detach: bool = False
    resubmit: bool = False
    retry_of: str = ""
    preview: str = ""
    blob: Blob | None = None
    pieces: Pieces | None = None

    def headers(self) -> dict[str, str]:
        headers = {"Mesh-Version": str(VERSION), "Mesh-Format": self.format.value, "Mesh-Kind": self.kind}
        for name, text in (
            ("Mesh-Client", self.client),
            ("Mesh-Parent", self.parent),
            ("Mesh-Retry-Of", self.retry_of),
            ("Mesh-Blob", str(self.blob or "")),
        ):
            if text:
                headers[name] = text
        if self.preview:
            headers["Mesh-Preview"] = one_line(self.preview, PREVIEW_LIMIT)
        if self.deadline is not None:
            headers["Mesh-Deadline"] = format_time(self.deadline)
        if self.result_ttl is not None:
            headers["Mesh-Result-TTL"] = f"{self.result_ttl:g}"
        if not self.keep_result:
            headers["Mesh-Keep-Result"] = "0"
        if self.detach:
            headers["Mesh-Detach"] = "1"
        if self.resubmit:
            headers["Mesh-Resubmit"] = "1"
        return headers

    @classmethod
    def decode(cls, address: Address, headers: Mapping[str, str], body: bytes) -> Input:
        """The input in a message.

        Raises:
            InvalidError: a header's value makes no sense.
            VersionError: the message speaks another major version.
        """
        _check_version(headers)
        return cls(
            address=address,
            body=body,
            format=_format(headers),
            kind=headers.get("Mesh-Kind", "nats"),
            client=headers.get("Mesh-Client", ""),
            parent=headers.get("Mesh-Parent", ""),
            deadline=_time(headers, "Mesh-Deadline"),
            result_ttl=_number(headers, "Mesh-Result-TTL"),
            keep_result=headers.get("Mesh-Keep-Result") != "0",
            detach=headers.get("Mesh-Detach") == "1",
            resubmit="Mesh-Resubmit" in headers,
            retry_of=headers.get("Mesh-Retry-Of", ""),
            preview=headers.get("Mesh-Preview", ""),
            blob=_blob(headers),
        )

    @property
    def awaited(self) -> bool:
        """Whether it ends with its caller, who waits for it."""
        return self.generates or (self.kind in ("remote", "map") and not self.detach)

    @property
    def generates(self) -> bool:
        """Whether its items go to its caller as they come. Then it never begins twice: some may have been taken."""
        return self.kind == "generator"


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequest:
    """What a canceller tells the workers of an input. All of it may be left out.

    Attributes:
        reason: ends up in the cancelled result. terminate: kill the container instead of interrupting the input.
    """

    reason: str = "somebody asked for it"
    terminate: bool = False

    def headers(self) -> dict[str, str]:
        headers = {"Mesh-Version": str(VERSION), "Mesh-Reason": one_line(self.reason, ERROR_TEXT_LIMIT)}
        return {**headers, "Mesh-Terminate": "1"} if self.terminate else headers

    @classmethod
    def decode(cls, headers: Mapping[str, str]) -> CancelRequest:
        return cls(
            reason=headers.get("Mesh-Reason", cls().reason),
            terminate=headers.get("Mesh-Terminate") == "1",
        )


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception on its way to the caller.

    Attributes:
        type: qualified name of its class, and `bases` of all it inherits from, itself included.
        text: `str()` of it. traceback: the remote traceback, as Python prints it.
        pickle: its parts (see `serialization`), where they can be pickled and rebuilt; empty where not.
    """

    type: str
    text: str
    traceback: str = ""
    bases: tuple[str, ...] = ()
    pickle: bytes = b""

    def encode(self) -> bytes:
        values: dict[str, Any] = {
            "type": self.type,
            "text": self.text,
            "traceback": self.traceback,
            "bases": list(self.bases),
        }
        if self.pickle:
            values["pickle"] = self.pickle
        return msgpack.packb(values, unicode_errors="surrogatepass")

    @classmethod
    def decode(cls, body: bytes) -> Failure:
        try:
            values = msgpack.unpackb(body, unicode_errors="surrogatepass")
            return cls(
                type=values["type"],
                text=values["text"],
                traceback=values.get("traceback", ""),
                bases=tuple(values.get("bases", ())),
                pickle=values.get("pickle", b""),
            )
        except Exception as error:  # noqa: BLE001 - the bytes may be anybody's
            raise InvalidError(f"the stored failure cannot be read: {error!r}") from None

    @property
    def summary(self) -> str:
        """`Type: text` on one line, as headers, listings and logs show it."""
        return one_line(f"{self.type.removeprefix('builtins.')}: {self.text}", ERROR_TEXT_LIMIT)


def failure(kind: type[BaseException], text: str) -> Failure:
    """A failure that mesh itself reports; the caller rebuilds it from its name alone, `Retries` go by its bases."""
    return Failure(type=qualified_name(kind), text=text, bases=tuple(qualified_name(cls) for cls in kind.__mro__[:-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an input came to. `body` is the value in `format` where it succeeded, else an encoded `Failure`.

    Attributes:
        app, function: what ran; one header, as the key of the function's record.
        error: the failure's summary. code: version of the function that ran. attempt: tries made, from 1.
        started, finished: of the last try, by the worker's clock; 0 where it never started.
        blob: what holds the value where that is too large for a message; of a failure, its pickle.
    """

    state: State
    body: bytes = b""
    format: Format = Format.JSON
    error: str = ""
    app: str = ""
    function: str = ""
    code: str = ""
    worker: str = ""
    attempt: int = 1
    started: float = 0.0
    finished: float = field(default_factory=time.time)
    blob: Blob | None = None

    def headers(self) -> dict[str, str]:
        headers = {
            "Mesh-Version": str(VERSION),
            "Mesh-State": self.state.value,
            "Mesh-Format": self.format.value,
            "Mesh-Attempt": str(self.attempt),
            "Mesh-Finished": format_time(self.finished),
        }
        if self.started:
            headers["Mesh-Started"] = format_time(self.started)
        for name, text in (
            ("Mesh-Function", f"{escape(self.app)}.{escape(self.function)}" if self.app else ""),
            ("Mesh-Code", self.code),
            ("Mesh-Worker", self.worker),
            ("Mesh-Blob", str(self.blob or "")),
        ):
            if text:
                headers[name] = text
        if self.error:
            headers["Mesh-Error"] = one_line(self.error, ERROR_TEXT_LIMIT)
        return headers

    @classmethod
    def decode(cls, headers: Mapping[str, str], body: bytes) -> Result:
        _check_version(headers)
        try:
            state = State(headers.get("Mesh-State", State.SUCCEEDED))
        except ValueError:
            raise InvalidError(f"Mesh-State must be one of {', '.join(State)}, not {headers['Mesh-State']!r}") from None
        app, _, function = headers.get("Mesh-Function", "").partition(".")
        return cls(
            state=state,
            body=body,
            format=_format(headers),
            error=headers.get("Mesh-Error", ""),
            app=unescape(app),
            function=unescape(function),
            code=headers.get("Mesh-Code", ""),
            worker=headers.get("Mesh-Worker", ""),
            attempt=int(_number(headers, "Mesh-Attempt") or 1),
            started=_time(headers, "Mesh-Started") or 0.0,
            finished=_time(headers, "Mesh-Finished") or 0.0,
            blob=_blob(headers),
        )

    @classmethod
    def of_failure(cls, state: State, failure: Failure, **about: Any) -> Result:
        return cls(state=state, body=failure.encode(), format=Format.MSGPACK, error=failure.summary, **about)
