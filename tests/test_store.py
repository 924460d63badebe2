"""The store in trouble: full, away, or changed by hand. Calls still end exactly once, and who is to act is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh import Function, FunctionCall
from mesh.broker import Broker, StoreError
from mesh.exception import ConnectionError, NotFoundError, ResourceExhaustedError
from mesh.records import WorkerRecord
from mesh.server import NatsServer
from tests.support import Mesh, WorkerProcess, new_mesh, until

WORK = """
    import mesh, time
    app = mesh.App("store")

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function(timeout=100)
    def work(ledger, name, seconds=0.0):
        note(ledger, f"begin {name} ")
        time.sleep(seconds)
        note(ledger, f"end {name} ")
        return name

    @app.function()
    def take(data):
        return len(data)
"""
MiB = 1 << 20


def resize(mesh: Mesh, stream: Callable[[Broker], str], **changes: object) -> None:
    """What `nats stream edit` does."""

    async def edit(broker: Broker) -> None:
        name = stream(broker)
        config = (await broker.connection.api(f"STREAM.INFO.{name}"))["config"]
        await broker.connection.api(f"STREAM.UPDATE.{name}", {**config, **changes})

    mesh.ask(edit)


def calls(broker: Broker) -> str:
    return broker.topology.calls


def results(broker: Broker) -> str:
    return broker.topology.bucket_stream("results")


def size_of(mesh: Mesh, stream: Callable[[Broker], str]) -> tuple[int, int]:
    """Bytes used, and the size."""

    async def read(broker: Broker) -> tuple[int, int]:
        info = await broker.connection.api(f"STREAM.INFO.{stream(broker)}")
        return info["state"]["bytes"], info["config"]["max_bytes"]

    return mesh.ask(read)


def delete(mesh: Mesh, stream: Callable[[Broker], str]) -> None:
    """What `nats stream rm` does."""

    async def remove(broker: Broker) -> None:
        await broker.connection.api(f"STREAM.DELETE.{stream(broker)}")

    mesh.ask(remove)


def workers(mesh: Mesh) -> list[WorkerRecord]:
    return mesh.ask(lambda broker: broker.workers.all())


def ran_once(mesh: Mesh, names: list[str]) -> None:
    begun = sorted(line.split()[1] for line in mesh.ledger().lines() if line.startswith("begin"))
    assert begun == sorted(names)


# --- full: submitting ------------------------------------------------------------------------------------------------


def test_submissions_are_refused_when_the_queue_is_nearly_full(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(calls_size="2M")
    take = mesh.deploy(WORK).take
    accepted = [take.spawn("x" * 50_000) for _ in range(38)]
    until(lambda: not accepts(take), what="the client has heard that the queue is nearly full")
    used, size = size_of(mesh, calls)
    assert 0.9 <= used / size < 0.95
    with pytest.raises(ResourceExhaustedError) as refusal:
        take.spawn("x")
    text = str(refusal.value)
    assert text.startswith("submitting store.take: nothing was stored, because the queue, MESH-T-")
    for part in (" % full (1.", " of 2.0 MiB)", "workers have caught up", "nats stream edit", "calls_size"):
        assert part in text
    mesh.start_worker()
    assert FunctionCall.gather(*accepted) == [50_000] * len(accepted)
    assert take.remote("y") == 1  # by the same client, once there is room


def test_a_burst_is_refused_by_the_server_in_the_same_words(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(calls_size="1M")
    take = mesh.deploy(WORK).take
    with pytest.raises(ResourceExhaustedError) as refusal:
        for _ in range(200):
            take.spawn("x" * 50_000)
    assert "the queue, MESH-T-" in str(refusal.value)
    assert "calls_size" in str(refusal.value)


def test_a_full_bucket_of_results_refuses_submissions(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(results_size="1M")
    take = mesh.deploy(WORK).take
    fill_results(mesh)
    with pytest.raises(ResourceExhaustedError, match="the bucket of results, KV_mesh-t-.* results_size"):
        take.spawn("x")
    resize(mesh, results, max_bytes=8 * MiB)
    until(lambda: accepts(take), what="the same client may submit again")


def accepts(take: Function[..., Any]) -> bool:
    try:
        take.spawn("x")
    except ResourceExhaustedError:
        return False
    return True


def fill_results(mesh: Mesh) -> None:
    """Put keys of somebody else into the bucket of results until it takes no more."""

    async def fill(broker: Broker) -> None:
        for size in (50_000, 100):  # until not even an empty result fits
            with pytest.raises(StoreError, match="maximum bytes"):
                for n in range(10_000):
                    await broker.connection.store(
                        f"$KV.{broker.topology.bucket('results')}.by-hand.{size}-{n}", b"x" * size
                    )

    mesh.ask(fill)


def test_asking_whether_there_is_room_costs_little(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    take = mesh.deploy(WORK).take
    take.spawn("x")
    before = mesh.ask(requests)
    began = time.monotonic()
    for _ in range(500):
        take.spawn("x")
    looks = (time.monotonic() - began) / 2 + 2
    assert mesh.ask(requests) - before <= 3 * looks


async def requests(broker: Broker) -> int:
    """Requests of the JetStream API so far, in the whole account."""
    return int((await broker.connection.api("INFO"))["api"]["total"])


# --- full: settling --------------------------------------------------------------------------------------------------


def test_where_results_do_not_fit_workers_hold_on_and_take_nothing_new(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(results_size="1M", ack_wait=2)
    work = mesh.deploy(WORK).work
    worker = mesh.start_worker("--containers", "2")
    path = str(mesh.ledger().path)
    running = [work.spawn(path, f"running{n}", 3.0) for n in range(2)]
    until(lambda: mesh.ledger().count("begin") == 2)
    resize(mesh, results, max_bytes=200_000)
    queued = [work.spawn(path, f"queued{n}") for n in range(4)]
    fill_results(mesh)
    until(lambda: any(w.trouble for w in workers(mesh)), what="the worker says that it cannot settle")
    assert "begins nothing until the store takes results: maximum bytes exceeded" in workers(mesh)[0].trouble
    assert "begins nothing" in queued[-1].status().waiting_for
    time.sleep(3 * 2)  # several ack waits: the leases are kept, and nothing is delivered to anybody else
    assert mesh.ledger().count("begin") == 2
    assert worker.log.count("the store takes nothing") == 1
    resize(mesh, results, max_bytes=8 * MiB)
    assert FunctionCall.gather(*running, *queued) == ["running0", "running1", *(f"queued{n}" for n in range(4))]
    ran_once(mesh, ["running0", "running1", *(f"queued{n}" for n in range(4))])
    assert worker.log.count("the store takes everything again") == 1
    until(lambda: not workers(mesh)[0].trouble)
