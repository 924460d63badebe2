"""`map`, `starmap`, `for_each`: many inputs of one call, on a real mesh."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

import mesh as modal
from mesh import Function, FunctionCall, client
from mesh.broker import Broker
from mesh.exception import DeprecationError, ExecutionError, InvalidError, RemoteError, SerializationError
from mesh.map import LIMIT
from tests.support import Ledger, Mesh, until

JOBS = """
    import mesh, os, time
    app = mesh.App({name!r})

    @app.function()
    def double(x, *, plus=0):
        return 2 * x + plus

    @app.function()
    def add(x, y=0, *, plus=0):
        return x + y + plus

    @app.function()
    def first(x):
        return x[0]

    @app.function()
    def late(x):
        time.sleep(0.3 if x == 0 else 0)
        return x

    @app.function()
    def nothing(x):
        return None

    class MyError(Exception):
        pass

    @app.function()
    def odd(x):
        if x % 2 == 0:
            raise MyError(f"{{x}} is even")
        return x

    @app.function(retries=2)
    def second(path, x):
        with open(path, "a") as file:
            file.write(f"{{x}}\\n")
        if mesh.current_attempt() == 1:
            raise MyError("once more")
        return x

    @app.function(timeout=300)
    def sleeps(path, x, seconds=300.0):
        with open(path, "a") as file:
            file.write(f"begin {{x}}\\n")
        try:
            time.sleep(seconds)
        except BaseException as error:
            with open(path, "a") as file:
                file.write(f"caught {{x}}\\n")
            raise
        return x

    @app.function(timeout=300)
    def fails_at_3(path, x):
        if x != 3:
            return sleeps.local(path, x)
        while not os.path.exists(path):
            time.sleep(0.02)
        raise MyError("three")

    @app.function(timeout=300)
    def unordered(path, x):
        while x == 0 and not os.path.exists(path):
            time.sleep(0.02)
        return x

    @app.function()
    def whoami(x):
        return mesh.current_function_call_id(), mesh.current_input_id()

    @app.function()
    def sum_of_doubles(n):
        return sum(double.map(range(n)))

    @app.function()
    async def sum_of_doubles_async(n):
        return sum([x async for x in double.map.aio(range(n))])

    @app.function()
    def generates(x):
        yield x

    @app.cls()
    class Greeter:
        word: str = mesh.parameter(default="hello")

        @mesh.method()
        def greet(self, name, mark=""):
            return f"{{self.word}} {{name}}{{mark}}"

        @mesh.method()
        def sleeps(self, path, x, seconds):
            return sleeps.local(path, x, seconds)

