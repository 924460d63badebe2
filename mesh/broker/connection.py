"""One connection to NATS: requests, JetStream publishes and reads, with every wait bounded and every error translated.

On top of nats-py, which reconnects and resubscribes. Ours are the things it does not do: a request fails at once when
the connection breaks instead of waiting for its timeout, waits for the connection to come back before it is sent, and
gets the text of a permission violation, which the server reports apart from the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.object_store import ObjectStore

from mesh import exception
from mesh.background import Background
from mesh.broker.lines import Incoming, Line, encode_headers
from mesh.config import Settings
from mesh.topology import WRITES_ALWAYS

logger = logging.getLogger("mesh.broker")

REQUEST_TIMEOUT = 5.0  # seconds for one answer of the server
HEADROOM = 1024  # bytes kept free below max_payload: one byte over it closes a nats-py connection for good
_INLINE_LIMIT = 512 << 10
_OVERDUE_CHECK = 0.1  # seconds between looks for requests that got no answer
_LARGEST_WINDOW = 16_384  # sequences looked at in one step backwards
_MULTI_GET = 500  # keys in one read; the server answers 413 above 1,024
_ENDING = "the connection is being closed, or its event loop ends"
_TOGETHER = 256  # requests that are under way at once, of many alike
_BATCH = 1000  # messages of an atomic batch, the server's limit

Headers = dict[str, str]


class StoreError(Exception):
    """JetStream refused. `code` is its err_code, which tells the reasons apart better than the HTTP-like status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} (JetStream error {code})")
        self.code = code
        self.text = text


class Unanswered(Exception):
    """No answer: the connection broke or the time ran out. Whether the server did what was asked is not known."""


class NoResponders(Exception):
    """Nobody listens on the subject: no such stream or consumer, or JetStream is off."""


# JetStream error codes we act on.
WRONG_LAST_SEQUENCE = 10071
STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
DELETE_FAILED = 10057
MESSAGE_NOT_FOUND = (10037, 10043)
NAME_IN_USE = 10058
JETSTREAM_DISABLED = (10039, 10076)
EXHAUSTED = frozenset({10002, 10023, 10026, 10028, 10047, 10077, 10122})


@dataclass(frozen=True, slots=True)
class Stored:
    """A message read from a stream."""

    subject: str
    sequence: int
    time: str
    headers: Mapping[str, str]
    body: bytes


