"""Asking the workers to stop an input, and being asked. Core messages: what is lost is asked again, or found out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection

from nats.aio.msg import Msg

from mesh.broker.connection import Connection, NoResponders, Unanswered, status
from mesh.protocol import CancelRequest
from mesh.topology import Topology

_ANSWER_LIMIT = 0.2  # seconds a worker has to say that it holds the input
_ALL_LIMIT = 1.0  # seconds the workers have to say which inputs of a call they hold; all that are alive answer
_WHOLE = "all"  # in place of an index


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

    async def ask_all(self, call: str, request: CancelRequest, workers: int) -> set[int]:
        """The inputs of a call that workers hold, and stop from now on, as they do what they are given of it later.

        Args:
            workers: how many are alive, and answer; a busy one may take some time.
        """
        held: set[int] = set()
        answers = 0
        all_there = asyncio.Event()

        async def take(message: Msg) -> None:
            nonlocal answers
            held.update(int(index) for index in message.data.decode().split())
            answers += 1
            if answers >= workers or status(message):  # which says that nobody listens
                all_there.set()

        inbox = self._connection.new_inbox()
        subscription = await self._connection.subscribe(inbox, take)
        try:
            subject = self._topology.cancel_subject(call, _WHOLE)
            await self._connection.publish(subject, headers=request.headers(), reply=inbox)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ALL_LIMIT):
                    await all_there.wait()
        finally:
            await subscription.unsubscribe()
        return held

    async def listen(
        self,
        stop: Callable[[str, CancelRequest], bool],
        stop_all: Callable[[str, CancelRequest], Collection[int]],
    ) -> None:
        """Be asked from now on.

        Args:
            stop: called with the id of each input that is to be stopped; says whether it is one of ours.
            stop_all: called with the id of each call of which all is to be stopped; says which inputs are ours.
        """

        async def answer(message: Msg) -> None:
            call, index = message.subject.rsplit(".", 2)[1:]
            request = CancelRequest.decode(message.headers or {})
            if index == _WHOLE:
                held = " ".join(map(str, stop_all(call, request)))
                await self._connection.publish(message.reply, held.encode())
            elif stop(f"{call}.{index}", request) and message.reply:
                await self._connection.publish(message.reply)

        await self._connection.subscribe(self._topology.cancel_subject(), answer)
