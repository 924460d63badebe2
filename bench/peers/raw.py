"""JetStream itself, as `raw_limit.py` uses it: it gives arguments back as results, and runs no code."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgpack
from raw_limit import RawClient, connect

from peers.peer import URL, Peer


class Client(Peer):
    async def open(self) -> None:
        self.client = await connect(URL)
        self.raw = RawClient(self.client)
        await self.raw.prepare()

    async def close(self) -> None:
        await self.client.close()

    async def submit(self, kind: str, value: Any) -> Any:
        key = f"r{next(self.raw.numbers)}"
        answer = self.raw.expect(key)
        await self.raw.js.publish(f"calls.app.fn.me.{key}", msgpack.packb(([value], {})))
        return answer

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        answers, accepted = [], []
        for value in values:
            key = f"r{next(self.raw.numbers)}"
            answers.append(self.raw.expect(key))
            body = msgpack.packb(([value], {}))
            accepted.append(await self.raw.js.publish_async(f"calls.app.fn.me.{key}", body))
        await asyncio.gather(*accepted)
        return answers

    async def result(self, handle: Any, timeout: float) -> Any:
        return msgpack.unpackb(await asyncio.wait_for(handle, timeout))

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        return [msgpack.unpackb(body) for body in await asyncio.wait_for(asyncio.gather(*handles), timeout)]