"""


def jobs(mesh: Mesh, name: str) -> object:
    return mesh.deploy(JOBS.format(name=name))


def open_inputs(mesh: Mesh, app: str) -> int:
    """How many inputs of an app are in the queue."""

    async def count(broker: Broker) -> int:
        return len(await broker.connection.subjects(broker.topology.calls, broker.topology.call_filter(app=app)))

    return mesh.ask(count)


def nothing_is_left(mesh: Mesh, app: str) -> None:
    """Soon: well before a caller would be missed, which ends everything too."""
    until(lambda: open_inputs(mesh, app) == 0, mesh.settings.caller_silence / 2, f"the inputs of {app} end")


def words(ledger: Ledger, first: str) -> list[str]:
    """What stands behind a word in a ledger."""
    return [line.split()[1] for line in ledger.lines() if line.startswith(first)]


# --- values ----------------------------------------------------------------------------------------------------------


def test_map_gives_values_in_the_order_of_the_inputs(mesh: Mesh) -> None:
    module = jobs(mesh, "map-order")
    assert list(module.late.map(range(20))) == list(range(20))
    assert list(module.nothing.map([1, 2])) == [None, None]
    assert list(module.double.map([])) == list(module.add.starmap([])) == []
    assert module.double.for_each(iter(())) is None
    assert list(Function.from_name("map-order", "first").map(["ab", "cd"])) == ["a", "c"]
    assert list(module.first.map("ef")) == ["e", "f"]


def test_map_gives_values_as_they_are_there(mesh: Mesh) -> None:
    module = jobs(mesh, "map-unordered")
    values = iter(module.unordered.map([str(mesh.ledger("map-unordered").path)] * 2, [0, 1], order_outputs=False))
    assert next(values) == 1
    mesh.ledger("map-unordered").path.touch()
    assert list(values) == [0]


def test_several_iterables_are_read_together_until_the_shortest_ends(mesh: Mesh) -> None:
    module = jobs(mesh, "map-zip")
    assert list(module.add.map([1, 2, 3], itertools.count(10), kwargs={"plus": 100})) == [111, 113, 115]
    assert list(module.double.starmap([(1,), [2]], kwargs={"plus": 1})) == [3, 5]
    assert list(module.add.starmap(((x, x) for x in range(5)), order_outputs=True)) == [0, 2, 4, 6, 8]
    assert module.double.for_each([1, 2]) is None


def test_map_in_its_async_face(mesh: Mesh) -> None:
    module = jobs(mesh, "map-async")

    async def slowly() -> AsyncIterator[int]:
        for x in range(3):
            await asyncio.sleep(0.05)
            yield x

    async def use() -> list[object]:
        await module.double.for_each.aio(slowly())
        return [
            [x async for x in module.double.map.aio(range(3))],
            [x async for x in module.double.map.aio(slowly())],
            [x async for x in module.add.map.aio(slowly(), range(10, 20))],
            [x async for x in module.add.starmap.aio([(1, 2), (3, 4)])],
            [x async for x in module.double.map(slowly())],
            [x async for x in module.double.map.aio(module.double.map.aio(slowly()))],
        ]

    assert asyncio.run(use()) == [[0, 2, 4], [0, 2, 4], [10, 12, 14], [3, 7], [0, 2, 4], [0, 4, 8]]
    assert list(module.double.map(slowly())) == [0, 2, 4], "an asynchronous iterable in the blocking face"


def test_all_inputs_are_of_one_call(mesh: Mesh) -> None:
    module = jobs(mesh, "map-ids")
    found = list(module.whoami.map(range(3)))
    (call,) = {call for call, _ in found}
    assert [input for _, input in found] == [f"{call}.{index}" for index in range(3)]
    assert FunctionCall.from_id(call).get(index=2) == (call, f"{call}.2")


def test_maps_go_into_each_other_and_into_functions(mesh: Mesh) -> None:
    module = jobs(mesh, "map-nested")
    assert list(module.double.map(module.double.map(range(4)))) == [0, 4, 8, 12]
    assert list(module.sum_of_doubles.map([3] * 12)) == [6] * 12, "more of them than containers"
    assert module.sum_of_doubles_async.remote(3) == 6


def test_methods_and_handles_with_options_are_mapped_too(mesh: Mesh) -> None:
    module = jobs(mesh, "map-handles")
    assert list(module.Greeter().greet.map(["a", "b"])) == ["hello a", "hello b"]
    hi = module.Greeter.with_options(timeout=99)(word="hi")
    assert list(hi.greet.starmap([("a", "!"), ("b", "?")])) == ["hi a!", "hi b?"]
    path = str(mesh.ledger("map-handles").path)
    with pytest.raises(module.MyError, match="once more"):
        list(module.second.with_options(retries=0).map([path], [1]))
    values = iter(hi.sleeps.map([path] * 9, range(9), [0.0] + [300.0] * 8))
    assert next(values) == 0
    (first, *_) = mesh.ask(lambda broker: broker.calls.of_app("map-handles", 1))
    mesh.cli("call", "cancel", first.subject.split(".")[-2])
    with pytest.raises(RemoteError, match="cancelled: by mesh call cancel"):
        next(values)
    nothing_is_left(mesh, "map-handles")


def test_inputs_begin_in_their_order(own_mesh: Callable[..., Mesh]) -> None:
    """Not only come out of it in order: whoever waits for the first would wait for all others before it."""
    mesh = own_mesh()
    module = jobs(mesh, "map-begin")
    mesh.start_worker("--containers", "1")
    assert list(module.sleeps.map([str(mesh.ledger().path)] * 200, range(200), [0.0] * 200)) == list(range(200))
    assert mesh.ledger().lines() == [f"begin {x}" for x in range(200)]


def test_each_input_is_tried_again_by_itself(mesh: Mesh) -> None:
    module = jobs(mesh, "map-retries")
    path = str(mesh.ledger("map-retries").path)
    assert list(module.second.map([path] * 3, range(3))) == [0, 1, 2]
    assert sorted(mesh.ledger("map-retries").lines()) == ["0", "0", "1", "1", "2", "2"]


def test_an_iterable_may_give_the_same_object_with_another_content(mesh: Mesh) -> None:
    module = jobs(mesh, "map-same")

    def reused() -> Iterator[list[int]]:
        item = [0]
        for x in range(50):
            item[0] = x
            yield item

    assert list(module.first.map(reused())) == list(range(50))


# --- failures --------------------------------------------------------------------------------------------------------


def test_the_first_failure_is_raised_and_ends_the_rest(mesh: Mesh) -> None:
    module = jobs(mesh, "map-failure")
    path = str(mesh.ledger("map-failure").path)
    with pytest.raises(module.MyError, match="three") as caught:
        list(module.fails_at_3.map(itertools.repeat(path), range(40)))
    assert "in fails_at_3" in caught.value.__notes__[0]
    nothing_is_left(mesh, "map-failure")
    began, caught = words(mesh.ledger("map-failure"), "begin"), lambda: words(mesh.ledger("map-failure"), "caught")
    assert len(began) < 39
    until(lambda: set(caught()) == set(began), what="all that began has been interrupted")


def test_values_come_before_a_failure_is_raised(mesh: Mesh) -> None:
    module = jobs(mesh, "map-ready")
    came = threading.Event()

    def then_fails() -> Iterator[int]:
        yield 1
        yield 3
        assert came.wait(60)
        yield 4

    values = iter(module.odd.map(then_fails()))
    assert [next(values), next(values)] == [1, 3]
    came.set()
    with pytest.raises(module.MyError, match="4 is even"):
        next(values)


def test_exceptions_can_be_values(mesh: Mesh) -> None:
    module = jobs(mesh, "map-exceptions")
    one, two, three = module.odd.map([1, 2, 3], return_exceptions=True)
    assert (one, three) == (1, 3)
    assert isinstance(two, module.MyError)
    with pytest.warns(DeprecationError, match="wrap_returned_exceptions has no effect"):
        (two,) = module.odd.starmap([(2,)], return_exceptions=True, wrap_returned_exceptions=True)
    assert isinstance(two, module.MyError)
    module.odd.for_each(range(4), ignore_exceptions=True)
    with pytest.raises(module.MyError):
        module.odd.for_each(range(4))


def test_what_an_iterable_raises_is_raised(mesh: Mesh) -> None:
    module = jobs(mesh, "map-iterable")

    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("mine")

    def leaves() -> Iterator[int]:
        yield 1
        sys.exit("enough")

    async def broken_async() -> AsyncIterator[int]:
        yield 1
        raise KeyError("mine")

    for iterable in (broken(), broken_async()):
        with pytest.raises(KeyError, match="mine"):
            list(module.double.map(iterable, return_exceptions=True))
    with pytest.raises(ExecutionError, match=r"the iterable of inputs raised SystemExit\('enough'\)"):
        list(module.double.map(leaves()))
    assert list(module.double.map([1])) == [2], "and mesh goes on"
    nothing_is_left(mesh, "map-iterable")


def test_what_cannot_be_mapped_is_refused(mesh: Mesh) -> None:
    module = jobs(mesh, "map-refused")
    with pytest.raises(InvalidError, match=r"'generates' is a generator function: use \.remote_gen"):
        module.generates.map([1])
    with pytest.raises(InvalidError, match=r"'generates' is a generator function: use \.remote_gen"):
        list(Function.from_name("map-refused", "generates").map([1]))
    with pytest.raises(InvalidError, match="map takes at least one iterable of inputs"):
        module.double.map()
    with pytest.raises(InvalidError, match=r"map takes iterables of inputs, not 5; one input is \.remote"):
        module.double.map(5)
    with pytest.raises(InvalidError, match=r"starmap takes an iterable of argument tuples, and 1 is none; use .map"):
        list(module.double.starmap([1]))
    with pytest.raises(SerializationError, match=r"cannot send argument 1: <unlocked _thread\.lock"):
        list(module.double.map([threading.Lock()]))

    async def inside() -> None:
        for _ in module.double.map([1]):
            pass

    with pytest.raises(ExecutionError, match="use `async for"):
        asyncio.run(inside())


def test_a_map_that_nobody_iterates_over_says_so() -> None:
    with pytest.warns(RuntimeWarning, match=r"nobody iterated over .map\(…\), so it calls nothing"):
        Function.from_name("a", "f").map([1])


# --- how far it reads ahead ------------------------------------------------------------------------------------------


def test_an_endless_iterable_is_read_as_far_as_there_is_room(mesh: Mesh) -> None:
    module = jobs(mesh, "map-endless")
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    values = iter(module.double.map(endless()))
    assert list(itertools.islice(values, 3)) == [2, 4, 6]
    until(lambda: read >= LIMIT, timeout=60, what="the room is used")
    values.close()
    nothing_is_left(mesh, "map-endless")
    assert read <= LIMIT + 3


def test_memory_and_queue_stay_flat_over_many_inputs(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "map-many")
    mesh.start_worker("--containers", "2")
    taken = read = 0
    furthest = most = 0

    def counted() -> Iterator[int]:
        nonlocal read, furthest
        for x in range(3_000):
            read += 1
            furthest = max(furthest, read - taken)
            yield x

    for value in module.double.map(counted()):
        assert value == 2 * taken
        if taken % 200 == 0:
            most = max(most, open_inputs(mesh, "map-many"))
        taken += 1
    assert taken == 3_000
    assert furthest <= LIMIT
    assert 0 < most < 2 * LIMIT, "those that were taken may still be on their way out of the queue"
    nothing_is_left(mesh, "map-many")


def test_values_come_while_the_iterable_waits(mesh: Mesh) -> None:
    """The next input is made of the last value, so neither may wait for the other."""
    module = jobs(mesh, "map-slow")
    seen: list[int] = []
    came = threading.Event()

    def follows() -> Iterator[int]:
        yield 1
        while seen[-1:] != [16]:
            came.wait(30)
            came.clear()
            yield seen[-1]

    for value in module.double.map(follows()):
        seen.append(value)
        came.set()
    assert seen[:5] == [2, 4, 8, 16, 32]


# --- going early -----------------------------------------------------------------------------------------------------


def test_closing_early_cancels_what_is_left(mesh: Mesh) -> None:
    module = jobs(mesh, "map-close")
    path = str(mesh.ledger("map-close").path)
    values = module.sleeps.map([path] * 30, range(30), [0.0] + [300.0] * 29)
    for value in values:
        assert value == 0
        until(lambda: mesh.ledger("map-close").count("begin ") > 1)
        break
    del values
    nothing_is_left(mesh, "map-close")
    assert mesh.ledger("map-close").count("begin ") < 30


def test_what_is_left_ends_in_the_queue_and_in_the_worker(own_mesh: Callable[..., Mesh]) -> None:
    """Hundreds of inputs, most of them queued, some running, some still being submitted."""
    mesh = own_mesh()
    module = jobs(mesh, "map-left")
    worker = mesh.start_worker("--containers", "4")
    values = iter(module.sleeps.map([str(mesh.ledger().path)] * 600, range(600), [0.0] + [300.0] * 599))
    assert next(values) == 0
    until(lambda: mesh.ledger().count("begin ") > 2)
    values.close()
    nothing_is_left(mesh, "map-left")

    def nothing_runs() -> bool:
        begun = set(words(mesh.ledger(), "begin")) - {"0"}
        ended = set(words(mesh.ledger(), "caught"))
        return begun == ended and not any(w.running for w in mesh.ask(lambda broker: broker.workers.all()))

    until(nothing_runs, mesh.settings.caller_silence / 2)
    assert module.double.remote(1) == 2
    assert "caller has gone" not in worker.log
    assert mesh.ledger().count("begin ") < 100, "hardly any of the others began"


@pytest.mark.parametrize("leave", ["break", "return", "cancel"])
def test_leaving_the_async_face_early_cancels_what_is_left(mesh: Mesh, leave: str) -> None:
    name = f"map-leave-{leave}"
    module = jobs(mesh, name)
    path = str(mesh.ledger(name).path)

    async def use() -> None:
        async for _ in module.sleeps.map.aio([path] * 30, range(30), [0.0] + [300.0] * 29):
            if leave == "return":
                return
            if leave == "break":
                break
        await asyncio.sleep(0)

    async def cancelled() -> None:
        task = asyncio.create_task(use())
        while mesh.ledger(name).count("begin ") < 2:
            await asyncio.sleep(0.02)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancelled() if leave == "cancel" else use())
    nothing_is_left(mesh, name)
    assert mesh.ledger(name).count("begin ") < 30


def test_ctrl_c_cancels_what_is_left(mesh: Mesh) -> None:
    jobs(mesh, "map-ctrl-c")
    path = mesh.ledger("map-ctrl-c").path
    mesh.interrupt(
        f"""
        import mesh
        f = mesh.Function.from_name("map-ctrl-c", "sleeps")
        for value in f.map([{str(path)!r}] * 300, range(300)):
            print(value)
        """,
        lambda: mesh.ledger("map-ctrl-c").count("begin ") > 1,
    )
    nothing_is_left(mesh, "map-ctrl-c")


def test_a_program_ends_in_the_middle_of_a_map(mesh: Mesh) -> None:
    jobs(mesh, "map-exit")
    path = mesh.ledger("map-exit").path
    done = mesh.python(
        f"""
        import itertools, mesh
        f = mesh.Function.from_name("map-exit", "sleeps")
        seconds = itertools.chain([0], itertools.repeat(300))
        values = iter(f.map(itertools.repeat({str(path)!r}), itertools.count(), seconds))
        print(next(values))
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    nothing_is_left(mesh, "map-exit")


