"""Single calls and many, beside the raw limit of JetStream in the same round: no-op, every result read and checked.

What is reached is written into `docs/performance.md` beside what is to be reached.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import functions
import machine
import raw_limit
import table
import uvloop
from rig import Rig, rig
from table import Row, row

from mesh.broker import Broker
from mesh.config import Settings
from mesh.protocol import Address, Input, new_call_id

SINGLE = 1000  # calls of what is done one by one
BULK = 10_000
BODY = b'{"args":[1],"kwargs":{}}'


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


async def publishes(url: str) -> dict[str, float]:
    """nats-py's own publishing into a stream of our configuration, with our two main headers: µs of one, and how many
    a second with 4,000 under way. And ours of many inputs at once."""
    import nats

    connection = await nats.connect(url, pending_size=64 << 20)
    broker = await Broker.open(Settings.load({"nats_url": url}))
    js = connection.jetstream(publish_async_max_pending=4000)

    def messages(count: int) -> Iterator[tuple[str, dict[str, str]]]:
        for _ in range(count):
            call = new_call_id(broker.token)
            headers = {"Nats-Msg-Id": call, "Nats-Expected-Last-Subject-Sequence": "0"}
            yield f"mesh.call.bench.noop._.{call}.0", headers

    began = time.perf_counter()
    for subject, headers in messages(SINGLE):
        await js.publish(subject, BODY, headers=headers)
    one = 1e6 * (time.perf_counter() - began) / SINGLE
    began = time.perf_counter()
    await asyncio.gather(*[await js.publish_async(subject, BODY, headers=h) for subject, h in messages(BULK)])
    many = BULK / (time.perf_counter() - began)
    await connection.close()

    call = new_call_id(broker.token)
    addresses = (Address("bench", "noop", "_", call, index) for index in range(BULK))
    began = time.perf_counter()
    await broker.calls.submit_many(Input(address=address, body=BODY, kind="map") for address in addresses)
    ours = BULK / (time.perf_counter() - began)
    await broker.close()
    return {"one publish, nats-py (µs)": one, "many publishes, nats-py (a second)": many, "bulk spawn (a second)": ours}


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
    """One round of everything, on fresh servers."""
    raw = raw_limit.run(sync, calls)
    found = {f"raw {name}": raw[name] for name in raw}
    with rig(sync) as mesh:
        noop = deployed(mesh).noop
        found |= uvloop.run(publishes(mesh.server.url))
        found["one spawn, .aio (µs)"] = uvloop.run(one_spawn_async(noop, SINGLE))
        found["one spawn, blocking (µs)"] = one_spawn_blocking(noop, SINGLE)
    with rig(sync) as mesh:
        noop = deployed(mesh).noop
        mesh.start_worker()
        assert mesh.worker is not None
        uvloop.run(end_to_end(noop, 500))  # warm: containers started, runs known to be short
        taken = uvloop.run(round_trips(noop, 300))
        found["round trip p50 (ms)"] = statistics.median(taken)
        found["round trip p99 (ms)"] = taken[int(0.99 * len(taken))]
        worker = mesh.worker.pid
        containers = machine.containers(worker)
        meter = machine.Meter(client=[os.getpid()], worker=[worker], containers=containers, server=[mesh.server.pid])
        found["end to end (calls/s)"] = uvloop.run(end_to_end(noop, calls))
        found |= meter.a_call(calls)
    return found


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured, and what of the raw limit it is to reach: at most so much of it, or (`at_least`) at least."""

    name: str
    raw: str
    budget: float | None = None
    at_least: bool = False

    def wanted(self, sync: str) -> str:
        """In words. With a write to disk for each message, one commit for many messages is to give more than the raw
        limit, which has one for each."""
        if self.budget is None:
            return ""
        budget = 4.0 if sync == "always" and self.name.startswith("end to end") else self.budget
        return f"{'≥' if self.at_least else '≤'} {budget:g} ×"


FIGURES = (
    Figure("round trip p50 (ms)", "raw round_trip_p50_ms", 1.6),
    Figure("round trip p99 (ms)", "raw round_trip_p99_ms"),
    Figure("end to end (calls/s)", "raw end_to_end_per_s", 0.6, at_least=True),
    Figure("one spawn, .aio (µs)", "one publish, nats-py (µs)", 1.2),
    Figure("one spawn, blocking (µs)", "one publish, nats-py (µs)", 1.8),
    Figure("bulk spawn (a second)", "many publishes, nats-py (a second)", 0.7, at_least=True),
    Figure("CPU a call, client (µs)", "raw CPU a call, client (µs)"),
    Figure("CPU a call, worker (µs)", "raw CPU a call, worker (µs)"),
    Figure("CPU a call, containers (µs)", ""),
    Figure("CPU a call, server (µs)", "raw CPU a call, server (µs)"),
    Figure("CPU a call, all (µs)", "raw CPU a call, all (µs)"),
)


def rounds(sync: str, count: int, calls: int) -> list[dict[str, float]]:
    """One worker process with two containers; everything is measured in each round, so that a ratio is of one run."""
    return [measure(sync, calls) for _ in range(count)]


def rows(sync: str, found: Sequence[Mapping[str, float]]) -> list[Row]:
    """The median of the rounds, and what it is of the raw limit."""
    made: list[Row] = []
    for figure in FIGURES:
        ratios = [one[figure.name] / one[figure.raw] for one in found] if figure.raw else ()
        made.append(row(f"{figure.name}, sync {sync}", [one[figure.name] for one in found], ratios))
    return made


def budget(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """The same beside what is to be reached, as lines of Markdown, for each durability."""
    lines: list[str] = []
    for sync, some in found.items():
        lines += [
            f"| server writes: `{sync}` | raw | mesh | of the raw | to reach |",
            "| --- | --- | --- | --- | --- |",
        ]
        for figure in FIGURES:
            ours = table.spread([one[figure.name] for one in some])
            raw = table.spread([one[figure.raw] for one in some]) if figure.raw else ""
            ratios = [one[figure.name] / one[figure.raw] for one in some] if figure.raw else []
            ratio = f"{table.spread(ratios)} ×" if ratios else ""
            lines.append(f"| {figure.name} | {raw} | {ours} | {ratio} | {figure.wanted(sync)} |")
        lines.append("")
    return lines
