"""mesh beside the raw limit of JetStream, in the same run: `python3 dev bench`.

Prints, for one durability mode, medians over several rounds with their spread, and the ratio to the raw figure of the
same round. No-op calls of one function, every result read and checked; one worker process with two containers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import raw_limit
import uvloop

import mesh
from mesh import client
from mesh._sync import bridge
from mesh.broker import Broker
from mesh.config import Settings
from mesh.protocol import new_call_id
from mesh.server import NatsServer

app = mesh.App("bench")


@app.function()
def noop(x: int) -> int:
    return x


class Bench:
    """A server, an environment and perhaps a worker."""

    def __init__(self, folder: Path, sync: str) -> None:
        self.folder = folder
        self.server = NatsServer.start(folder / "nats", sync=sync)
        self.settings = Settings.load(
            {"nats_url": self.server.url, "cache_dir": str(folder / "cache"), "calls_size": "2G", "results_size": "2G"}
        )
        client.use_settings(self.settings)
        app.deploy()
        self.worker: subprocess.Popen[bytes] | None = None

    def start_worker(self, containers: int = 2) -> None:
        ours, theirs = socket.socketpair()
        variables = {**os.environ, "MESH_NATS_URL": self.server.url, "MESH_CACHE_DIR": str(self.folder / "cache")}
        command = ["worker", "--quiet", "--containers", str(containers), "--ready-fd", str(theirs.fileno())]
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "mesh", *command], env=variables, pass_fds=(theirs.fileno(),)
        )
        theirs.close()
        ours.recv(1)
        ours.close()

    def close(self) -> None:
        bridge().run(client.close())
        client.use_settings(None)
        if self.worker:
            self.worker.kill()
            self.worker.wait()
        self.server.kill()


# --- what is measured ------------------------------------------------------------------------------------------------


async def one_spawn_async(count: int) -> float:
    """Microseconds of one `await f.spawn.aio(…)`, one after the other."""
    await noop.spawn.aio(0)
    began = time.perf_counter()
    for number in range(count):
        await noop.spawn.aio(number)
    return 1e6 * (time.perf_counter() - began) / count


def one_spawn_blocking(count: int) -> float:
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


async def round_trips(count: int) -> list[float]:
    taken = []
    for number in range(count):
        began = time.perf_counter()
        assert await noop.remote.aio(number) == number
        taken.append(1e3 * (time.perf_counter() - began))
    return sorted(taken)


async def end_to_end(count: int, flight: int = 2000) -> float:
    """Calls a second, with every result read and checked; at most `flight` under way."""
    gate = asyncio.Semaphore(flight)

    async def one(number: int) -> None:
        async with gate:
            assert await noop.remote.aio(number) == number

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(count)))
    return count / (time.perf_counter() - began)


def measure(sync: str, calls: int) -> dict[str, float]:
    """One round of everything, on a fresh server."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), sync)
        try:
            found = {
                "one publish, nats-py (µs)": uvloop.run(one_publish(bench.server.url, 2000)),
                "one spawn, .aio (µs)": uvloop.run(one_spawn_async(2000)),
                "one spawn, blocking (µs)": one_spawn_blocking(2000),
            }
        finally:
            bench.close()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), sync)
        try:
            bench.start_worker()
            uvloop.run(end_to_end(500))  # warm: containers started, runs known to be short
            taken = uvloop.run(round_trips(300))
            found["round trip p50 (ms)"] = statistics.median(taken)
            found["round trip p99 (ms)"] = taken[int(0.99 * len(taken))]
            found["end to end (calls/s)"] = uvloop.run(end_to_end(calls))
        finally:
            bench.close()
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


def report(rounds: list[dict[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        ratios = [found[name] / RAW_OF[name](found) for found in rounds] if name in RAW_OF else []
        rows.append(
            {
                "what": name,
                "median": statistics.median(values),
                "low": min(values),
                "high": max(values),
                "ratio": statistics.median(ratios) if ratios else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sync", default="2m", help="always, 1s or 2m: when the server writes to disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = report([one_round(options.sync, options.calls) for _ in range(options.rounds)])
    if options.json:
        print(json.dumps({"sync": options.sync, "rows": rows}))
        return
    cpu = os.cpu_count()
    python = platform.python_version()
    print(f"sync {options.sync} · {options.rounds} rounds of {options.calls} calls · Python {python}, {cpu} cores")
    for row in rows:
        ratio = f"{row['ratio']:.2f} × raw" if row["ratio"] else ""
        print(f"{row['what']:<28} {row['median']:>10,.2f}   ({row['low']:,.2f} – {row['high']:,.2f})   {ratio}")


if __name__ == "__main__":
    main()
