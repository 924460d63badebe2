"""Single calls and many, beside the raw limit of JetStream in the same round: no-op, every result read and checked."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import functions
import raw_limit
import uvloop
from rig import Rig, rig
from table import Row, row

from mesh.broker import Broker
from mesh.config import Settings
from mesh.protocol import new_call_id


async def one_spawn_async(noop, count: int) -> float:
    """Microseconds of one `await f.spawn.aio(…)`, one after the other."""
    await noop.spawn.aio(0)
    began = time.perf_counter()
    for number in range(count):
        await noop.spawn.aio(number)
    return 1e6 * (time.perf_counter() - began) / count


def one_spawn_blocking(noop, count: int) -> float:
    """Microseconds of one `f.spawn(…)`."""
    noop.spawn(0)
    began = time.perf_counter()
    for number in range(count):
        noop.spawn(number)
    return 1e6 * (time.perf_counter() - began) / count


async def one_publish(url: str, count: int) -> float:
    """Microseconds of nats-py's own publish into a stream of our configuration, with our two main headers."""
    import nats

    connection = await nats.connect(url)
    broker = await Broker.open(Settings.load({"nats_url": url}))
    js = connection.jetstream()
    ids = [new_call_id(broker.token) for _ in range(count)]
    began = time.perf_counter()
    for call in ids:
        headers = {"Nats-Msg-Id": call, "Nats-Expected-Last-Subject-Sequence": "0"}
        await js.publish(f"mesh.call.bench.noop._.{call}.0", b'{"args":[1],"kwargs":{}}', headers=headers)
    taken = 1e6 * (time.perf_counter() - began) / count
    await connection.close()
    await broker.close()
    return taken


async def round_trips(noop, count: int) -> list[float]:
    taken = []
    for number in range(count):
        began = time.perf_counter()
        assert await noop.remote.aio(number) == number
        taken.append(1e3 * (time.perf_counter() - began))
    return sorted(taken)


async def end_to_end(function, count: int, flight: int = 2000) -> float:
    """Calls a second, with every result read and checked; at most `flight` under way."""
    gate = asyncio.Semaphore(flight)

    async def one(number: int) -> None:
        async with gate:
            assert await function.remote.aio(number) == number

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(count)))
    return count / (time.perf_counter() - began)


def deployed(mesh: Rig) -> ModuleType:
    """The functions that are called."""
    module = mesh.load("calls_app", functions.CALLS)
    module.app.deploy()
    return module


def measure(sync: str, calls: int) -> dict[str, float]:
    """One round of everything, on a fresh server."""
    with rig(sync) as mesh:
        noop = deployed(mesh).noop
        found = {
            "one publish, nats-py (µs)": uvloop.run(one_publish(mesh.server.url, 2000)),
            "one spawn, .aio (µs)": uvloop.run(one_spawn_async(noop, 2000)),
            "one spawn, blocking (µs)": one_spawn_blocking(noop, 2000),
        }
    with rig(sync) as mesh:
        noop = deployed(mesh).noop
        mesh.start_worker()
        uvloop.run(end_to_end(noop, 500))  # warm: containers started, runs known to be short
        taken = uvloop.run(round_trips(noop, 300))
        found["round trip p50 (ms)"] = statistics.median(taken)
        found["round trip p99 (ms)"] = taken[int(0.99 * len(taken))]
        found["end to end (calls/s)"] = uvloop.run(end_to_end(noop, calls))
    return found


RAW_OF: dict[str, Callable[[dict[str, float]], float]] = {
    "one spawn, .aio (µs)": lambda found: found["one publish, nats-py (µs)"],
    "one spawn, blocking (µs)": lambda found: found["one publish, nats-py (µs)"],
    "round trip p50 (ms)": lambda found: found["raw round trip p50 (ms)"],
    "round trip p99 (ms)": lambda found: found["raw round trip p99 (ms)"],
    "end to end (calls/s)": lambda found: found["raw end to end (calls/s)"],
}


def one_round(sync: str, calls: int) -> dict[str, float]:
    raw = raw_limit.run(sync, calls)
    return {
        "raw round trip p50 (ms)": raw["round_trip_p50_ms"],
        "raw round trip p99 (ms)": raw["round_trip_p99_ms"],
        "raw end to end (calls/s)": raw["end_to_end_per_s"],
        **measure(sync, calls),
    }


def rows(sync: str, rounds: int, calls: int) -> list[Row]:
    """One worker process with two containers; for each figure the median of some rounds, and what it is of the raw."""
    found = [one_round(sync, calls) for _ in range(rounds)]
    return [
        row(
            name,
            [one[name] for one in found],
            [one[name] / RAW_OF[name](one) for one in found] if name in RAW_OF else (),
        )
        for name in found[0]
    ]