def test_a_closed_connection_never_looks_like_the_end(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "map-closed")

    async def use() -> list[object]:
        async def close() -> None:
            while not await (await client.broker()).calls.of_app("map-closed"):
                await asyncio.sleep(0.02)
            await client.close()

        closing = asyncio.create_task(close())
        try:
            return [x async for x in module.double.map.aio(range(5))]
        finally:
            await closing

    with pytest.raises(modal.Error, match="was closed before all its outputs were there"):
        asyncio.run(use())


# --- seeing and cancelling it from elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_cancelling_the_call_ends_all_of_it(mesh: Mesh, return_exceptions: bool) -> None:
    name = f"map-cancel-{return_exceptions}"
    module = jobs(mesh, name)
    path = str(mesh.ledger(name).path)
    calls: list[str] = []

    def cancel() -> None:
        until(lambda: mesh.ledger(name).count("begin ") > 1)
        (newest, *_) = mesh.ask(lambda broker: broker.calls.of_app(name, 1))
        calls.append(newest.subject.split(".")[-2])
        mesh.cli("call", "cancel", calls[0])

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(RemoteError, match="cancelled: by mesh call cancel"):
        # The first has ended when the call is cancelled, and more are to come than can be seen then.
        for _ in module.sleeps.map(
            itertools.repeat(path),
            itertools.count(),
            itertools.chain([0.0], itertools.repeat(300.0)),
            return_exceptions=return_exceptions,
        ):
            pass
    canceller.join()
    nothing_is_left(mesh, name)
    assert FunctionCall.from_id(calls[0]).get(timeout=0) == 0


