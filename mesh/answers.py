"""What a run of the user's function is called with, and what it came to: arguments in, an outcome for each input out.

A run is of one input, or of a batch, whose parameters are lists and whose value is one. What is wrong with one input
of a batch, or with its part of the value, is that input's alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mesh import serialization
from mesh.exception import InputCancellation, InvalidError
from mesh.frames import Outcome, Start, Work, result_name
from mesh.payload import Ceiling, Pieces
from mesh.protocol import Failure, Format, State
from mesh.usercode import is_ours


class Run:
    """One run of the user's function.

    Attributes:
        works: its inputs. outcomes: of those that have ended, by number; `None` where there is nothing to say.
    """

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        self.outcomes: dict[int, Outcome | None] = {}

    @property
    def is_batch(self) -> bool:
        return self.works[0].batch > 0

    @property
    def live(self) -> list[Work]:
        """The inputs that are still to be answered, in order."""
        return [work for work in self.works if work.seq not in self.outcomes]


class Answers:
    """Turns inputs into calls of the user's function, and what it did into outcomes."""

    def __init__(self, start: Start) -> None:
        self._function = start.function
        self._result_limit = start.result_limit
        self._ceiling = Ceiling(start.payload_limit, start.payload_reason)
        self._directory = Path(start.directory)

    # --- in ----------------------------------------------------------------------------------------------------------

    def call(self, run: Run, function: Callable[..., Any]) -> Callable[[], Any] | None:
        """The function with the arguments of a run; `None` if those of no input can be used.

        Raises:
            whatever decoding the arguments of an input that runs alone raises.
        """
        if run.is_batch:
            return self._batched_call(run, function)
        args, kwargs = _arguments(run.works[0])
        return functools.partial(function, *args, **kwargs)

    def _batched_call(self, run: Run, function: Callable[..., Any]) -> Callable[[], Any] | None:
        signature = _signature(function)
        columns: dict[str, list[Any]] = {name: [] for name in signature.parameters}
        for work in run.live:
            try:
                bound = self._bound(signature, work)
            except InputCancellation:
                raise
            except BaseException as error:  # noqa: BLE001 - unpickling runs what the caller sent
                run.outcomes[work.seq] = self.failed(work, error)
                continue
            for name, value in bound.items():
                columns[name].append(value)
        if not run.live:
            return None
        named = {p.name: columns.pop(p.name) for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
        return functools.partial(function, *columns.values(), **named)

    def _bound(self, signature: inspect.Signature, work: Work) -> dict[str, Any]:
        args, kwargs = _arguments(work)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(signature.parameters)
            raise InvalidError(f"{self._function!r} is batched and takes ({names}): {error}") from None
        bound.apply_defaults()
        return bound.arguments

    # --- out ---------------------------------------------------------------------------------------------------------

    def succeeded(self, run: Run, value: Any) -> None:
        """The function returned.

        Raises:
            InvalidError, RequestSizeError, SerializationError: what cannot be a result; it fails every input.
        """
        self._check(value)
        if not run.is_batch:
            run.outcomes[run.works[0].seq] = self._outcome(run.works[0], value)
            return
        live = run.live
        if not isinstance(value, list) or len(value) != len(live):
            given = f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
            raise InvalidError(
                f"{self._function!r} is batched, so it must return a list with a result for each of its "
                f"{len(live)} inputs, not {given}"
            )
        for work, one in zip(live, value, strict=True):
            try:
                run.outcomes[work.seq] = self._outcome(work, one)
            except Exception as error:  # noqa: BLE001 - of this value alone
                run.outcomes[work.seq] = self.failed(work, error)

    def _check(self, value: Any) -> None:
        if inspect.iscoroutine(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            kind = type(value).__name__
            value.close() if not inspect.isasyncgen(value) else None
            raise InvalidError(
                f"{self._function!r} returned a {kind}: make it an async function, or await it inside"
                if kind == "coroutine"
                else f"{self._function!r} returned a {kind}; a function that returns one needs is_generator=True"
            )

    def _outcome(self, work: Work, value: Any) -> Outcome:
        if not work.keep_result:
            return Outcome(work.seq, State.SUCCEEDED, Format.JSON, b"null")
        format, body = serialization.encode(value, apart=True)
        if len(body) <= self._result_limit:
            return Outcome(work.seq, State.SUCCEEDED, format, bytes(body))
        self._ceiling.check(f"the result of {self._function!r} takes", len(body))
        self._leave(work, body)
        return Outcome(work.seq, State.SUCCEEDED, format, b"", large=True)

    def _leave(self, work: Work, body: bytes | Pieces) -> None:
        """Leave what is large in a file, where the worker takes it from."""
        path = self._directory / result_name(work.seq)
        try:
            with path.open("wb") as file:
                for part in body.parts if isinstance(body, Pieces) else [body]:
                    file.write(part)
        except BaseException:  # an interrupt, too
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def failed(self, work: Work, error: BaseException) -> Outcome:
        """The outcome of an input for which something was raised."""
        failure = serialization.pack_exception(error, is_ours)
        body = failure.encode()
        if len(body) <= self._result_limit:
            return Outcome(work.seq, State.FAILED, Format.MSGPACK, body)
        short = _shortened(failure, self._result_limit).encode()
        return Outcome(work.seq, State.FAILED, Format.MSGPACK, short, large=self._left_pickle(work, failure))

    def _left_pickle(self, work: Work, failure: Failure) -> bool:
        """Leave the pickle of a large exception in a file; false where that cannot be, and its text has to do."""
        if not 0 < len(failure.pickle) <= self._ceiling.size:
            return False
        try:
            self._leave(work, failure.pickle)
        except OSError:
            return False
        return True

    @staticmethod
    def cancelled(work: Work) -> Outcome:
        """The outcome of an input that was interrupted, or never begun."""
        return Outcome(work.seq, State.CANCELLED, Format.MSGPACK, b"")


def _arguments(work: Work) -> tuple[list[Any], dict[str, Any]]:
    return serialization.decode_arguments(Format(work.format), _mapped(work.file) if work.file else work.body)


def _mapped(file: str) -> memoryview:
    """A file as memory of its own: what is written to it stays here, and what is only read is not copied."""
    with Path(file).open("rb") as opened:
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))


@functools.lru_cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _shortened(failure: Failure, limit: int) -> Failure:
    """A failure whose parts are too large: text and traceback cut, without the pickle of the exception."""
    room = limit // 8  # a character may take 4 bytes
    return Failure(
        type=failure.type,
        text=failure.text[:room],
        traceback=failure.traceback[-room:],
        bases=failure.bases,
    )
