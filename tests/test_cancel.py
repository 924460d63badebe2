"""Cancelling: wherever a call is, it has one outcome, and nothing of it runs when that is said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from mesh import FunctionCall
from mesh.broker import Broker
from mesh.exception import NotFoundError, RemoteError
from mesh.protocol import Address, CancelRequest, Input, Result, State, new_call_id
from mesh.watch import Watch
from tests.support import Mesh, alive, until

JOBS = """
    import asyncio, mesh, os, signal, time
    app = mesh.App({name!r})

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function(timeout=300)
    def sleeps(path, name, seconds=60.0):
        note(path, f"begin {{name}} {{os.getpid()}}")
        try:
            end = time.time() + seconds
            while time.time() < end:
                time.sleep(0.01)
        except BaseException as error:
            note(path, f"caught {{name}} {{type(error).__name__}}")
            raise
        return name

    @app.function()
    async def waits(path, name, seconds=60.0):
        note(path, f"begin {{name}} {{os.getpid()}}")
        try:
            await asyncio.sleep(seconds)
        except BaseException as error:
            note(path, f"caught {{name}} {{type(error).__name__}}")
            raise
        return name

    @app.function()
    def stubborn(path, name):
        note(path, f"begin {{name}} {{os.getpid()}}")
        while True:
            try:
                time.sleep(60)
            except BaseException:
                note(path, f"swallowed {{name}}")

    @app.function()
    def holds(path, name):
        note(path, f"begin {{name}} {{os.getpid()}}")
        while not os.path.exists(path + ".go"):
            time.sleep(0.05)
        return name

    @app.function(retries=mesh.Retries(max_retries=5, initial_delay=60, max_delay=86400))
    def fails(path, name):
        note(path, f"begin {{name}} {{os.getpid()}}")
        raise ValueError("later")

    @app.function(detach=True)
    def detached(path, name, seconds):
        note(path, f"begin {{name}} {{os.getpid()}}")
        time.sleep(seconds)
        note(path, f"end {{name}}")
