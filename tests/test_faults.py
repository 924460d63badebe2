"""Faults that no other file is about: what must come of each is in `docs/faults.md`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from mesh import FunctionCall
from mesh.broker import Broker
from mesh.exception import OutputExpiredError
from mesh.protocol import PoolKey
from tests.support import Mesh, alive, until

JOBS = """
    import asyncio, ctypes, mesh, os, subprocess, sys, threading, time
    app = mesh.App("faults")

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function()
    def work(path, name, seconds=0.0):
        note(path, f"begin {name} {os.getpid()}")
        time.sleep(seconds)
        note(path, f"end {name}")
        return f"{name} by {os.getpid()}"

    @app.function()
    async def blocks_its_loop(path, seconds):
        note(path, "begin")
        time.sleep(seconds)
        return "done"

    @app.function()
    def holds_the_interpreter(path, seconds):
        note(path, "begin")
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL keeps the lock of the interpreter
        return "done"

    @app.function()
    def prints_without_pause(path, seconds):
        note(path, "begin")
        program = (
            "import itertools, os, sys, time; end = time.monotonic() + float(sys.argv[1]); "
            "all(os.write(1, b'yes' * 4096) and time.monotonic() < end for _ in itertools.repeat(0))"
        )
        subprocess.run([sys.executable, "-c", program, str(seconds)])
        return "done"

    @app.function()
    def leaves_things_behind(path):
        threading.Thread(target=time.sleep, args=(3600,)).start()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        note(path, f"{os.getpid()} {child.pid}")

    @app.function(retries=mesh.Retries(max_retries=1, initial_delay=60.0))
    def waits_for_its_next_try(path):
        note(path, "try")
        raise ValueError("later")

    @app.function()
    def fails(path):
        note(path, "begin")
        if not os.path.exists(path + ".repaired"):
            raise ValueError("no use")
        return "done"
"""


def test_a_paused_worker_is_replaced_and_its_late_result_refused(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=1)
    module = mesh.deploy(JOBS)
    paused = mesh.start_worker()
    path = str(mesh.ledger().path)
    call = module.work.spawn(path, "a", 2.0)
    until(lambda: mesh.ledger().count("begin") == 1)
    os.kill(paused.pid, signal.SIGSTOP)  # its container goes on, and ends with a result that nobody takes
    try:
        mesh.start_worker()
        value = call.get(timeout=30)
        until(lambda: mesh.ledger().count("end") == 2)
    finally:
        os.kill(paused.pid, signal.SIGCONT)
    begun = [line.split()[2] for line in mesh.ledger().lines() if line.startswith("begin")]
    assert value == f"a by {begun[1]}"
    assert paused.stop() == 0, "which settles what it holds"
    assert call.get() == value, "the first result stays"


@pytest.mark.parametrize("function", ["blocks_its_loop", "holds_the_interpreter", "prints_without_pause"])
def test_code_that_lets_nothing_else_run_keeps_its_lease(own_mesh: Callable[..., Mesh], function: str) -> None:
    mesh = own_mesh(ack_wait=3)
    module = mesh.deploy(JOBS)
    workers = [mesh.start_worker() for _ in range(2)]
    assert getattr(module, function).remote(str(mesh.ledger().path), 8.0) == "done"
    assert mesh.ledger().count("begin") == 1
    if function == "prints_without_pause":
        until(lambda: any("output cut: the limit is 1 MiB" in worker.log for worker in workers))
        assert sum(worker.log_file.stat().st_size for worker in workers) < 64 << 20


def test_what_a_function_leaves_behind_ends_with_its_container(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    worker = mesh.start_worker()
    module.leaves_things_behind.remote(str(mesh.ledger().path))
    [container, child] = map(int, mesh.ledger().lines()[0].split())
    assert alive(container)
    assert alive(child)
    assert worker.stop() == 0
    until(lambda: not alive(container) and not alive(child))


def test_a_function_whose_deliveries_are_used_up_starves_no_other(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)

    async def allow_two(broker: Broker) -> None:
        config = broker.topology.consumer_config(PoolKey("faults", "waits_for_its_next_try"), 15)
        request = {"stream_name": broker.topology.calls, "config": {**config, "max_ack_pending": 2}}
        await broker.connection.api(f"CONSUMER.CREATE.{broker.topology.calls}.{config['durable_name']}", request)

    mesh.ask(allow_two)
    mesh.start_worker(MESH_SWEEP_INTERVAL="3600")  # which does not set it right meanwhile
    path = str(mesh.ledger().path)
    calls = [module.waits_for_its_next_try.spawn(path) for _ in range(3)]
    until(lambda: mesh.ledger().count("try") == 2)
    assert module.work.remote(str(mesh.ledger("other").path), "b").startswith("b by ")
    assert mesh.ledger().count("try") == 2, "the third waits, which is back-pressure"
    waiting = [call for call in calls if call.status().state == "retrying"]
    waiting[0].cancel()
    until(lambda: mesh.ledger().count("try") == 3)


def test_code_that_cannot_be_fetched_costs_no_try(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    bundles: dict[str, bytes] = {}

    async def hide_the_code(broker: Broker) -> None:
        from mesh.broker.bucket import Bucket

        bucket = Bucket(broker.connection, broker.topology, "code")
        for key, stored in (await bucket.all()).items():
            bundles[key] = stored.body
            await bucket.delete(stored.sequence)

    async def bring_it_back(broker: Broker) -> None:
        from mesh.broker.bucket import Bucket

        for key, body in bundles.items():
            await Bucket(broker.connection, broker.topology, "code").put(key, body)

    mesh.ask(hide_the_code)
    assert bundles
    mesh.start_worker(MESH_CACHE_DIR=str(mesh.directory / "empty"))
    call = module.work.spawn(str(mesh.ledger().path), "a")
    until(lambda: "does not start" in call.status().waiting_for)
    assert call.status().state == "queued"
    mesh.ask(bring_it_back)
    assert call.get(timeout=30).startswith("a by ")
    assert call.status().attempts == 1


def test_what_failed_is_sent_again_after_its_result_has_expired(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(max_age=2)
    module = mesh.deploy(JOBS)
    mesh.start_worker()
    call = module.fails.spawn(str(mesh.ledger().path))
    until(lambda: mesh.ask(lambda broker: broker.dead.of_call(call.object_id)))
    until(lambda: mesh.ask(lambda broker: broker.results.get(f"{call.object_id}.0")) is None, what="it expires")
    with pytest.raises(OutputExpiredError):
        call.get()
    mesh.ledger("ledger.repaired").path.touch()
    new = mesh.cli("call", "retry", call.object_id).stdout.split()[-1]
    assert FunctionCall.from_id(new).get(timeout=20) == "done"
