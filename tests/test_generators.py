"""`remote_gen`: what a generator yields, read while it goes on, on a real mesh."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mesh import Function, FunctionCall, client
from mesh.broker import Broker
from mesh.exception import (
    ConnectionError,
    Error,
    ExecutionError,
    FunctionTimeoutError,
    InternalFailure,
    InvalidError,
    RemoteError,
    SerializationError,
)
from mesh.flow import MAX_ITEMS, WINDOW
from mesh.protocol import Input, PoolKey, State
from mesh.server import NatsServer
from tests.support import Mesh, WorkerProcess, alive, until

JOBS = """
    import asyncio, mesh, os, threading, time
    app = mesh.App({name!r})

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function()
    def count(n):
        yield from range(n)

    @app.function()
    async def count_async(n):
        for i in range(n):
            yield i

    @app.function(is_generator=True)
    def returns_one(n):
        return (i for i in range(n))

    @app.function(is_generator=True)
    def returns_a_list(n):
        return [n]

    @app.function()
    def plain(n):
        return n

    @app.function()
    def large(n, size):
        for i in range(n):
            yield bytes([i]) * size

    @app.function()
    def odd_things(what):
        yield 1
        yield what
        yield threading.Lock()
        yield 3

    class MyError(Exception):
        pass

    @app.function()
    def fails(n):
        yield from range(n)
        raise MyError("half-way")

    @app.function()
    async def fails_async(n):
        for i in range(n):
            yield i
        raise MyError("half-way")

    @app.function()
    def exits(n):
        yield from range(n)
        raise SystemExit(3)

    @app.function()
    def slow(path, n, pause):
        note(path, f"begin {{os.getpid()}}")
        try:
            for i in range(n):
                note(path, f"yield {{i}}")
                yield i
                time.sleep(pause)
        finally:
            note(path, "finally")

    @app.function()
    async def slow_async(path, n, pause):
        note(path, f"begin {{os.getpid()}}")
        try:
            for i in range(n):
                note(path, f"yield {{i}}")
                yield i
                await asyncio.sleep(pause)
        finally:
            note(path, "finally")

    @app.function()
    def endless(path, size):
        note(path, f"begin {{os.getpid()}}")
        try:
            while True:
                note(path, "yield")
                yield b"x" * size
        finally:
            note(path, "finally")

    @app.function(timeout=2)
    def never_in_time(n):
        yield from range(n)
        time.sleep(60)

    @app.function()
    def sums(n):
        return sum(count.remote_gen(n))

    @app.function()
    async def doubles(n):
        async for i in count.remote_gen.aio(n):
            yield 2 * i
"""

SIDE_BY_SIDE = """
    import asyncio, mesh, os, time
    app = mesh.App({name!r})

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    def sync(path, n, pause):
        try:
            for i in range(n):
                yield os.getpid(), i
                time.sleep(pause)
        finally:
            with open(path, "a") as file:
                file.write("finally\\n")

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    async def on_loop(path, n, pause):
        try:
            for i in range(n):
                yield os.getpid(), i
                await asyncio.sleep(pause)
        finally:
            with open(path, "a") as file:
                file.write("finally\\n")
"""

MANY = 100_000


def jobs(mesh: Mesh, name: str) -> ModuleType:
    return mesh.deploy(JOBS.format(name=name))


def begun(mesh: Mesh, ledger: str = "ledger") -> int:
    """The container that began."""
    until(lambda: mesh.ledger(ledger).count("begin"))
    return int(mesh.ledger(ledger).lines()[0].split()[1])


def worker_of(mesh: Mesh, call: str) -> WorkerProcess:
    """The worker that wrote down that it begins a call."""
    log = mesh.ask(lambda broker: broker.attempts.get(f"{call}.0"))
    assert log.begun is not None
    (worker,) = (worker for worker in mesh.workers if f"worker {log.begun.worker} is ready" in worker.log)
    return worker


def until_it_fails(items: Iterable[Any]) -> tuple[list[Any], Exception | None]:
    """What came, and the exception after it, if there was one."""
    found: list[Any] = []
    try:
        for item in items:
            found.append(item)
    except Exception as error:
        return found, error
    return found, None


def the_call(mesh: Mesh, app: str) -> str:
    """The id of the one call of an app that has not ended."""
    (found,) = mesh.ask(lambda broker: broker.calls.of_app(app))
    return str(found.subject.split(".")[-2])


def state(mesh: Mesh, call: str) -> State | None:
    result = mesh.ask(lambda broker: broker.results.get(f"{call}.0"))
    return result.state if result else None


def memory(pid: int) -> int:
    """MiB a process has in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["count", "count_async", "returns_one"])