"""


def jobs(name: str) -> str:
    return JOBS.format(name=name)


def began(mesh: Mesh, name: str) -> int:
    """The process in which the input of this name runs."""
    lines = until(lambda: [line for line in mesh.ledger().lines() if line.startswith(f"begin {name} ")], what=name)
    return int(lines[-1].split()[2])


def assert_cancelled(call: FunctionCall[object]) -> None:
    with pytest.raises(RemoteError, match="cancelled: by "):
        call.get(timeout=10)
    assert call.status().state == "cancelled"


def queue_is_empty(mesh: Mesh) -> bool:
    return mesh.ask(lambda broker: broker.calls.newest(1)) == []


def test_a_queued_call_is_cancelled_where_no_worker_is(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("queued"))
    call, other = (module.sleeps.spawn(str(mesh.ledger().path), name, 0) for name in "ab")
    call.cancel()
    assert_cancelled(call)
    mesh.start_worker()
    assert other.get(timeout=20) == "b"
    assert mesh.ledger().count("begin a ") == 0
    until(lambda: queue_is_empty(mesh))


@pytest.mark.parametrize(("function", "error"), [("sleeps", "InputCancellation"), ("waits", "CancelledError")])
def test_a_running_call_is_cancelled(mesh: Mesh, function: str, error: str) -> None:
    module = mesh.deploy(jobs(f"running-{function}"))
    name = f"running-{function}"
    call = getattr(module, function).spawn(str(mesh.ledger().path), name)
    process = began(mesh, name)
    call.cancel()
    assert_cancelled(call)
    assert mesh.ledger().count(f"caught {name} {error}") == 1
    again = getattr(module, function).spawn(str(mesh.ledger().path), name, 0)
    assert again.get(timeout=20) == name
    assert began(mesh, name) == process, "its container goes on"


def test_a_call_that_does_not_let_itself_be_stopped_is_killed(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("stubborn"))
    mesh.start_worker(MESH_CANCEL_GRACE="1")
    call = module.stubborn.spawn(str(mesh.ledger().path), "a")
    process = began(mesh, "a")
    call.cancel()
    assert not alive(process), "when it says cancelled, no process of it is left"
    assert mesh.ledger().count("swallowed") >= 1
    assert_cancelled(call)


def test_terminate_kills_the_container_at_once(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("terminate"))
    call = module.stubborn.spawn(str(mesh.ledger().path), "terminated")
    process = began(mesh, "terminated")
    call.cancel(terminate_containers=True)
    assert not alive(process)
    assert_cancelled(call)


def test_a_call_that_waits_for_its_next_try_is_cancelled(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("retrying"))
    call = module.fails.spawn(str(mesh.ledger().path), "retrying")
    until(lambda: call.status().state == "retrying")
    call.cancel()
    assert_cancelled(call)
    assert mesh.ledger().count("begin retrying") == 1


def test_a_call_behind_another_one_is_cancelled(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("behind"))
    mesh.start_worker("--containers", "1")
    first = module.sleeps.spawn(str(mesh.ledger().path), "first")
    began(mesh, "first")
    second = module.sleeps.spawn(str(mesh.ledger().path), "second")
    second.cancel()
    assert_cancelled(second)
    first.cancel()
    until(lambda: queue_is_empty(mesh))
    assert mesh.ledger().count("begin second") == 0


def test_a_call_that_has_ended_stays_as_it_is(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("done"))
    call = module.sleeps.spawn(str(mesh.ledger().path), "done", 0)
    assert call.get(timeout=20) == "done"
    call.cancel()
    call.cancel()
    assert call.get() == "done"


def test_an_unknown_call_cannot_be_cancelled(mesh: Mesh) -> None:
    with pytest.raises(NotFoundError, match="there is no call"):
        FunctionCall.from_id(new_call_id("ABCDEFGH")).cancel()


def test_cancels_race_with_ends(mesh: Mesh) -> None:
    """Whoever is first: one outcome, that everybody sees; and what says cancelled has not succeeded after."""
    module = mesh.deploy(jobs("race"))
    path = str(mesh.ledger("race").path)
    module.sleeps.remote(path, "warm", 0)

    async def one(n: int) -> tuple[FunctionCall[str], str]:
        call = await module.sleeps.spawn.aio(path, f"n{n}", 0.005 * (n % 10))
        await asyncio.sleep(0.01 * (n % 7))
        await call.cancel.aio()
        return call, str((await call.status.aio()).state)

    async def all_of_them() -> list[tuple[FunctionCall[str], str]]:
        return await asyncio.gather(*(one(n) for n in range(200)))

    ended = asyncio.run(all_of_them())
    assert {state for _, state in ended} <= {"cancelled", "succeeded"}
    for call, state in ended:
        assert call.status().state == state
        with pytest.raises(RemoteError) if state == "cancelled" else contextlib.nullcontext():
            call.get(timeout=0)
    until(lambda: queue_is_empty(mesh))


def test_a_paused_worker_drops_what_was_cancelled_when_it_goes_on(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    module = mesh.deploy(jobs("paused"))
    worker = mesh.start_worker()
    call = module.sleeps.spawn(str(mesh.ledger().path), "a")
    process = began(mesh, "a")
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        call.cancel()
        assert_cancelled(call)
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    until(lambda: mesh.ledger().count("caught a InputCancellation"), what="its next renewal finds the result")
    assert module.sleeps.remote(str(mesh.ledger().path), "b", 0) == "b"
    assert began(mesh, "b") == process
    assert_cancelled(call)


def test_a_result_that_came_from_elsewhere_stops_what_runs(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    module = mesh.deploy(jobs("elsewhere"))
    mesh.start_worker()
    call = module.sleeps.spawn(str(mesh.ledger().path), "a")
    began(mesh, "a")

    async def store(broker: Broker) -> None:
        assert await broker.results.create(f"{call.object_id}.0", Result(state=State.SUCCEEDED, body=b"7"))

    mesh.ask(store)
    until(lambda: mesh.ledger().count("caught a InputCancellation"))
    until(lambda: queue_is_empty(mesh))
    assert call.get() == 7


def test_a_cancel_by_hand_needs_nothing_but_a_subject(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("hand"))
    call = module.sleeps.spawn(str(mesh.ledger().path), "hand")
    began(mesh, "hand")

    async def request(broker: Broker) -> None:
        await broker.connection.request(broker.topology.cancel_subject(call.object_id, "0"))

    mesh.ask(request)
    with pytest.raises(RemoteError, match="cancelled: somebody asked for it"):
        call.get(timeout=20)


def test_a_cancel_that_comes_before_the_delivery_is_not_forgotten(mesh: Mesh) -> None:
    """The server may have sent the input to a worker, where it is not yet: found by the chaos run, seed 11."""
    module = mesh.deploy(jobs("early"))
    path = str(mesh.ledger().path)
    module.sleeps.remote(path, "warm", 0)

    async def cancel_and_submit(broker: Broker) -> str:
        address = Address("early", "sleeps", "_", new_call_id(broker.token))
        assert not await broker.cancels.ask(address.call, 0, CancelRequest(reason="by somebody early"))
        await broker.calls.submit(Input(address=address, body=json.dumps({"args": [path, "early"]}).encode()))
        return address.call

    call = FunctionCall.from_id(mesh.ask(cancel_and_submit))
    with pytest.raises(RemoteError, match="cancelled: by somebody early"):
        call.get(timeout=20)
    assert mesh.ledger().count("begin early") == 0


# --- callers that go -------------------------------------------------------------------------------------------------

CALLER = """
    import sys
    import mesh
    mesh.Function.from_name(sys.argv[1], sys.argv[2]).remote(sys.argv[3], sys.argv[4], *map(float, sys.argv[5:]))
