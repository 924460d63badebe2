"""Asking the workers to stop an input, and being asked. Core messages: what is lost is asked again, or found out."""

from __future__ import annotations

from collections.abc import Callable

from nats.aio.msg import Msg

from mesh.broker.connection import Connection, NoResponders, Unanswered
from mesh.protocol import CancelRequest
from mesh.topology import Topology

_ANSWER_LIMIT = 0.2  # seconds a worker has to say that it holds the input


class Cancels:
    """The subjects that every worker listens on."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology

    async def ask(self, call: str, index: int, request: CancelRequest) -> bool:
        """Whether a worker holds the input, and stops it from now on. No answer means no, or that it was lost."""
        subject = self._topology.cancel_subject(call, str(index))
        try:
            await self._connection.request(subject, headers=request.headers(), timeout=_ANSWER_LIMIT)
        except (NoResponders, Unanswered):
            return False
        return True

    async def listen(self, stop: Callable[[str, CancelRequest], bool]) -> None:
        """Call `stop` with the id of each input that is to be stopped; it says whether it is one of ours."""

        async def answer(message: Msg) -> None:
            key = ".".join(message.subject.rsplit(".", 2)[1:])
            if stop(key, CancelRequest.decode(message.headers or {})) and message.reply:
                await self._connection.publish(message.reply)

        await self._connection.subscribe(self._topology.cancel_subject(), answer)