def test_many_small_items_come_all_and_in_order(mesh: Mesh, function: str) -> None:
    module = jobs(mesh, f"gen-many-{function}")
    generator = getattr(module, function)
    assert list(generator.remote_gen(0)) == []
    assert list(generator.remote_gen(3)) == [0, 1, 2]
    assert list(generator.remote_gen(MANY)) == list(range(MANY))


def test_async_iteration(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-aio")

    async def read() -> None:
        assert [i async for i in module.count.remote_gen.aio(5)] == list(range(5))
        found = Function.from_name("gen-aio", "count_async")
        assert [i async for i in found.remote_gen.aio(MANY)] == list(range(MANY))

    asyncio.run(read())


def test_large_items_come_whole(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-large")
    sizes = [0, 1, (128 << 10) - 6, 128 << 10, (128 << 10) + 1, 5 << 20]
    for size in sizes:
        assert list(module.large.remote_gen(3, size)) == [bytes([i]) * size for i in range(3)]


def test_what_cannot_be_pickled_is_an_error_in_its_place(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-unpicklable")
    items = iter(module.odd_things.remote_gen({"any": {1, 2}}))
    assert [next(items), next(items)] == [1, {"any": {1, 2}}]
    with pytest.raises(SerializationError, match="lock"):
        next(items)


@pytest.mark.parametrize("function", ["fails", "fails_async"])
def test_an_exception_comes_after_the_items_before_it(mesh: Mesh, function: str) -> None:
    module = jobs(mesh, f"gen-{function}")
    for n in (0, 1, 5_000):
        found, error = until_it_fails(getattr(module, function).remote_gen(n))
        assert found == list(range(n))
        assert isinstance(error, module.MyError)
        assert "raise MyError" in str(error.__notes__)


def test_any_other_end_is_an_error_too(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-exits")
    items = iter(module.exits.remote_gen(2))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ExecutionError, match="SystemExit"):
        next(items)


def test_a_slow_producer_is_alive(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-slow")
    path = str(mesh.ledger("gen-slow").path)
    seen = []
    for item in module.slow.remote_gen(path, 2, 11.0):
        seen.append(item)
        assert mesh.ledger("gen-slow").count("yield") == len(seen), "each comes before the next is made"
    assert seen == [0, 1]


@pytest.mark.parametrize("function", ["slow", "slow_async"])
def test_the_first_item_waits_for_no_other(mesh: Mesh, function: str) -> None:
    module = jobs(mesh, f"gen-first-{function}")
    path = str(mesh.ledger(f"gen-first-{function}").path)
    items = iter(getattr(module, function).remote_gen(path, 2, 300.0))
    assert next(items) == 0
    items.close()


def test_items_are_taken_one_by_one(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-next")
    items = module.count.remote_gen(3)
    assert [next(items), next(items), *items] == [0, 1, 2]
    assert next(items, None) is None
    items = module.count.remote_gen(100_000)
    assert next(items) == 0
    items.close()
    assert list(items) == []


def test_the_value_of_the_call_is_how_many_there_were(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-count")
    path = str(mesh.ledger("gen-count").path)
    items = iter(module.slow.remote_gen(path, 3, 1.0))
    next(items)
    call = the_call(mesh, "gen-count")
    assert list(items) == [1, 2]
    assert FunctionCall.from_id(call).get() == 3


def test_many_are_read_side_by_side(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-many")

    async def read(n: int) -> list[int]:
        return [i async for i in module.count.remote_gen.aio(n)]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*(read(n) for n in range(1000, 1040)))

    assert asyncio.run(read_all()) == [list(range(n)) for n in range(1000, 1040)]


@pytest.mark.parametrize("function", ["sync", "on_loop"])
def test_several_run_in_one_container(own_mesh: Callable[..., Mesh], function: str) -> None:
    mesh = own_mesh()
    module = mesh.deploy(SIDE_BY_SIDE.format(name="gen-beside"))
    worker = mesh.start_worker()
    generator, path = getattr(module, function), str(mesh.ledger().path)
    slow = [iter(generator.remote_gen(path, 10**6, 0.05)) for _ in range(2)]
    (container,) = {next(items)[0] for items in slow}
    n = 3 * WINDOW * MAX_ITEMS
    assert list(generator.remote_gen(path, n, 0.0)) == [(container, i) for i in range(n)]
    short = iter(generator.remote_gen(path, n, 0.0))
    assert next(short) == (container, 0)
    for items in slow:
        items.close()
    until(lambda: mesh.ledger().count("finally") == 3)
    worker.process.send_signal(signal.SIGTERM)  # what runs may end, and is given credit for that
    assert [i for _, i in short] == list(range(1, n))
    assert worker.process.wait(30) == 0
    assert mesh.ledger().count("finally") == 4


def test_generators_call_generators(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-nested")
    assert module.sums.remote(1000) == sum(range(1000))
    assert list(module.doubles.remote_gen(1000)) == list(range(0, 2000, 2))


def test_nested_generators_share_one_place(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "gen-lent")
    mesh.start_worker("--containers", "1")
    assert list(module.doubles.remote_gen(3)) == [0, 2, 4], "who waits for items lends its place"


def test_a_generator_that_takes_too_long(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-timeout")
    items = iter(module.never_in_time.remote_gen(3))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FunctionTimeoutError, match="2 s"):
        next(items)


# --- how it may be called --------------------------------------------------------------------------------------------


def test_generators_and_functions_are_not_called_alike(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-calls")
    with pytest.raises(InvalidError, match=r"no generator function: use \.remote\(\)"):
        module.plain.remote_gen(1)
    with pytest.raises(InvalidError, match=r"no generator function: use \.remote\(\)"):
        list(Function.from_name("gen-calls", "plain").remote_gen(1))
    for method in (module.count.remote, module.count.spawn):
        with pytest.raises(InvalidError, match=r"use \.remote_gen\(\)"):
            method(1)
    with pytest.raises(InvalidError, match=r"use \.remote_gen\(\)"):
        list(module.count.map([1]))
    with pytest.raises(InvalidError, match="no generator but a list"):
        list(module.returns_a_list.remote_gen(1))
    assert list(module.count.local(3)) == [0, 1, 2]
    assert module.count.is_generator


def test_the_blocking_form_in_an_event_loop_says_what_to_use(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-face")

    async def read() -> None:
        iter(module.count.remote_gen(1))

    with pytest.raises(ExecutionError, match=r"async for … in \.remote_gen\.aio"):
        asyncio.run(read())


def test_who_never_iterates_is_warned(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-unused")
    with pytest.warns(RuntimeWarning, match="nobody iterated"):
        module.count.remote_gen(1)


def test_mesh_run_refuses_generators(mesh: Mesh) -> None:
    path = mesh.write(JOBS.format(name="gen-run"), folder="programs")
    done = mesh.cli("run", f"{path}::count", "--n", "3", check=False)
    assert done.returncode == 2
    assert "'count' is a generator function, which `mesh run` cannot run" in done.stderr
    assert "remote_gen" in done.stderr


# --- back-pressure ---------------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_its_generator_back(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "gen-ahead")
    mesh.start_worker()
    items = iter(module.endless.remote_gen(str(mesh.ledger().path), 1))
    next(items)
    made = -1
    while made != (made := mesh.ledger().count("yield")):
        time.sleep(0.3)
    assert MAX_ITEMS < made <= (WINDOW + 2) * MAX_ITEMS
    for _ in range(3 * WINDOW * MAX_ITEMS):  # and goes on once there is room
        next(items)
    items.close()
    assert mesh.ledger().count("finally") == 1


def test_memory_stays_flat_however_large_and_many_the_items(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "gen-flat")
    worker = mesh.start_worker()
    items = iter(module.endless.remote_gen(str(mesh.ledger().path), 100_000))
    for _ in range(50):
        next(items)
    container = begun(mesh)
    before = memory(container), memory(worker.pid)
    for i in range(2000):  # 200 MB
        next(items)
        if i % 500 == 0:
            time.sleep(0.2)  # the generator runs ahead as far as it may
    grown = memory(container) - before[0], memory(worker.pid) - before[1]
    items.close()
    assert max(grown) < 20, f"container and worker grew by {grown} MiB"


# --- ending early ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["slow", "slow_async"])
def test_leaving_early_cancels_it(mesh: Mesh, function: str) -> None:
    name = f"gen-left-{function}"
    module = jobs(mesh, name)
    for _ in getattr(module, function).remote_gen(str(mesh.ledger(name).path), 10, 300.0):
        call = the_call(mesh, name)
        break
    assert state(mesh, call) is State.CANCELLED
    assert mesh.ledger(name).count("finally") == 1


def test_leaving_while_it_waits_for_its_reader_cancels_it(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-left-full")
    items = iter(module.endless.remote_gen(str(mesh.ledger("gen-left-full").path), 100_000))
    next(items)
    call = the_call(mesh, "gen-left-full")
    items.close()
    assert state(mesh, call) is State.CANCELLED
    assert mesh.ledger("gen-left-full").count("finally") == 1


def test_leaving_an_async_iteration_cancels_it(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-left-aio")
    path = str(mesh.ledger("gen-left-aio").path)

    async def read() -> None:
        async with contextlib.aclosing(module.slow_async.remote_gen.aio(path, 10, 300.0)) as items:
            async for _ in items:
                break

    asyncio.run(read())
    assert mesh.ledger("gen-left-aio").count("finally") == 1


def test_cancelling_the_task_that_iterates_cancels_it(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-left-task")

    async def read() -> None:
        async for _ in module.slow.remote_gen.aio(str(mesh.ledger("gen-left-task").path), 10, 300.0):
            pass

    async def read_for_a_while() -> None:
        reading = asyncio.create_task(read())
        while not mesh.ledger("gen-left-task").count("yield"):
            await asyncio.sleep(0.02)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(read_for_a_while())
    assert mesh.ledger("gen-left-task").count("finally") == 1


def test_a_cancel_from_elsewhere_ends_the_iteration(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-cancelled")
    items = iter(module.slow.remote_gen(str(mesh.ledger("gen-cancelled").path), 10, 300.0))
    assert next(items) == 0
    mesh.cli("call", "cancel", the_call(mesh, "gen-cancelled"))
    with pytest.raises(RemoteError, match="cancelled: by mesh call cancel"):
        next(items)
    assert mesh.ledger("gen-cancelled").count("finally") == 1


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_generator_ends_with_the_process_that_reads_it(own_mesh: Callable[..., Mesh], end: signal.Signals) -> None:
    mesh = own_mesh(caller_silence=8, ack_wait=3)
    jobs(mesh, "gen-reader")
    mesh.start_worker()
    script = mesh.write(
        f"""
        import mesh
        for item in mesh.Function.from_name("gen-reader", "slow").remote_gen({str(mesh.ledger().path)!r}, 999, 0.2):
            print(item, flush=True)
        """,
        folder="programs",
    )
    reader = subprocess.Popen([sys.executable, str(script)], env=mesh.variables, stdout=subprocess.PIPE)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"0\n"
        call = the_call(mesh, "gen-reader")
        reader.send_signal(end)
        reader.wait(20)
    finally:
        reader.kill()
        reader.communicate()
    until(lambda: state(mesh, call) is State.CANCELLED, timeout=60)
    assert mesh.ledger().count("finally") == 1


def test_a_closed_connection_never_looks_like_the_end(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "gen-closed")

    async def use() -> list[int]:
        async def close() -> None:
            while not await (await client.broker()).calls.of_app("gen-closed"):
                await asyncio.sleep(0.02)
            await client.close()

        closing = asyncio.create_task(close())
        try:
            return [x async for x in module.count.remote_gen.aio(5)]
        finally:
            await closing

    with pytest.raises(Error, match="the connection was closed before all of them were there"):
        asyncio.run(use())


# --- what dies half-way ----------------------------------------------------------------------------------------------


def test_container_killed_half_way(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-killed")
    items = iter(module.slow.remote_gen(str(mesh.ledger("gen-killed").path), 10, 300.0))
    assert next(items) == 0
    call = the_call(mesh, "gen-killed")
    container = begun(mesh, "gen-killed")
    os.kill(container, signal.SIGKILL)
    with pytest.raises(InternalFailure, match=r"ended half-way.*SIGKILL"):
        next(items)
    assert state(mesh, call) is State.FAILED
    assert mesh.ledger("gen-killed").count("begin") == 1, "it does not begin again"


@pytest.mark.parametrize("ack_wait", [2, 15])
def test_worker_killed_half_way(own_mesh: Callable[..., Mesh], ack_wait: int) -> None:
    """Another worker notices when the lease has run out, the reader by silence: whichever is first."""
    mesh = own_mesh(ack_wait=ack_wait)
    module = jobs(mesh, "gen-worker")
    for _ in range(2):
        mesh.start_worker()
    items = iter(module.slow.remote_gen(str(mesh.ledger().path), 1000, 0.1))
    found = [next(items) for _ in range(5)]
    call = the_call(mesh, "gen-worker")
    container = begun(mesh)
    worker_of(mesh, call).kill()
    more, error = until_it_fails(items)
    found += more
    assert found == list(range(len(found)))
    assert isinstance(error, InternalFailure)
    assert re.search(r"worker \S+ lost|its worker has not been heard of for 10 s", str(error))
    until(lambda: state(mesh, call) is (State.FAILED if ack_wait == 2 else State.CANCELLED))
    until(lambda: not alive(container))
    until(lambda: not mesh.ask(lambda broker: broker.calls.of_app("gen-worker")))
    assert mesh.ledger().count("begin") == 1, "it does not begin again"


def test_a_worker_that_stops_half_way(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "gen-stop")
    worker = mesh.start_worker(MESH_GRACE="1")
    items = iter(module.slow.remote_gen(str(mesh.ledger().path), 10, 300.0))
    assert next(items) == 0
    call = the_call(mesh, "gen-stop")
    assert worker.stop() == 0
    with pytest.raises(InternalFailure, match=r"ended half-way.*its worker stopped"):
        next(items)
    assert state(mesh, call) is State.FAILED


def test_a_worker_that_stops_lets_a_short_one_end(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "gen-drain")
    worker = mesh.start_worker()
    items = iter(module.slow.remote_gen(str(mesh.ledger().path), 10, 0.2))
    assert next(items) == 0
    worker.process.send_signal(signal.SIGTERM)
    assert list(items) == list(range(1, 10))
    assert worker.process.wait(20) == 0


def test_what_had_not_begun_is_run_by_another_worker(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    module = jobs(mesh, "gen-queued")
    blocked = mesh.start_worker("--containers", "1")
    blocking = iter(module.slow.remote_gen(str(mesh.ledger().path), 10, 300.0))
    assert next(blocking) == 0

    async def delivered(broker: Broker) -> bool:
        consumer = broker.topology.consumer(PoolKey("gen-queued", "count"))
        return bool(
            (await broker.connection.api(f"CONSUMER.INFO.{broker.topology.calls}.{consumer}"))["num_ack_pending"]
        )

    items = module.count.remote_gen.aio(5)

    async def read() -> list[int]:
        reading = asyncio.create_task(anext(items))
        while not await delivered(await client.broker()):
            await asyncio.sleep(0.02)
        blocked.kill()
        mesh.start_worker()
        return [await reading, *[i async for i in items]]

    assert asyncio.run(read()) == list(range(5))
    with pytest.raises(InternalFailure):
        next(blocking)


def test_server_restarted_half_way(
    own_server: Callable[..., NatsServer], own_mesh: Callable[..., Mesh], tmp_path: Path
) -> None:
    """Items on their way are lost, or not: either way there is no wrong item, and no end too soon."""
    server = own_server(store=tmp_path / "store")
    mesh = own_mesh(nats_url=server.url)
    module = jobs(mesh, "gen-server")
    mesh.start_worker()
    items = iter(module.slow.remote_gen(str(mesh.ledger().path), 500, 0.02))
    found = [next(items) for _ in range(5)]
    server.kill()
    own_server(store=tmp_path / "store", port=server.port)
    more, error = until_it_fails(items)
    found += more
    assert found == list(range(len(found)))
    assert len(found) == 500 if error is None else isinstance(error, InternalFailure | ConnectionError)
    until(lambda: not mesh.ask(lambda broker: broker.calls.of_app("gen-server")), timeout=60)
    assert mesh.ledger().count("begin") == 1
    assert mesh.ledger().count("finally") == 1


def test_a_server_that_stays_away_is_an_error(
    own_server: Callable[..., NatsServer], own_mesh: Callable[..., Mesh], tmp_path: Path
) -> None:
    server = own_server(store=tmp_path / "store")
    mesh = own_mesh(nats_url=server.url)
    module = jobs(mesh, "gen-away")
    mesh.start_worker()
    items = iter(module.slow.remote_gen(str(mesh.ledger().path), 500, 0.1))
    next(items)
    server.kill()
    with pytest.raises(ConnectionError, match="the server is away"):
        list(items)


def test_a_lost_chunk_is_an_error(mesh: Mesh) -> None:
    """Somebody else's message in the flow is the same as one that is missing."""
    module = jobs(mesh, "gen-gap")
    items = iter(module.slow.remote_gen(str(mesh.ledger("gen-gap").path), 10, 300.0))
    assert next(items) == 0
    call = the_call(mesh, "gen-gap")

    async def publish(broker: Broker) -> None:
        await broker.connection.publish(broker.topology.flow_subject(call, 0, "out"), b"", {"Mesh-Chunk": "3"})

    mesh.ask(publish)
    with pytest.raises(InternalFailure, match="after 1 items: chunk 3 came after chunk 1"):
        next(items)
    until(lambda: state(mesh, call) is State.CANCELLED)
    assert mesh.ledger("gen-gap").count("finally") == 1


def test_lost_credit_is_made_good(own_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh.broker.flows import Reader

    mesh = own_mesh()
    module = jobs(mesh, "gen-credit")
    mesh.start_worker()
    lost = 0
    grant = Reader._grant

    async def lose(reader: Reader) -> None:
        nonlocal lost
        lost += 1
        if lost > 3:
            await grant(reader)

    monkeypatch.setattr(Reader, "_grant", lose)
    n = 3 * WINDOW * MAX_ITEMS
    assert list(module.count.remote_gen(n)) == list(range(n))
    assert lost > 3


def test_a_generator_that_failed_is_not_sent_again_by_others(mesh: Mesh) -> None:
    module = jobs(mesh, "gen-dead")
    with pytest.raises(module.MyError):
        list(module.fails.remote_gen(1))

    async def letters(broker: Broker) -> list[str]:
        return list(await broker.connection.subjects(broker.topology.dead, f"{broker.topology.root}.dead.gen-dead.>"))

    [letter] = until(lambda: mesh.ask(letters))
    done = mesh.cli("call", "retry", letter.split(".")[-2], check=False)
    assert done.returncode != 0
    assert "only whoever reads it can call it again" in done.stderr


def test_a_generator_by_hand(mesh: Mesh) -> None:
    """A call that nobody reads, made without the SDK: it is refused as what it is, and never hangs."""
    jobs(mesh, "gen-hand")
    from mesh.protocol import Address, new_call_id

    async def submit(broker: Broker) -> str:
        call = new_call_id(broker.token)
        await broker.calls.submit(Input(address=Address("gen-hand", "count", "_", call), body=b'{"args": [3]}'))
        return call

    with pytest.raises(InvalidError, match="returned a generator"):
        FunctionCall.from_id(mesh.ask(submit)).get(timeout=20)
