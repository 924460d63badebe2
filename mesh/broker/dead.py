"""The stream of dead letters."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.broker.connection import WRONG_LAST_SEQUENCE, Connection, Headers, Stored, StoreError
from mesh.exception import ConflictError, RequestSizeError
from mesh.topology import Topology

_LONGEST_ERROR = 80  # characters of an error, where the letter has no room for more


class Dead:
    """Inputs that failed for good, as messages with their original headers and bodies."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology

    async def bury(self, subject: str, headers: Mapping[str, str], body: bytes, death: Headers) -> None:
        """Store a copy of an input, with how it died; the same one twice is one."""
        try:
            await self._store(subject, body, _own(headers) | death, last=0)
        except RequestSizeError:
            # The original was as large as a message may be. Its headers go before its body does.
            short = {name: text[:_LONGEST_ERROR] for name, text in death.items()}
            short |= {name: headers[name] for name in ("Mesh-Version", "Mesh-Format") if name in headers}
            cut = short | {"Mesh-Truncated": str(len(body))}
            room = self._connection.largest_body(cut | _after(0))
            await self._store(subject, body[:room], cut if len(body) > room else short, last=0)

    async def _store(self, subject: str, body: bytes, headers: Headers, last: int) -> None:
        try:
            await self._connection.store(subject, body, headers | _after(last))
        except StoreError as error:
            if error.code != WRONG_LAST_SEQUENCE or last:
                raise

    async def mark(self, stored: Stored, call: str) -> None:
        """Note on a letter that it was sent again as `call`: a new copy, then the old one goes.

        Raises:
            ConflictError: somebody else changed the letter meanwhile.
        """
        headers = _own(stored.headers) | {"Mesh-Requeued-As": call}
        try:
            await self._store(stored.subject, stored.body, headers, last=stored.sequence)
        except StoreError as error:
            if error.code == WRONG_LAST_SEQUENCE:
                raise ConflictError("somebody else has just sent this letter again") from error
            raise
        await self.delete(stored.sequence)

    async def of_call(self, call: str) -> list[Stored]:
        """The letters of one call: one for each of its inputs that failed for good."""
        return await self._connection.get_many(self._topology.dead, [self._topology.dead_filter(call=call)])

    async def at(self, sequence: int) -> Stored | None:
        """The letter with a number, which is how one is named that is no call's."""
        return await self._connection.get_sequence(self._topology.dead, sequence)

    async def delete(self, sequence: int) -> bool:
        return await self._connection.delete(self._topology.dead, sequence)

    async def newest(self, count: int, before: int | None = None) -> list[Stored]:
        """Letters, newest first; `before` a sequence, to go on from there."""
        return await self._connection.get_newest(self._topology.dead, count, before)


def _after(sequence: int) -> Headers:
    """The condition of a write: this is the newest letter of its subject; 0 means that there is none."""
    return {"Nats-Expected-Last-Subject-Sequence": str(sequence)}


def _own(headers: Mapping[str, str]) -> Headers:
    """Without what the server and conditional publishes add."""
    return {name: text for name, text in headers.items() if not name.startswith("Nats-")}
