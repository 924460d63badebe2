"""`spawn_map`, and calls of many inputs as any process sees them: read, counted, cancelled, cut off half-way."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from mesh import Function, FunctionCall, sweep
from mesh.broker import Broker
from mesh.broker.several import Several
from mesh.exception import InvalidError, NotFoundError, RemoteError
from mesh.progress import line
from mesh.protocol import Result, State, token_of
from mesh.records import CallRecord
from mesh.server import NatsServer
from tests.support import Mesh, new_mesh, until

MANY = """
    import asyncio, mesh, os, time
    app = mesh.App({name!r})

    @app.function()
    def double(x, *, plus=0):
        return 2 * x + plus

    @app.function()
    def odd(x):
        if x % 2:
            raise ValueError(f"{{x}} is odd")
        return x

    @app.function(timeout=300)
    def waits(path, x):
        with open(path, "a") as file:
            file.write(f"begin {{x}}\\n")
        while not os.path.exists(path + ".go"):
            time.sleep(0.02)
        return x

    @app.function()
    def noted(path, x):
        with open(path, "a") as file:
            file.write(f"{{x}}\\n")
        time.sleep(0.005)
        return x

    @app.function()
    @mesh.batched(max_batch_size=8, wait_ms=50)
    def together(xs):
        return [x + 1 for x in xs]

    @app.function()
    @mesh.concurrent(max_inputs=10)
    async def at_once(x):
        await asyncio.sleep(0.001)
        return x + 2

    @app.function()
    def yields(x):
        yield x

    @app.function(timeout=300)
    def parent(path, count):
        return list(waits.map([path] * count, range(count)))

    @app.cls()
    class Adder:
        by: int = mesh.parameter(default=1)

        @mesh.method()
        def add(self, x, y=0):
            return x + y + self.by
