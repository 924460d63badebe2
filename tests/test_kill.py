"""Kill anything at any moment: every accepted call still ends exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh import Function, FunctionCall
from mesh.broker import Broker, Puller
from mesh.exception import ConnectionError
from mesh.protocol import Address, Input, Result, State, new_call_id
from mesh.server import NatsServer
from mesh.worker import Worker
from tests.support import Mesh, alive, new_mesh, until

# Each execution writes one line when it begins and one when it ends, with the process that ran it.
JOBS = """
    import mesh, os, time
    app = mesh.App("kill")

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function(timeout=60)
    def work(ledger, name, seconds):
        note(ledger, f"begin {name} {os.getpid()}")
        time.sleep(seconds)
        note(ledger, f"end {name} {os.getpid()}")
        return name
"""


def container_of(mesh: Mesh, name: str) -> int:
    """The process that runs the input of this name."""
    lines = until(lambda: [line for line in mesh.ledger().lines() if line.startswith(f"begin {name} ")], what=name)
    return int(lines[-1].split()[2])


def test_client_killed_after_spawn(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(JOBS)
    died = mesh.python(
        """
        import os, signal, sys
        from mesh import Function
        print(Function.from_name("kill", "work").spawn(sys.argv[1], "a", 0.1).object_id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        str(mesh.ledger().path),
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    mesh.start_worker()
    assert FunctionCall.from_id(died.stdout.strip()).get(timeout=20) == "a"
    assert mesh.ledger().count("begin") == 1


def test_worker_killed_in_the_middle_of_a_call(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    module = mesh.deploy(JOBS)
    first = mesh.start_worker()
    call = module.work.spawn(str(mesh.ledger().path), "a", 1.0)
    container = container_of(mesh, "a")
    began = time.monotonic()
    first.kill()
    second = mesh.start_worker()
    assert call.get(timeout=20) == "a"
    assert time.monotonic() - began < 2 + 1 + 4  # the ack wait, the call itself, and a few seconds
    until(lambda: not alive(container), what="the killed worker's container is gone")
    assert mesh.ledger().count("begin") == 2
    assert mesh.ledger().count("end") == 1
    assert call.status().worker in second.log


def test_container_killed(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    worker = mesh.start_worker()
    call = module.work.spawn(str(mesh.ledger().path), "a", 0.5)
    os.kill(container_of(mesh, "a"), signal.SIGKILL)
    began = time.monotonic()
    assert call.get(timeout=20) == "a"
    assert time.monotonic() - began < 3  # at once, not after the ack wait of 15 s
    assert mesh.ledger().count("begin") == 2
    assert mesh.ledger().count("end") == 1
    assert call.status().attempts == 1  # a crash is no try of the user's
    assert "killed by signal 9 (SIGKILL)" in worker.log


def test_server_killed_and_restarted(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, ack_wait=5) as mesh:
        module = mesh.deploy(JOBS)
        mesh.start_worker("--containers", "2")
        path = str(mesh.ledger().path)
        finished = [module.work.spawn(path, f"finished{n}", 0) for n in range(5)]
        assert FunctionCall.gather(*finished) == [f"finished{n}" for n in range(5)]
        running = [module.work.spawn(path, f"running{n}", 3.0) for n in range(2)]
        for n in range(2):
            container_of(mesh, f"running{n}")
        queued = [module.work.spawn(path, f"queued{n}", 0) for n in range(5)]
        server.kill()
        time.sleep(0.5)  # the server stays away for this long
        own_server(store=tmp_path / "store", port=server.port)
        began = time.monotonic()
        assert FunctionCall.gather(*running) == ["running0", "running1"]
        assert FunctionCall.gather(*queued) == [f"queued{n}" for n in range(5)]
        assert time.monotonic() - began < 5 + 4
        assert FunctionCall.gather(*finished) == [f"finished{n}" for n in range(5)]
        for name in [*(f"running{n}" for n in range(2)), *(f"queued{n}" for n in range(5))]:
            assert mesh.ledger().count(f"begin {name} ") == 1, f"{name} ran once"


def test_result_stored_and_worker_dead_before_the_ack(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=1)
    module = mesh.deploy(JOBS)

    async def as_a_worker_that_died(broker: object) -> Address:
        """The steps of a worker up to the point where it died: leased, result stored, no ack."""
        from mesh.broker import Broker, Lease, Puller

        assert isinstance(broker, Broker)
        leases: list[Lease] = []
        puller = Puller(broker.connection, broker.topology, leases.append, lambda consumer, why: None)
        await puller.start()
        puller.reserve("kill+work+_", 1)
        await puller.ask("kill+work+_", 1)
        import asyncio

        while not leases:
            await asyncio.sleep(0.01)
        address = leases[0].address
        assert address is not None
        result = Result(state=State.SUCCEEDED, body=b'"from the dead"')
        assert await broker.results.create(address.key, result)
        await puller.stop()
        return address

    call = module.work.spawn(str(mesh.ledger().path), "a", 0)
    address = mesh.ask(as_a_worker_that_died)
    assert address.call == call.object_id
    mesh.start_worker()

    def gone() -> bool:
        return mesh.ask(lambda broker: broker.calls.find(call.object_id)) is None

    until(gone, what="the second worker acknowledges it")
    assert call.get() == "from the dead"
    assert mesh.ledger().count() == 0


def test_a_restarted_server_forgets_deliveries_and_the_worker_does_not_care(own_mesh: Callable[..., Mesh]) -> None:
    """A server that is killed counts its newest deliveries from one again, also of calls that have their result."""
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    call = module.work.spawn(str(mesh.ledger().path), "a", 0)

    async def store_a_result(broker: Broker) -> None:
        assert await broker.results.create(f"{call.object_id}.0", Result(state=State.SUCCEEDED, body=b'"stored"'))

    mesh.ask(store_a_result)
    mesh.start_worker()
    until(lambda: mesh.ask(lambda broker: broker.calls.find(call.object_id)) is None, what="it is acknowledged")
    assert call.get() == "stored"
    assert mesh.ledger().count() == 0


def test_short_calls_while_the_server_is_killed_again_and_again(
    own_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, ack_wait=5) as mesh:
        module = mesh.deploy(JOBS)
        mesh.start_worker("--containers", "4")
        calls = [module.work.spawn(str(mesh.ledger().path), f"n{n}", 0.02) for n in range(400)]
        for count in (40, 120, 200):
            until(lambda count=count: mesh.ledger().count("begin") >= count)
            server.kill()
            server = own_server(store=tmp_path / "store", port=server.port)
        assert FunctionCall.gather(*calls) == [f"n{n}" for n in range(400)]
        begun = sorted(line.split()[1] for line in mesh.ledger().lines() if line.startswith("begin"))
        assert begun == sorted(f"n{n}" for n in range(400))


def test_a_pull_that_the_break_caught_is_not_sent_after_the_reconnect(
    own_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    """nats-py would send it as soon as the server is back, when other workers have not yet renewed what they hold."""
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path) as mesh:
        mesh.deploy(JOBS)

        async def pulls_waiting() -> int:
            broker = await Broker.open(mesh.settings)
            puller = Puller(broker.connection, broker.topology, lambda lease: None, lambda consumer, why: None)
            await puller.start()
            back = asyncio.Event()

            def on_break() -> None:
                publish = broker.connection.publish(
                    f"$JS.API.CONSUMER.MSG.NEXT.{broker.topology.calls}.kill+work+_",
                    b'{"batch": 1, "expires": 60000000000}',
                    reply=f"{puller._inbox}.kill+work+_",
                )
                with pytest.raises(StopIteration):
                    publish.send(None)  # as if it had been sent a moment before
                puller.void_all()

            broker.connection.events.disconnected.append(on_break)
            broker.connection.events.reconnected.append(back.set)
            server.kill()
            own_server(store=tmp_path / "store", port=server.port)
            await asyncio.wait_for(back.wait(), 20)
            await broker.connection.flush()
            info = await broker.connection.api(f"CONSUMER.INFO.{broker.topology.calls}.kill+work+_")
            await broker.close()
            return int(info["num_waiting"])

        assert asyncio.run(pulls_waiting()) == 0


def test_a_call_longer_than_three_ack_waits_runs_once(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=1)
    module = mesh.deploy(JOBS)
    mesh.start_worker()
    mesh.start_worker()
    assert module.work.remote(str(mesh.ledger().path), "a", 4.0) == "a"
    assert mesh.ledger().count("begin") == 1


def publish_again(mesh: Mesh, address: Address, path: str) -> None:
    """What a client does that did not hear whether its publish was stored."""
    body = f'{{"args":["{path}","a",0]}}'.encode()
    mesh.ask(lambda broker: broker.calls.submit(Input(address=address, body=body, resubmit=True)))


def test_a_publish_repeated_is_one_execution(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, ack_wait=2) as mesh:
        mesh.deploy(JOBS)
        path = str(mesh.ledger().path)
        token = mesh.ask(lambda broker: _token(broker))
        address = Address("kill", "work", "_", new_call_id(token))
        publish_again(mesh, address, path)
        publish_again(mesh, address, path)  # while it is queued
        mesh.start_worker()
        call = FunctionCall.from_id(address.call)
        assert call.get(timeout=20) == "a"
        publish_again(mesh, address, path)  # within the duplicate window
        server.kill()
        own_server(store=tmp_path / "store", port=server.port)  # which forgets the window
        until(lambda: mesh.ask(lambda broker: _up(broker)), what="the client is back")
        publish_again(mesh, address, path)

        def settled() -> bool:
            return mesh.ask(lambda broker: broker.calls.find(address.call)) is None

        until(settled, what="the repeated publish is acknowledged")
        assert call.get(timeout=5) == "a"
        assert mesh.ledger().count("begin") == 1


async def _token(broker: object) -> str:
    return broker.token  # type: ignore[attr-defined]


async def _up(broker: object) -> bool:
    return broker.connection.is_up  # type: ignore[attr-defined]


def test_a_worker_stopped_in_the_middle_finishes_first(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    worker = mesh.start_worker()
    call = module.work.spawn(str(mesh.ledger().path), "a", 1.0)
    container_of(mesh, "a")
    assert worker.stop() == 0
    assert call.get(timeout=1) == "a"
    assert mesh.ledger().count("begin") == 1


def test_a_worker_hands_back_what_its_grace_does_not_cover(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    worker = mesh.start_worker(MESH_GRACE="0.3")
    call = module.work.spawn(str(mesh.ledger().path), "a", 2.0)
    container = container_of(mesh, "a")
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 3
    assert not alive(container)
    mesh.start_worker()
    assert call.get(timeout=10) == "a"  # at once, not after the ack wait of 15 s
    assert time.monotonic() - began < 8
    assert call.status().attempts == 1


def test_a_second_signal_stops_now(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    worker = mesh.start_worker()
    call = module.work.spawn(str(mesh.ledger().path), "a", 30.0)
    container = container_of(mesh, "a")
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: "1 running" in worker.log)
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(10) == 8
    assert time.monotonic() - began < 5
    assert not alive(container)
    assert call.status().state == "queued"
    assert Function.from_name("kill", "work")  # the app itself is untouched


def test_a_server_that_goes_while_a_worker_starts_is_named(
    own_server: Callable[..., NatsServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the chaos run, seed 12: it ended with a traceback, and left its connection open."""
    server = own_server()
    read_heads = Worker._read_deployed

    async def server_goes_first(worker: Worker) -> None:
        server.kill()
        await read_heads(worker)

    monkeypatch.setattr(Worker, "_read_deployed", server_goes_first)
    with new_mesh(server, tmp_path) as mesh:
        worker = Worker(mesh.settings)
        with pytest.raises(ConnectionError, match="starting the worker: "):
            asyncio.run(worker.run())
        assert worker.broker.connection.is_closed
        assert not worker.scratch.path.exists()