"""


def caller(mesh: Mesh, *arguments: str) -> subprocess.Popen[bytes]:
    """A process that waits in `remote`."""
    script = mesh.write(CALLER, folder="programs")
    return subprocess.Popen([sys.executable, str(script), *arguments], env=mesh.variables, stderr=subprocess.PIPE)


def test_ctrl_c_in_remote_cancels_the_call(mesh: Mesh) -> None:
    mesh.deploy(jobs("ctrl-c"))
    process = caller(mesh, "ctrl-c", "sleeps", str(mesh.ledger().path), "ctrl-c")
    began(mesh, "ctrl-c")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.strip().endswith(b"KeyboardInterrupt")
    assert mesh.ledger().count("caught ctrl-c InputCancellation") == 1


@pytest.mark.parametrize("at_once", [1, 2], ids=["main-thread", "thread"])
@pytest.mark.parametrize("way", ["remote", "map"])
def test_what_a_cancelled_call_waits_for_is_cancelled(mesh: Mesh, way: str, at_once: int) -> None:
    module = mesh.deploy(
        f"""
        import mesh, time
        app = mesh.App("cancel-nested-{way}-{at_once}")

        @app.function()
        def inner(path, n):
            with open(path, "a") as file:
                file.write(mesh.current_function_call_id() + "\\n")
            time.sleep(120)

        @app.function()
        @mesh.concurrent(max_inputs={at_once})
        def outer(path, way):
            return inner.remote(path, 0) if way == "remote" else list(inner.map([path] * 2, range(2)))
        """
    )
    ledger = mesh.ledger(f"cancel-nested-{way}-{at_once}")
    call = module.outer.spawn(str(ledger.path), way)
    until(lambda: ledger.lines(), what="the inner call runs")
    call.cancel()
    with pytest.raises(RemoteError, match="cancelled: by"):
        call.get(timeout=30)
    with pytest.raises(RemoteError, match="cancelled: by"):
        FunctionCall.from_id(ledger.lines()[0]).get(timeout=30)


def test_a_task_that_is_cancelled_in_remote_cancels_the_call(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("task"))

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(module.waits.remote.aio(str(mesh.ledger().path), "task"), 2)

    asyncio.run(impatient())
    assert mesh.ledger().count("caught task CancelledError") == 1


def test_ctrl_c_leaves_a_detached_call_alone(mesh: Mesh) -> None:
    mesh.deploy(jobs("detach"))
    process = caller(mesh, "detach", "detached", str(mesh.ledger().path), "detached", "2")
    began(mesh, "detached")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    until(lambda: mesh.ledger().count("end detached"))


def test_dead_callers_take_their_remote_calls_along(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2, caller_silence=8)
    module = mesh.deploy(jobs("caller"))
    mesh.start_worker("--containers", "2")
    path = str(mesh.ledger().path)
    spawned = module.holds.spawn(path, "spawned")
    began(mesh, "spawned")
    running = caller(mesh, "caller", "waits", path, "running")
    began(mesh, "running")
    next_one = module.holds.spawn(path, "next")  # what takes the place that the running one will leave
    queued = caller(mesh, "caller", "stubborn", path, "queued")
    living: list[str] = []
    waiter = threading.Thread(target=lambda: living.append(module.waits.remote(path, "living", 0)))
    waiter.start()
    until(lambda: len(clients(mesh)) == 3, what="everybody has said that he waits")
    for process in (running, queued):
        process.kill()
        process.communicate()
    until(lambda: mesh.ledger().count("caught running CancelledError"), timeout=60)
    until(lambda: cancelled(mesh) == ["stubborn", "waits"], timeout=60, what="both, whoever held them")
    assert mesh.ledger().count("begin queued") == 0
    mesh.ledger("ledger.go").path.touch()
    assert spawned.get(timeout=60) == "spawned"
    next_one.get(timeout=60)
    waiter.join()
    assert living == ["living"]
    until(lambda: queue_is_empty(mesh))
    until(lambda: clients(mesh) == [], what="nobody waits any more")


def cancelled(mesh: Mesh) -> list[str]:
    """Functions whose calls ended because their caller had gone."""
    found = json.loads(mesh.cli("call", "list", "--state", "cancelled", "--error", "caller has gone", "--json").stdout)
    return sorted(call["function"] for call in found["calls"])


def test_what_a_client_left_behind_does_not_end_its_new_calls(own_mesh: Callable[..., Mesh]) -> None:
    """A client that lives may not have got rid of its entry; what it waits for since is not old enough to tell."""
    mesh = own_mesh()
    mesh.deploy(jobs("left-behind"))

    async def look(broker: Broker) -> None:
        broker.clients.silence = 4.0
        with broker.clients.waiting():
            await eventually(lambda: broker.clients.silent(float("inf")))
        broker.clients._entry = None  # the request that takes it back is lost
        await eventually(lambda: broker.clients.silent(time.time()))
        watch = Watch(broker, "nobody", {}, lambda held, request: None)
        watch._up_since = 0.0
        address = Address("left-behind", "sleeps", "_", new_call_id(broker.token))
        await broker.calls.submit(Input(address=address, body=b"{}", kind="remote"))
        await watch.callers()
        assert await broker.calls.find(address.call) is not None
        assert await broker.clients.silent(time.time()), "it stays, for when the call is old"

        async def given_up() -> bool:
            await watch.callers()
            return await broker.calls.find(address.call) is None

        await eventually(given_up)
        assert await broker.clients.silent(float("inf")) == {}

    async def with_own_broker() -> None:
        broker = await Broker.open(mesh.settings)
        try:
            await look(broker)
        finally:
            await broker.close()

    asyncio.run(with_own_broker())


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.05)


def clients(mesh: Mesh) -> list[str]:
    """Tokens under which somebody says that he waits."""

    async def read(broker: Broker) -> list[str]:
        return list(await broker.clients.silent(float("inf")))

    return mesh.ask(read)