"""


def many(mesh: Mesh, name: str) -> object:
    return mesh.deploy(MANY.format(name=name))


def calls_of(mesh: Mesh, app: str) -> list[CallRecord]:
    """The records of calls of several inputs, newest first."""
    records, _ = mesh.ask(lambda broker: broker.several.newest(100))
    return [record for record in records if record.app == app]


def queued(mesh: Mesh, app: str) -> int:
    return mesh.ask(lambda broker: broker.calls.count(broker.topology.call_filter(app=app)))


# --- values ----------------------------------------------------------------------------------------------------------


def test_spawn_map_gives_a_handle_on_all_inputs(mesh: Mesh) -> None:
    module = many(mesh, "many-values")
    call = module.double.spawn_map(range(600), kwargs={"plus": 1})
    assert call.num_inputs() == 600
    assert list(call.iter()) == [2 * x + 1 for x in range(600)]
    resumed = FunctionCall.from_id(call.object_id)
    assert list(resumed.iter(start=598)) == [1197, 1199]
    assert list(resumed.iter(start=3, end=5)) == [7, 9]
    assert list(resumed.iter(start=5, end=5)) == list(resumed.iter(start=600)) == []
    assert (resumed.get(index=599), resumed.num_inputs()) == (1199, 600)
    status = resumed.status()
    assert (status.inputs, status.outstanding, status.done, status.failed) == (600, 0, 600, 0)
    assert (status.state, resumed.status(index=7).index) == (State.SUCCEEDED, 7)
    with pytest.raises(NotFoundError, match="has 600 inputs, and none with the index 600"):
        resumed.get(index=600)
    for start, end in ((-1, None), (3, 2)):
        with pytest.raises(ValueError, match="make no range"):
            resumed.iter(start=start, end=end)


def test_whatever_is_called_can_be_called_with_many_inputs(mesh: Mesh) -> None:
    module = many(mesh, "many-kinds")
    adder = module.Adder(by=10)
    assert list(adder.add.spawn_map([1, 2], itertools.repeat(100)).iter()) == [111, 112]
    assert list(module.together.spawn_map(range(30)).iter()) == list(range(1, 31))
    assert list(module.at_once.spawn_map(range(30)).iter()) == list(range(2, 32))
    assert list(module.double.with_options(timeout=99).spawn_map([1]).iter()) == [2]
    empty = module.double.spawn_map([])
    assert (empty.num_inputs(), list(empty.iter()), empty.status().state) == (0, [], State.SUCCEEDED)
    with pytest.raises(InvalidError, match=r"'yields' is a generator function"):
        module.yields.spawn_map([1])
    with pytest.raises(InvalidError, match=r"spawn_map takes iterables of inputs, not 5"):
        module.double.spawn_map(5)


def test_its_async_face_and_asynchronous_iterables(mesh: Mesh) -> None:
    module = many(mesh, "many-async")

    async def slowly() -> AsyncIterator[int]:
        for x in range(5):
            await asyncio.sleep(0.01)
            yield x

    async def use() -> list[int]:
        call = await module.double.spawn_map.aio(slowly())
        return [x async for x in call.iter.aio()]

    assert asyncio.run(use()) == [0, 2, 4, 6, 8]


def test_a_failed_input_raises_in_its_place_and_is_counted(mesh: Mesh) -> None:
    module = many(mesh, "many-odd")
    call = module.odd.spawn_map([0, 2, 3, 4])
    values = iter(call.iter())
    assert [next(values), next(values)] == [0, 2]
    with pytest.raises(ValueError, match="3 is odd"):
        next(values)
    assert list(call.iter(start=3)) == [4]
    status = until(lambda: s if (s := call.status()).failed else None)
    assert (status.state, status.done, status.failed, status.outstanding) == (State.FAILED, 3, 1, 0)


def test_an_iterable_that_fails_takes_back_what_was_submitted(mesh: Mesh) -> None:
    module = many(mesh, "many-broken")
    path = str(mesh.ledger("many-broken").path)

    def broken() -> Iterator[str]:
        yield from [path] * 100
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        module.waits.spawn_map(broken(), itertools.count())
    until(lambda: queued(mesh, "many-broken") == 0)
    (record,) = calls_of(mesh, "many-broken")
    assert record.count == 100
    assert FunctionCall.from_id(record.call).status().state is State.CANCELLED


# --- being submitted -------------------------------------------------------------------------------------------------


def submitted_slowly(mesh: Mesh, app: str, first: int) -> tuple[FunctionCall[int], threading.Event, threading.Thread]:
    """A call whose submitter, a thread, has given so many inputs, and gives one more, the last, after the event."""
    module = many(mesh, app)
    go = threading.Event()

    def slowly() -> Iterator[int]:
        yield from range(first)
        assert go.wait(60)
        yield first

    submitting = threading.Thread(target=lambda: module.double.spawn_map(slowly()))
    submitting.start()
    (record,) = until(lambda: calls_of(mesh, app))
    return FunctionCall.from_id(record.call), go, submitting


def test_others_read_what_is_still_being_submitted(mesh: Mesh) -> None:
    call, go, submitting = submitted_slowly(mesh, "many-slow", 10)
    values = iter(call.iter())
    assert [next(values) for _ in range(10)] == list(range(0, 20, 2))
    assert call.status().submitting
    go.set()
    assert list(values) == [20], "then it ends, without waiting for more"
    submitting.join()
    assert call.num_inputs() == 11


def test_an_input_that_comes_and_ends_between_two_looks_is_found(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    call, go, submitting = submitted_slowly(mesh, "many-between", 1)
    assert call.get(index=0) == 0
    read = Several.get

    async def late(several: Several, name: str) -> CallRecord | None:
        """The record as it is when the input has come, and ended, after it was looked for."""
        go.set()
        await asyncio.to_thread(submitting.join)
        await call.get.aio(index=1)
        return await read(several, name)

    async def look(broker: Broker) -> Result | None:
        monkeypatch.setattr(Several, "get", lambda several, name: (monkeypatch.undo(), late(several, name))[1])
        return await call._look(broker, 1)

    found = mesh.ask(look)
    assert found is not None
    assert found.state == "succeeded"


def test_reading_ends_where_the_last_input_comes_between_two_looks(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    call, go, submitting = submitted_slowly(mesh, "many-last", 1)
    read = Several.get

    async def stale(several: Several, name: str) -> CallRecord | None:
        """The record as it was just before the last input was submitted."""
        monkeypatch.undo()
        record = await read(several, name)
        go.set()
        await asyncio.to_thread(submitting.join)
        return record

    monkeypatch.setattr(Several, "get", stale)
    assert list(call.iter(start=2)) == []


def test_a_submitter_killed_half_way_leaves_a_call_that_can_be_read_and_cancelled(
    own_mesh: Callable[..., Mesh],
) -> None:
    mesh = own_mesh()
    many(mesh, "many-killed")
    path = mesh.ledger().path
    script = mesh.write(
        f"""
        import itertools, mesh, time
        def slowly():
            for x in itertools.count():
                time.sleep(0.1 if x > 500 else 0)
                yield {str(path)!r}
        mesh.Function.from_name("many-killed", "waits").spawn_map(slowly(), itertools.count())
        """,
        folder="programs",
    )
    submitter = subprocess.Popen([sys.executable, str(script)], env=mesh.variables)
    try:
        until(lambda: queued(mesh, "many-killed") > 500, timeout=60)
        submitter.kill()
    finally:
        submitter.kill()
        submitter.wait()
    mesh.start_worker("--containers", "2")
    (record,) = calls_of(mesh, "many-killed")
    call = FunctionCall.from_id(record.call)
    inputs = queued(mesh, "many-killed")
    assert record.count is None
    assert call.num_inputs() == inputs
    assert call.status().outstanding == inputs
    shown = json.loads(mesh.cli("call", "list", "--json").stdout)["calls"]
    assert [(c["call"], c["inputs"], c["outstanding"]) for c in shown] == [(call.object_id, inputs, inputs)]
    assert mesh.cli("call", "cancel", call.object_id).returncode == 0
    status = call.status()
    assert (status.state, status.cancelled, status.outstanding) == (State.CANCELLED, inputs, 0)
    until(lambda: queued(mesh, "many-killed") == 0)


def test_who_waits_for_more_than_was_submitted_is_told(own_mesh: Callable[..., Mesh]) -> None:
    """Its submitter has gone without a word; that is seen by a record that is old, and a client that is not there."""
    mesh = own_mesh(caller_silence=8)
    module = many(mesh, "many-short")
    call = module.double.spawn_map(range(5))

    async def cut_off(broker: Broker) -> None:
        record = await broker.several.get(call.object_id)
        assert record is not None
        await broker.several.put(dataclasses.replace(record, count=None, submitted=3, at=time.time() - 60))
        while not await broker.clients.missing({token_of(call.object_id)}):
            await asyncio.sleep(0.02)

    mesh.ask(cut_off)
    assert (call.num_inputs(), call.status().submitting) == (5, False)
    with pytest.raises(NotFoundError, match="has 5 inputs, and none with the index 5: who submitted it has gone"):
        FunctionCall.from_id(call.object_id).get(index=5, timeout=20)
    mesh.start_worker("--containers", "1")
    values = iter(FunctionCall.from_id(call.object_id).iter())
    assert [next(values) for _ in range(5)] == [0, 2, 4, 6, 8]
    with pytest.raises(NotFoundError, match="who submitted it has gone"):
        next(values)


def test_ctrl_c_while_submitting_cancels_what_was(mesh: Mesh) -> None:
    many(mesh, "many-ctrl-c")
    path = mesh.ledger("many-ctrl-c").path
    mesh.interrupt(
        f"""
        import itertools, mesh
        f = mesh.Function.from_name("many-ctrl-c", "waits")
        def slowly():
            yield from [{str(path)!r}] * 100
            import time; time.sleep(300)
        f.spawn_map(slowly(), itertools.count())
        """,
        lambda: mesh.ledger("many-ctrl-c").count("begin ") > 1,
    )
    until(lambda: queued(mesh, "many-ctrl-c") == 0)


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancelling_tells_waiters_at_once_and_empties_the_queue(own_mesh: Callable[..., Mesh]) -> None:
    """Nobody waits until the inputs are cleared away: without a worker nothing else could tell."""
    mesh = own_mesh()
    module = many(mesh, "many-cancel")
    path = str(mesh.ledger().path)
    call = module.waits.spawn_map([path] * 2000, range(2000))
    raised: list[BaseException] = []

    def wait(handle: FunctionCall[int]) -> None:
        try:
            handle.get(index=1999)
        except RemoteError as error:
            raised.append(error)

    waiters = [threading.Thread(target=wait, args=(h,)) for h in (call, FunctionCall.from_id(call.object_id))]
    for waiter in waiters:
        waiter.start()
    worker = mesh.start_worker("--containers", "2")
    until(lambda: mesh.ledger().count("begin ") > 1)
    mesh.cli("call", "cancel", call.object_id)
    for waiter in waiters:
        waiter.join(20)
    assert [str(error) for error in raised] == ["cancelled: by mesh call cancel"] * 2
    until(lambda: queued(mesh, "many-cancel") == 0)
    with pytest.raises(RemoteError, match="cancelled"):
        list(FunctionCall.from_id(call.object_id).iter())
    status = call.status()
    assert (status.state, status.inputs, status.cancelled, status.outstanding) == (State.CANCELLED, 2000, 2000, 0)
    assert call.status(index=3).state is State.CANCELLED
    assert mesh.ledger().count("begin ") < 20
    assert "Traceback" not in worker.log
    assert module.double.remote(4) == 8


def test_a_worker_that_joins_later_refuses_what_was_cancelled(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = many(mesh, "many-later")
    call = module.noted.spawn_map([str(mesh.ledger().path)] * 300, range(300))

    async def end_it(broker: Broker) -> None:  # as who dies between the record and the clearing does
        from mesh.cancel import _cancelled
        from mesh.protocol import end_key

        await broker.results.create(end_key(call.object_id), _cancelled("by a test", "many-later", "noted"))

    mesh.ask(end_it)
    assert queued(mesh, "many-later") == 300
    mesh.start_worker("--containers", "2")
    until(lambda: queued(mesh, "many-later") == 0)
    assert mesh.ledger().lines() == []


def test_the_record_of_a_call_stays_while_inputs_are_queued(
    own_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = own_mesh()
    call = many(mesh, "many-old").double.spawn_map(range(3))
    monkeypatch.setattr(sweep, "RENEWED", 0.0)

    def renewed() -> int:
        return mesh.ask(lambda broker: sweep.Sweeper(broker, "test", 15, 60).records())

    assert renewed() == 1
    assert call.num_inputs() == 3
    mesh.start_worker()
    assert list(call.iter()) == [0, 2, 4]
    until(lambda: renewed() == 0, what="nothing is queued any more")


def test_what_ended_before_the_cancel_keeps_its_value(mesh: Mesh) -> None:
    """What was stored first decides, for each input by itself, also where a value comes late."""
    module = many(mesh, "many-first")
    path = str(mesh.ledger("many-first").path)
    call = module.double.spawn_map([1, 2])
    assert list(call.iter()) == [2, 4]
    call.cancel()
    assert call.status().state is State.SUCCEEDED, "it had ended"
    other = module.waits.spawn_map([path] * 100, range(100))
    until(lambda: mesh.ledger("many-first").count("begin ") > 0)
    other.cancel()

    async def store_late(broker: Broker) -> bool:
        from mesh.protocol import Result

        late = Result(state=State.SUCCEEDED, body=b"5", app="many-first", function="waits")
        return await broker.results.create(f"{other.object_id}.99", late)

    assert mesh.ask(store_late)
    with pytest.raises(RemoteError, match="cancelled"):
        FunctionCall.from_id(other.object_id).get(index=99)
    assert other.status(index=99).state is State.CANCELLED


def test_cancel_a_parent_with_1000_children(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = many(mesh, "many-parent")
    mesh.start_worker("--containers", "4")
    parent = module.parent.spawn(str(mesh.ledger().path), 1000)
    until(lambda: mesh.ledger().count("begin ") > 1)
    until(lambda: queued(mesh, "many-parent") >= 1000)
    parent.cancel()
    (record,) = calls_of(mesh, "many-parent")
    status = until(lambda: s if (s := FunctionCall.from_id(record.call).status()).cancelled else None)
    assert (status.cancelled, status.outstanding) == (status.inputs, 0)
    assert f"{status.inputs:,} cancelled" in mesh.cli("call", "show", record.call).stdout
    until(lambda: queued(mesh, "many-parent") == 0)


# --- many who wait, and what dies ------------------------------------------------------------------------------------


@pytest.mark.load
def test_ten_thousand_waiters_on_one_result_and_one_on_ten_thousand(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = many(mesh, "many-waiters")
    path = str(mesh.ledger().path)
    one = module.waits.spawn(path, 7)

    async def all_wait() -> list[int]:
        handles = [FunctionCall.from_id(one.object_id)] * 10_000
        waiting = asyncio.gather(*(handle.get.aio() for handle in handles))
        await asyncio.sleep(0.5)
        mesh.ledger("ledger.go").path.touch()
        await asyncio.to_thread(mesh.start_worker, "--containers", "2")
        return await waiting

    assert asyncio.run(all_wait()) == [7] * 10_000
    call = module.double.spawn_map(range(10_000))
    assert sum(FunctionCall.from_id(call.object_id).iter()) == sum(range(0, 20_000, 2))


def test_each_input_ends_exactly_once_whoever_dies(own_server: Callable[..., NatsServer], tmp_path: object) -> None:
    """A worker is killed, the server is killed and started again, and the call is cancelled in the middle: an input has
    a value or is cancelled, whoever asks and whenever, and what has a value ran."""
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    server = own_server()
    with new_mesh(server, tmp_path / "mesh", ack_wait=3) as mesh:
        module = many(mesh, "many-ledger")
        path = mesh.ledger().path
        first = mesh.start_worker("--containers", "2")
        mesh.start_worker("--containers", "2")
        call = module.noted.spawn_map([str(path)] * 3000, range(3000))
        until(lambda: mesh.ledger().count() > 200)
        first.kill()
        until(lambda: mesh.ledger().count() > 400)
        server.kill()
        own_server(store=tmp_path / "nats-0", port=server.port)
        until(lambda: mesh.ledger().count() > 600, timeout=60)
        call.cancel()
        time.sleep(0.2)
        early = answers(call, 3000)
        until(lambda: queued(mesh, "many-ledger") == 0, timeout=60)
        late = answers(FunctionCall.from_id(call.object_id), 3000)
        assert early == late, "an answer that was given stays"
        ran = {int(number) for number in mesh.ledger().lines()}
        succeeded = {index for index, value in enumerate(late) if value == index}
        assert succeeded <= ran
        assert len(succeeded) + late.count("cancelled") == 3000
        assert 0 < len(succeeded) < 3000
        status = call.status()
        assert (status.done, status.cancelled) == (len(succeeded), 3000 - len(succeeded))


def answers(call: FunctionCall[int], count: int) -> list[int | str]:
    """What each input came to."""

    async def one(index: int) -> int | str:
        try:
            return await call.get.aio(timeout=30, index=index)
        except RemoteError:
            return "cancelled"

    async def all_of_them() -> list[int | str]:
        gate = asyncio.Semaphore(100)

        async def gated(index: int) -> int | str:
            async with gate:
                return await one(index)

        return await asyncio.gather(*map(gated, range(count)))

    return asyncio.run(all_of_them())


# --- how far it is ---------------------------------------------------------------------------------------------------


def test_progress_says_count_rate_and_what_is_left() -> None:
    assert line("f", 500, 1000, 10.0) == "f: 500 of 1,000 · 50/s · 0:10 left"
    assert line("f", 20_000, 400_000_000, 1.0) == "f: 20,000 of 400,000,000 · 20,000/s · 5:33:19 left"
    assert line("f", 1500, None, 0.5) == "f: 1,500 · 3,000/s"
    assert line("f", 10, 10, 1.0) == "f: 10 of 10 · 10/s"
    assert line("f", 0, 10, 0.0) == "f: 0 of 10 · 0/s"


def test_nothing_is_said_where_nobody_looks(mesh: Mesh) -> None:
    many(mesh, "many-quiet")
    done = mesh.python(
        """
        import mesh, time
        def slowly():
            yield 1
            time.sleep(1.3)
            yield 2
        print(list(mesh.Function.from_name("many-quiet", "double").spawn_map(slowly()).iter()))
        """
    )
    assert (done.stdout, done.stderr) == ("[2, 4]\n", "")
    assert Function.from_name("many-quiet", "double").remote(1) == 2