def test_a_call_of_several_inputs_is_shown_as_one(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = jobs(mesh, "map-shown")
    mesh.start_worker("--containers", "2")
    values = iter(module.sleeps.map([str(mesh.ledger().path)] * 5, range(5), [0, 300, 300, 300, 300]))
    assert next(values) == 0
    until(lambda: mesh.ledger().count("begin ") >= 2)
    (found, *_) = mesh.ask(lambda broker: broker.calls.of_app("map-shown", 1))
    call = found.subject.split(".")[-2]
    assert FunctionCall.from_id(call).num_inputs() == 5
    shown = until(lambda: text if "more coming" not in (text := mesh.cli("call", "show", call).stdout) else "")
    assert "5: 1 done, 4 outstanding" in shown
    assert "map-shown.sleeps" in shown
    listed = [line for line in mesh.cli("call", "list").stdout.splitlines() if call in line]
    assert len(listed) == 1
    assert "succeeded" not in listed[0]
    mesh.cli("call", "cancel", "--app", "map-shown", "--yes")
    nothing_is_left(mesh, "map-shown")
    with pytest.raises(RemoteError):
        next(values)


def test_a_cancel_after_everything_has_ended_changes_nothing(mesh: Mesh) -> None:
    call = mesh.deploy(JOBS.format(name="map-ended")).double.spawn_map(range(3))
    assert list(call.iter()) == [0, 2, 4]
    call.cancel()
    assert call.status().state == "succeeded"
    assert list(call.iter()) == [0, 2, 4]
