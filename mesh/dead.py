"""Dead letters: what failed for good, with its original arguments, to look at and to send again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from mesh.broker import Broker, Stored
from mesh.exception import ConflictError, InvalidError
from mesh.payload import Blob
from mesh.protocol import SHARED_POOL, Address, Input, is_call_id, new_call_id, parse_time
from mesh.status import Filter

_PAGE = 256  # letters read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """Something that failed for good.

    Attributes:
        number: its sequence in the stream. call, index, app, function: empty where it was no call at all.
        died: when, in seconds since 1970. requeued_as: the call it was last sent again as, if it was.
        preview: its arguments, where they are short and JSON. size: of its body, in bytes.
        blob: the object that holds them, where they are large.
    """

    number: int
    subject: str
    call: str
    index: int
    app: str
    function: str
    state: str
    error: str
    died: float
    requeued_as: str
    preview: str
    size: int
    blob: str = ""

    @property
    def name(self) -> str:
        """What a person calls it by."""
        return self.call or str(self.number)


async def letters(broker: Broker, wanted: Filter) -> AsyncIterator[tuple[Letter, Stored]]:
    """The letters that match, newest first, each with the message it is. Reads page by page from the end."""
    seen: set[str] = set()
    before: int | None = None
    while page := await broker.dead.newest(_PAGE, before):
        before = page[-1].sequence
        for stored in page:
            letter = _letter(broker, stored)
            if stored.subject not in seen and _matches(wanted, letter):
                yield letter, stored
            seen.add(stored.subject)  # what comes after is what it was before it was marked


def _matches(wanted: Filter, letter: Letter) -> bool:
    return wanted.matches(
        app=letter.app, function=letter.function, state=letter.state, error=letter.error, at=letter.died
    )


async def find(broker: Broker, name: str) -> list[tuple[Letter, Stored]]:
    """The letters of a call, or the one with a number; none if there is none."""
    if is_call_id(name):
        found = await broker.dead.of_call(name)
    elif name.isdigit() and (stored := await broker.dead.at(int(name))) is not None:
        found = [stored]
    else:
        found = []
    return [(_letter(broker, stored), stored) for stored in found]


def _letter(broker: Broker, stored: Stored) -> Letter:
    app, function, call, index = broker.topology.parse_dead(stored.subject) or ("", "", "", 0)
    headers = stored.headers
    blob = _blob(stored)
    return Letter(
        number=stored.sequence,
        subject=stored.subject,
        call=call,
        index=index,
        app=app,
        function=function,
        state=headers.get("Mesh-State", "failed"),
        error=headers.get("Mesh-Error", ""),
        died=_died(stored),
        requeued_as=headers.get("Mesh-Requeued-As", ""),
        preview=headers.get("Mesh-Preview", ""),
        size=blob.size if blob else len(stored.body),
        blob=blob.name if blob else "",
    )


def _blob(stored: Stored) -> Blob | None:
    try:
        return Blob.parse(stored.headers["Mesh-Blob"]) if "Mesh-Blob" in stored.headers else None
    except InvalidError:
        return None  # it may be why it failed


def _died(stored: Stored) -> float:
    try:
        return parse_time(stored.headers.get("Mesh-Died", stored.time))
    except InvalidError:
        return parse_time(stored.time)


async def requeue(broker: Broker, letter: Letter, stored: Stored, *, again: bool = False) -> str:
    """Send a letter's call again, as a new call that names the old one; returns the new one's id.

    The letter stays, marked with that id, and so does the old result. The mark is written first, so that of two who do
    this at once one is told.

    Raises:
        ConflictError: it was sent again before, and `again` does not say to do so. InvalidError: it cannot be.
        NotFoundError, DataLossError: its large arguments are not stored any more, or are not what was.
    """
    if not letter.call:
        raise InvalidError(f"letter {letter.number} is no call, so it cannot be sent again: {letter.error}")
    if "Mesh-Truncated" in stored.headers:
        raise InvalidError(f"the arguments of {letter.call} were too large to be kept, so it cannot be sent again")
    if letter.requeued_as and not again:
        raise ConflictError(f"{letter.call} was sent again before, as {letter.requeued_as}; --again does it once more")
    pool = stored.headers.get("Mesh-Pool", SHARED_POOL)
    original = Input.decode(
        Address(letter.app, letter.function, pool, letter.call, letter.index), stored.headers, stored.body
    )
    if original.generates:
        raise InvalidError(f"{letter.call} called a generator: only whoever reads it can call it again, by remote_gen")
    fresh = replace(
        original,
        address=Address(letter.app, letter.function, pool, new_call_id(broker.token)),
        kind="spawn",  # the first caller does not wait for it any more
        client=broker.client,
        deadline=None,
        resubmit=False,
        retry_of=letter.call,
    )
    if original.blob is not None:  # each call has its own, which go with it
        fresh = replace(fresh, blob=await broker.blobs.copy(original.blob, fresh.address.key))
    try:
        await broker.dead.mark(stored, fresh.address.call)
    except ConflictError:
        if fresh.blob is not None:
            await broker.blobs.delete(fresh.blob.name)
        raise
    await broker.calls.submit(fresh)
    return fresh.address.call


async def purge(broker: Broker, letter: Letter) -> bool:
    """Forget a letter, with its arguments; false if it was gone."""
    if not await broker.dead.delete(letter.number):
        return False
    if letter.blob:
        await broker.blobs.delete(letter.blob)
    return True
