"""What JetStream itself allows: publish, pull, conditional result, ack, push; no user code and no isolation.

The yardstick for everything else in this folder: the same server, the same durability, the same machine, the same
minute. One client process and one worker process, both nothing but nats-py on uvloop.

    python bench/raw_limit.py --sync always --calls 20000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import msgpack
import nats
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, KeyValueConfig, RetentionPolicy, StreamConfig

from mesh.server import NatsServer

WINDOW = 1000  # inputs asked for at once
FLIGHT = 8000  # publishes without an answer


async def connect(url: str) -> Client:
    return await nats.connect(url, pending_size=64 << 20)


async def worker(url: str) -> None:
    """Pull, store a result that may not exist yet, ack."""
    client = await connect(url)
    js = client.jetstream(publish_async_max_pending=8000)
    stored: asyncio.Queue[Msg] = asyncio.Queue()
    asked = 0

    async def deliver(message: Msg) -> None:
        nonlocal asked
        if not message.reply.startswith("$JS.ACK"):
            asked = 0
            return
        asked -= 1
        args, _ = msgpack.unpackb(message.data)
        key = message.subject.split(".", 3)[3]
        condition = {"Nats-Expected-Last-Subject-Sequence": "0"}
        future = await js.publish_async(f"$KV.results.{key}", msgpack.packb(args[0]), headers=condition)
        future.add_done_callback(lambda _: stored.put_nowait(message))

    async def acknowledge() -> None:
        while True:
            await client.publish((await stored.get()).reply)

    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=deliver)
    acknowledging = asyncio.create_task(acknowledge())
    while not acknowledging.done():
        if asked < WINDOW // 2:
            query = json.dumps({"batch": WINDOW - asked, "expires": 5_000_000_000}).encode()
            asked = WINDOW
            await client.publish("$JS.API.CONSUMER.MSG.NEXT.CALLS.worker", query, inbox)
        await asyncio.sleep(0.001)


class RawClient:
    """Submits, and waits for results that the bucket pushes."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.js = client.jetstream(publish_async_max_pending=FLIGHT)
        self.waiting: dict[str, asyncio.Future[bytes]] = {}
        self.numbers = itertools.count()

    async def prepare(self) -> None:
        calls = StreamConfig(
            name="CALLS", subjects=["calls.>"], retention=RetentionPolicy.WORK_QUEUE, allow_direct=True
        )
        await self.js.add_stream(calls)
        await self.js.create_key_value(KeyValueConfig(bucket="results", ttl=7 * 86_400, direct=True))
        consumer = ConsumerConfig(
            durable_name="worker",
            filter_subject="calls.app.fn.>",
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=30,
            max_ack_pending=5000,
        )
        await self.js.add_consumer("CALLS", consumer)
        await self.client.subscribe("$KV.results.me.*", cb=self._on_result)

    async def _on_result(self, message: Msg) -> None:
        future = self.waiting.pop(message.subject.rpartition(".")[2], None)
        if future:
            future.set_result(message.data)

    def expect(self, key: str) -> asyncio.Future[bytes]:
        future = self.waiting[key] = asyncio.get_running_loop().create_future()
        return future

    async def round_trips(self, count: int) -> list[float]:
        taken = []
        for number in itertools.islice(self.numbers, count):
            began = time.perf_counter()
            answer = self.expect(f"r{number}")
            await self.js.publish(f"calls.app.fn.me.r{number}", msgpack.packb(([number], {})))
            await answer
            taken.append(time.perf_counter() - began)
        return taken

    async def end_to_end(self, count: int) -> float:
        began = time.perf_counter()
        answers, accepted = [], []
        for number in range(count):
            answers.append(self.expect(f"e{number}"))
            body = msgpack.packb(([number], {}))
            accepted.append(await self.js.publish_async(f"calls.app.fn.me.e{number}", body))
        await asyncio.gather(*accepted)
        found = await asyncio.gather(*answers)
        taken = time.perf_counter() - began
        assert [msgpack.unpackb(one) for one in found] == list(range(count))
        return count / taken


async def measure(server: NatsServer, calls: int) -> dict[str, float]:
    client = await connect(server.url)
    raw = RawClient(client)
    await raw.prepare()
    process = subprocess.Popen([sys.executable, __file__, "--worker", server.url])  # noqa: ASYNC220 - once, before measuring
    try:
        await raw.round_trips(50)  # until the worker is there
        taken = sorted(await raw.round_trips(300))
        meter = machine.Meter(client=[os.getpid()], worker=[process.pid], server=[server.pid])
        rate = await raw.end_to_end(calls)
        costs = meter.a_call(calls)
    finally:
        process.kill()
        process.wait()
        await client.close()
    return {
        "round_trip_p50_ms": 1e3 * statistics.median(taken),
        "round_trip_p99_ms": 1e3 * taken[int(0.99 * len(taken))],
        "end_to_end_per_s": rate,
        **costs,
    }


def run(sync: str, calls: int) -> dict[str, float]:
    """One measurement on a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer.start(Path(folder), sync=sync)
        try:
            return uvloop.run(measure(server, calls))
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sync", default="2m")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(worker(options.worker))
        return
    print(json.dumps({"sync": options.sync, "calls": options.calls, **run(options.sync, options.calls)}))


if __name__ == "__main__":
    main()