class Waiting:
    """What waits for an answer of the server, `timeout` seconds at most."""

    __slots__ = ("deadline", "subject", "timeout")

    def __init__(self, subject: str, timeout: float) -> None:
        self.subject = subject
        self.timeout = timeout
        self.deadline = 0.0

    def answered(self, message: Incoming) -> bool:
        """Take an answer; true if nothing more is waited for."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """No answer comes any more."""
        raise NotImplementedError


class _Request(Waiting):
    """A request under way; `many` collects answers until the one that ends them."""

    __slots__ = ("future", "many")

    def __init__(self, subject: str, timeout: float, many: list[Incoming] | None) -> None:
        super().__init__(subject, timeout)
        self.future: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self.many = many

    def answered(self, message: Incoming) -> bool:
        if self.many is not None and not status(message):
            self.many.append(message)
            return False
        if not self.future.done():
            self.future.set_result(message)
        return True

    def failed(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True)
class _Events:
    """Who is told of what happens to the connection."""

    reconnected: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])
    disconnected: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])
    closed: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])


class Connection:
    """A connection to one mesh's server. Belongs to the event loop that opened it.

    Attributes:
        writes_always: the server says that it writes to disk before it confirms anything.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = Line()
        self._up = asyncio.Event()
        self._inbox = ""
        self._tokens = itertools.count()
        self._waiting: dict[str, Waiting] = {}
        self._background = Background()
        self._errors: list[Exception] = []
        self._deaf = False
        self._loop = asyncio.get_running_loop()
        self.writes_always = False
        self.events = _Events()

    # --- opening and closing -----------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, settings: Settings, name: str) -> Connection:
        """Connect, under a `name` that the server's own listings show.

        Raises:
            ConnectionError: nobody answers there.
            AuthError: the server refuses these credentials.
        """
        connection = cls(settings)
        await connection._connect(name)
        return connection

    async def _connect(self, name: str) -> None:
        servers = [part.strip() for part in self._settings.nats_url.split(",")]
        credentials = {"user_credentials": self._settings.credentials} if self._settings.credentials else {}
        try:
            await self._client.connect(
                servers=servers,
                name=name,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                closed_cb=self._on_closed,
                connect_timeout=3,
                reconnect_time_wait=0.1,  # type: ignore[arg-type]  # annotated as int, used as seconds
                max_reconnect_attempts=1,
                ping_interval=8,
                max_outstanding_pings=2,  # a half-open connection is noticed within 20 s
                pending_size=64 << 20,
                skip_subject_validation=True,  # names are checked where they come in
                **credentials,  # type: ignore[arg-type]
            )
        except Exception as error:
            raise self._connect_error(error) from error
        # The first attempt is short so that a wrong address is told at once; from here on, never give up.
        self._client.options["max_reconnect_attempts"] = -1
        self._client.options["reconnect_time_wait"] = 0.25
        self._inbox = self._client.new_inbox()
        await self._client.listen(f"{self._inbox}.*", self._on_answer)
        self._background.spawn(self._end_overdue())
        self._up.set()
        self._background.spawn(self._ask_when_it_writes())

    async def _ask_when_it_writes(self) -> None:
        """Learn how to publish fast here; either way is right on every server."""
        try:
            answer = json.loads((await self.request("$SYS.REQ.USER.INFO")).data)
            self.writes_always = WRITES_ALWAYS in (answer["server"].get("tags") or ())
        except (Unanswered, NoResponders, exception.Error, ValueError, KeyError):
            self.writes_always = False

    def _connect_error(self, error: Exception) -> exception.Error:
        reasons = " · ".join(dict.fromkeys(str(e) or type(e).__name__ for e in [*self._errors, error]))
        where = self._settings.safe_url
        if "Authorization" in reasons or "auth" in reasons.lower():
            hint = "set user and password in MESH_NATS_URL, or MESH_NATS_CREDENTIALS"
            return exception.AuthError(f"{where} refused these credentials: {hint} ({reasons})")
        hint = "start a mesh with `mesh up`, or set MESH_NATS_URL to where it is"
        return exception.ConnectionError(f"cannot reach {where}: {reasons}. {hint}")

    async def close(self) -> None:
        """Send what is buffered, and close. Doing it twice is harmless."""
        await self._background.cancel()
        with contextlib.suppress(Exception):  # a connection that broke cannot be closed any better
            await asyncio.wait_for(self._client.close(), 2)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside everything else, as long as the connection is open."""
        return self._background.spawn(work)

    @property
    def is_closed(self) -> bool:
        return self._client.is_closed

    @property
    def is_ending(self) -> bool:
        """Whether no answer comes any more, because it is closed, or its event loop ends."""
        return self._deaf

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    @property
    def is_able(self) -> bool:
        """Whether the server can be asked now."""
        return self._up.is_set() and not self._deaf and not self._client.is_closed

    @property
    def needs_credentials(self) -> bool:
        """Whether the server asks its clients who they are."""
        return bool(self._client._server_info.get("auth_required"))  # nats-py shows it nowhere else

    @property
    def server_version(self) -> str:
        return str(self._client._server_info.get("version", ""))

    @property
    def inline_limit(self) -> int:
        """Bytes that body and headers of one message may have together."""
        return min(_INLINE_LIMIT, self._client.max_payload - HEADROOM)

    # --- what nats-py reports ----------------------------------------------------------------------------------------

    async def _on_error(self, error: Exception) -> None:
        text = str(error)
        if "permissions violation" in text.lower():
            logger.warning("%s", text)
            self._refuse(text.removeprefix("nats: "))
        elif not self._up.is_set() and len(self._errors) < 4:
            self._errors.append(error)
        elif self._up.is_set():
            logger.debug("%r", error)

    def _refuse(self, violation: str) -> None:
        """End the requests that the server did not allow: it says so here, and never answers them."""
        refused = violation.lower().partition('"')[2].partition('"')[0]
        self._fail(
            [token for token, waiting in self._waiting.items() if waiting.subject.lower() == refused],
            exception.PermissionDeniedError(f"the server does not allow it: {violation}"),
        )

    def _fail(self, tokens: Iterable[str], error: Exception) -> None:
        for token in tokens:
            waiting = self._waiting.pop(token, None)  # one may end another
            if waiting is not None:
                waiting.failed(error)

    async def _on_disconnected(self) -> None:
        if not self._up.is_set():
            return
        self._up.clear()
        self._fail(list(self._waiting), Unanswered("the connection broke"))
        for tell in self.events.disconnected:
            tell()

    async def _on_reconnected(self) -> None:
        self._errors.clear()
        self._up.set()
        self._background.spawn(self._ask_when_it_writes())
        for tell in self.events.reconnected:
            tell()

    async def _on_closed(self) -> None:
        self._up.set()  # whoever waits for the connection goes on, and learns that it is closed
        for tell in self.events.closed:
            tell()

    def _on_answer(self, message: Incoming) -> None:
        token = message.subject.rpartition(".")[2]
        waiting = self._waiting.get(token)
        if waiting is not None and waiting.answered(message):
            self._waiting.pop(token, None)

    # --- core NATS ---------------------------------------------------------------------------------------------------

    async def publish(self, subject: str, body: bytes = b"", headers: Headers | None = None, reply: str = "") -> None:
        """A core message. While disconnected it is kept and sent after; nobody confirms that it arrived."""
        self._check_size(body, headers)
        self.send(subject, body, encode_headers(headers) if headers else b"", reply)
        if self._client.is_full:
            await self._client.make_room()

    def send(
        self, subject: str, body: bytes = b"", headers: bytes = b"", reply: str = "", *, in_no_hurry: bool = False
    ) -> None:
        """`publish`, for what is known to fit, and never comes in such numbers that it fills the connection.

        Args:
            headers: encoded, by `encode_headers`; see `check_encoded`.
            in_no_hurry: nobody waits for it, so it may wait some milliseconds for something to go with.
        """
        try:
            self._client.send(subject, body, headers, reply, in_no_hurry=in_no_hurry)
        except nats.errors.Error as error:
            raise self._closed_error() if self.is_closed else exception.ConnectionError(str(error)) from error

    def unsend(self, subject: str) -> None:
        """Forget messages without headers, to subjects that start so, that were not sent before the connection broke.

        nats-py keeps what is published from the moment of the break on, and sends it before anybody hears that the
        connection is back.
        """
        client, start = self._client, f"PUB {subject}".encode()
        client._pending = [command for command in client._pending if not command.startswith(start)]
        client._pending_data_size = sum(map(len, client._pending))

    async def subscribe(
        self, subject: str, callback: Callable[[Msg], Awaitable[None]], *, queue: str = ""
    ) -> Subscription:
        """Call `callback` with each message; subscribed again after a reconnect."""
        return await self._client.subscribe(subject, queue, cb=callback, pending_bytes_limit=1 << 30)

    async def listen(self, subject: str, taker: Callable[[Incoming], None], *, queue: str = "") -> Subscription:
        """The same with a plain function, which costs a message much less: called at once, as the message is read."""
        return await self._client.listen(subject, taker, queue)

    def new_inbox(self) -> str:
        """The start of subjects that only this connection listens to."""
        return self._client.new_inbox()

    async def flush(self) -> None:
        """Wait until the server has read everything sent so far."""
        try:
            await self._client.flush(5)
        except nats.errors.Error as error:
            raise Unanswered(str(error)) from error

    def largest_body(self, headers: Headers | None) -> int:
        """Bytes a body may have beside these headers."""
        return self._client.max_payload - HEADROOM - sum(len(k) + 4 * len(v) + 4 for k, v in (headers or {}).items())

    def check_encoded(self, size: int) -> None:
        """See that a message whose body and encoded headers have this size can be sent."""
        if size > self._client.max_payload - HEADROOM:
            raise self._too_large(size)

    def _too_large(self, size: int) -> exception.RequestSizeError:
        return exception.RequestSizeError(
            f"a message of {size:,} bytes is above what the server takes ({self._client.max_payload:,})"
        )

    def _check_size(self, body: bytes, headers: Headers | None) -> None:
        if len(body) < self._client.max_payload // 2:
            return  # our own headers are a few KiB at most
        room = self.largest_body(headers)
        if len(body) > room:
            raise self._too_large(len(body) + self._client.max_payload - HEADROOM - room)

    async def wait_able(self, timeout: float) -> float:
        """Wait until the server can be asked; returns what is left of the timeout.

        Raises:
            Unanswered: it cannot be reached. ClientClosed, AuthError: it never can be, here.
        """
        deadline = self._loop.time() + timeout
        if not self._up.is_set():
            try:
                async with asyncio.timeout_at(deadline):
                    await self._up.wait()
            except TimeoutError:
                raise Unanswered(f"{self._settings.safe_url} cannot be reached") from None
        if self.is_closed:
            raise self._closed_error()
        if self._deaf:
            raise Unanswered(_ENDING)
        return deadline - self._loop.time()

    def _closed_error(self) -> exception.Error:
        reason = str(self._client.last_error or "closed")
        if "authorization" in reason.lower():
            return exception.AuthError(f"{self._settings.safe_url} closed the connection: {reason}")
        return exception.ClientClosed(f"the connection to {self._settings.safe_url} is closed: {reason}")

    async def _exchange(
        self, subject: str, body: bytes, headers: Headers | None, timeout: float, many: list[Incoming] | None = None
    ) -> Incoming:
        if not self.is_able:
            timeout = await self.wait_able(timeout)
        self._check_size(body, headers)
        request = _Request(subject, timeout, many)
        reply = self.expect(request)
        try:
            self._client.send(subject, body, encode_headers(headers) if headers else b"", reply)
            if self._client.is_full:
                await self._client.make_room()
            return await request.future
        except nats.errors.Error as error:
            raise Unanswered(str(error)) from error
        finally:
            self._waiting.pop(reply.rpartition(".")[2], None)

    def expect(self, waiting: Waiting) -> str:
        """Where to have the answer sent that this waits for, from now on."""
        token = str(next(self._tokens))
        waiting.deadline = self._loop.time() + waiting.timeout
        self._waiting[token] = waiting
        return f"{self._inbox}.{token}"

    async def _end_overdue(self) -> None:
        """Give up on requests whose time is over: one task for all of them, because a timer each costs more.

        Where it is cancelled, so is what reads answers: the loop ends, and nothing must wait for one any more.
        """
        try:
            while True:
                await asyncio.sleep(_OVERDUE_CHECK)
                now = self._loop.time()
                for token, waiting in [(token, w) for token, w in self._waiting.items() if w.deadline < now]:
                    self._fail([token], Unanswered(f"no answer within {waiting.timeout:g} s"))
        finally:
            self._deaf = True
            self._fail(list(self._waiting), Unanswered(_ENDING))

    async def request(
        self, subject: str, body: bytes = b"", headers: Headers | None = None, *, timeout: float = REQUEST_TIMEOUT
    ) -> Incoming:
        """One answer to one message.

        Raises:
            Unanswered: the connection broke, or no answer came in time.
            NoResponders: nobody listens.
            PermissionDeniedError: the server does not let this user.
        """
        answer = await self._exchange(subject, body, headers, timeout)
        if status(answer) == "503":
            raise NoResponders(subject)
        return answer

    # --- JetStream ---------------------------------------------------------------------------------------------------

    async def api(self, name: str, values: Mapping[str, Any] | None = None, *, timeout: float = REQUEST_TIMEOUT) -> Any:
        """A request of the JetStream API, `$JS.API.<name>`.

        Raises:
            StoreError: JetStream refused.
            Unanswered, NoResponders: as `request`.
        """
        body = json.dumps(values).encode() if values is not None else b""
        answer = await self.request(f"$JS.API.{name}", body, timeout=timeout)
        return checked(answer)

    async def store(
        self, subject: str, body: bytes, headers: Headers | None = None, *, timeout: float = REQUEST_TIMEOUT
    ) -> dict[str, Any]:
        """Publish into a stream; returns once it is stored.

        Raises:
            StoreError: refused. Unanswered: not known. NoResponders: no stream takes this subject.
        """
        return checked(await self.request(subject, body, headers, timeout=timeout))

    async def store_batch(self, messages: Sequence[tuple[str, bytes, Headers]]) -> dict[str, Any]:
        """Publish up to 1,000 messages into one stream, all or none.

        Raises:
            StoreError: refused, all of them. Unanswered: not known.
        """
        if len(messages) > _BATCH:
            raise exception.RequestSizeError(f"a batch may have {_BATCH} messages, not {len(messages)}")
        batch = f"{self._inbox.rpartition('.')[2]}-{next(self._tokens)}"
        await self.wait_able(REQUEST_TIMEOUT)
        for number, (subject, body, headers) in enumerate(messages[:-1], 1):
            marked = {**headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            await self.publish(subject, body, marked)
        subject, body, headers = messages[-1]
        last = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(len(messages)), "Nats-Batch-Commit": "1"}
        return await self.store(subject, body, {**headers, **last}, timeout=2 * REQUEST_TIMEOUT)

    async def get(self, stream: str, subject: str) -> Stored | None:
        """The last message of a subject, or `None`."""
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}")
        return None if status(answer) else _stored(answer)

    async def get_sequence(self, stream: str, sequence: int) -> Stored | None:
        """The message with a sequence, or `None`."""
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}", json.dumps({"seq": sequence}).encode())
        return None if status(answer) else _stored(answer)

    async def get_many(self, stream: str, subjects: Sequence[str]) -> list[Stored]:
        """The last message of each subject that has one, in the order they were stored. Wildcards are allowed."""
        found: list[Stored] = []
        for start in range(0, len(subjects), _MULTI_GET):
            found += await self._read(stream, {"multi_last": list(subjects[start : start + _MULTI_GET])})
        return found

    async def get_range(self, stream: str, sequence: int, count: int, subject: str = ">") -> list[Stored]:
        """Up to `count` messages from a sequence upwards."""
        return await self._read(stream, {"seq": sequence, "batch": count, "next_by_subj": subject})

    async def count(self, stream: str, subject: str, sequence: int = 1) -> int:
        """How many messages match from a sequence upwards; 40 ms where that is a million."""
        query = {"seq": sequence, "batch": 1, "next_by_subj": subject}
        first = await self._read(stream, query)
        return 1 + int(first[0].headers["Nats-Num-Pending"]) if first else 0

    async def get_newest(self, stream: str, count: int, before: int | None = None, subject: str = ">") -> list[Stored]:
        """Up to `count` messages, newest first; `before` a sequence, to go on from there.

        Reads from the end, in windows that grow: in a queue most sequences may be gone.
        """
        state = (await self.api(f"STREAM.INFO.{stream}"))["state"]
        end = state["last_seq"] if before is None else before - 1
        found: list[Stored] = []
        window = 2 * count
        while end >= state["first_seq"] and len(found) < count and state["messages"]:
            start = max(state["first_seq"], end - window + 1)
            page = await self.get_range(stream, start, end - start + 1, subject)
            found += sorted((m for m in page if m.sequence <= end), key=lambda m: -m.sequence)
            end, window = start - 1, max(window, min(4 * window, _LARGEST_WINDOW))
        return found[:count]

    async def _read(self, stream: str, query: Mapping[str, Any]) -> list[Stored]:
        """A read with several answers. The end is marked by the server; what came before a break is thrown away."""
        many: list[Incoming] = []
        body = json.dumps(query).encode()
        end = await self._exchange(f"$JS.API.DIRECT.GET.{stream}", body, None, 4 * REQUEST_TIMEOUT, many)
        if status(end) == "503":
            raise NoResponders(stream)
        if status(end) not in ("204", "404"):
            raise StoreError(int(status(end)), f"reading {stream}: {end.headers.get('Description', 'refused')}")
        return [_stored(message) for message in many]

    async def subjects(self, stream: str, filter: str) -> dict[str, int]:
        """The subjects of a stream that match, with how many messages each has."""
        found: dict[str, int] = {}
        async for page in self.subject_pages(stream, filter):
            found.update(page)
        return found

    async def subject_pages(self, stream: str, filter: str) -> AsyncGenerator[dict[str, int]]:
        """The same, up to 100,000 at a time."""
        seen = 0
        while True:
            query = {"subjects_filter": filter, "offset": seen}
            info = await self.api(f"STREAM.INFO.{stream}", query, timeout=4 * REQUEST_TIMEOUT)
            page: dict[str, int] = info["state"].get("subjects") or {}
            yield page
            seen += len(page)
            if not page or seen >= info.get("total", 0):
                return

    async def objects(self, bucket: str) -> ObjectStore:
        """An object store. Read from it into a file: nats-py joins bytes in quadratic time."""
        return await self._client.jetstream().object_store(bucket)

    async def delete(self, stream: str, sequence: int) -> bool:
        """Delete one message; false if it was gone. A sequence is never reused, so this cannot hit a successor.

        Its bytes stay in the file until the server writes that anew: to overwrite them takes 10 ms in a long queue, and
        the server does nothing else meanwhile (nats-server 2.15.1: 100 deletes a second, else 20,000).
        """
        try:
            await self.api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence, "no_erase": True})
        except StoreError as error:
            if error.code in MESSAGE_NOT_FOUND or (error.code == DELETE_FAILED and "not permitted" not in error.text):
                return False  # 2.15 says 10057, «no message found» or «stream store EOF», at the ends of the stream
            raise
        return True

    async def delete_many(self, stream: str, sequences: Sequence[int]) -> int:
        """Delete messages, many at once; returns how many were there."""
        gate = asyncio.Semaphore(_TOGETHER)

        async def delete(sequence: int) -> bool:
            async with gate:
                return await self.delete(stream, sequence)

        return sum(await asyncio.gather(*map(delete, sequences)))


def status(message: Incoming | Msg) -> str:
    """The status the server gave instead of a message, such as `404`; empty for a message."""
    return "" if message.data else (message.headers or {}).get("Status", "")


def checked(answer: Incoming) -> dict[str, Any]:
    """What JetStream answered.

    Raises:
        StoreError: it refused.
    """
    try:
        values: dict[str, Any] = json.loads(answer.data)
    except ValueError:
        raise StoreError(0, f"not an answer of JetStream: {answer.data[:100]!r}") from None
    error = values.get("error")
    if error:
        raise StoreError(error.get("err_code", 0), error.get("description", "refused"))
    return values


def _stored(message: Incoming) -> Stored:
    headers = message.headers
    return Stored(
        headers.get("Nats-Subject", ""),
        int(headers.get("Nats-Sequence", 0)),
        headers.get("Nats-Time-Stamp", ""),
        headers,
        message.data,
    )


@contextlib.asynccontextmanager
async def translated(doing: str) -> AsyncGenerator[None]:
    """Turn what JetStream says into mesh's errors, which name what was being done."""
    try:
        yield
    except StoreError as error:
        raise _translate(error, doing) from error
    except Unanswered as error:
        raise exception.ConnectionError(f"{doing}: {error}") from error
    except NoResponders as error:
        raise exception.NotFoundError(
            f"{doing}: the server has no {error} here; create the environment with `mesh init`, or look whether "
            "JetStream is on"
        ) from error


def _translate(error: StoreError, doing: str) -> exception.Error:
    if error.code in EXHAUSTED:
        return exception.ResourceExhaustedError(f"{doing}: {error}")
    if error.code in JETSTREAM_DISABLED:
        return exception.ServiceError(f"{doing}: JetStream is not enabled on this server or for this account ({error})")
    if error.code == WRONG_LAST_SEQUENCE:
        return exception.ConflictError(f"{doing}: somebody else was first ({error})")
    if error.code in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND):
        return exception.NotFoundError(f"{doing}: {error}; create the environment with `mesh init`")
    return exception.ServiceError(f"{doing}: {error}")
