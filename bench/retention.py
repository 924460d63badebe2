"""What results and queued calls cost the server: `python bench/retention.py` prints the tables of docs/operations.md.

Stores results and inputs as the mesh stores them (same streams, headers and sizes, no worker) and reads the server's
memory and disk; calls a second times seconds of retention is how many results there are.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import uvloop

from mesh.broker import Broker
from mesh.config import Settings
from mesh.protocol import Address, Input, Result, State, new_call_id
from mesh.server import NatsServer

WINDOW = 500


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def disk(folder: Path) -> int:
    """Bytes that files take."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


async def fill(broker: Broker, count: int, what: str) -> None:
    """Store many, some hundred under way at a time."""
    gate = asyncio.Semaphore(WINDOW)
    body = b'{"args":[12345,"some text of a usual length"],"kwargs":{}}'

    async def one() -> None:
        async with gate:
            call = new_call_id(broker.token)
            if what == "queued":
                address = Address("shop", "send_invoice", "_", call)
                await broker.calls.submit(Input(address=address, body=body, kind="spawn", client=broker.client))
            else:
                now = time.time()
                result = Result(
                    state=State.SUCCEEDED, body=body, app="shop", function="send_invoice", code="0123456789ab",
                    worker="host-abc123", started=now, finished=now,
                )  # fmt: skip
                await broker.results.create(f"{call}.0", result)

    for _ in range(0, count, 10_000):
        await asyncio.gather(*(one() for _ in range(min(10_000, count))))


async def measure(what: str, count: int) -> tuple[float, float]:
    """Bytes of memory and of disk for one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = NatsServer.start(folder, sync="2m")
        try:
            settings = Settings.load({"nats_url": server.url, "results_size": "4G", "calls_size": "4G"})
            broker = await Broker.open(settings)
            await broker.ensure()
            await fill(broker, count // 10, what)  # what the first ones cost is not the slope
            await asyncio.sleep(1)
            before = memory(server.pid), disk(folder)
            await fill(broker, count, what)
            await asyncio.sleep(1)
            after = memory(server.pid), disk(folder)
            await broker.close()
        finally:
            server.kill()
    return (after[0] - before[0]) / count, (after[1] - before[1]) / count


def size(value: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:,.1f} {unit}"
    return f"{value:.0f} B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300_000)
    count = parser.parse_args().count
    costs = {what: uvloop.run(measure(what, count)) for what in ("queued", "results")}
    print(f"one queued call: {costs['queued'][0]:.0f} B of memory, {costs['queued'][1]:.0f} B of disk")
    print(f"one result:      {costs['results'][0]:.0f} B of memory, {costs['results'][1]:.0f} B of disk")
    print("\n| calls a second | kept 1 hour | kept 1 day | kept 7 days |\n| --- | --- | --- | --- |")
    for rate in (1, 10, 100, 1000):
        cells = []
        for seconds in (3600, 86_400, 7 * 86_400):
            number = rate * seconds
            cells.append(f"{size(number * costs['results'][0])} memory, {size(number * costs['results'][1])} disk")
        print(f"| {rate:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
