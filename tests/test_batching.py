"""Batches: inputs of several calls in one run, each with its own value, error, retries and cancel."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import pytest

from mesh.exception import FunctionTimeoutError, InvalidError, RemoteError, SerializationError
from tests.support import Mesh, alive, until

JOBS = """
    import asyncio, mesh, os, threading, time
    app = mesh.App({name!r})

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=4, wait_ms=60_000)
    def full(xs):
        '''Returns for each the size of its batch, too: only a full one runs within the time of a test.'''
        return [(x * 2, len(xs)) for x in xs]

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=4, wait_ms=60_000)
    async def full_later(xs):
        await asyncio.sleep(0)
        return [(x * 2, len(xs)) for x in xs]

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=100, wait_ms=500)
    def partial(xs):
        return [len(xs) for x in xs]

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=3, wait_ms=60_000)
    def pairs(a, b):
        return [f"{{x}}-{{y}}" for x, y in zip(a, b, strict=True)]

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=3, wait_ms=60_000)
    def keywords(a, /, b, *, c):
        return [f"{{x}}-{{y}}-{{z}}" for x, y, z in zip(a, b, c, strict=True)]

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=2, wait_ms=60_000)
    def wrong(kinds):
        return {{"number": 5, "short": kinds[:1], "tuple": tuple(kinds), "None": None, "fine": kinds}}[kinds[0]]

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=2, wait_ms=60_000)
    def odd_values(xs):
        return [threading.Lock() if x == "lock" else x for x in xs]

    @app.function(max_containers=1, retries=mesh.Retries(max_retries=1, initial_delay=0, min_delay=0))
    @mesh.batched(max_batch_size=3, wait_ms=200)
    def fails(path, names):
        note(path[0], f"run {{' '.join(sorted(names))}} attempt {{mesh.current_attempt()}}")
        if "bad" in names:
            raise ValueError("one is bad")
        return names

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=3, wait_ms=60_000)
    def knows(xs):
        print("printed by the batch")
        return [(mesh.current_input_id(), mesh.current_function_call_id())] * len(xs)

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=3, wait_ms=60_000)
    def sleeps(paths, names, seconds):
        note(paths[0], f"begin {{' '.join(sorted(names))}} {{os.getpid()}}")
        try:
            end = time.monotonic() + max(seconds)
            while time.monotonic() < end:
                time.sleep(0.01)
        except BaseException as error:
            note(paths[0], f"caught {{' '.join(sorted(names))}} {{type(error).__name__}}")
            raise
        return names

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=3, wait_ms=60_000)
    async def waits(paths, names, seconds):
        note(paths[0], f"begin {{' '.join(sorted(names))}} {{os.getpid()}}")
        try:
            await asyncio.sleep(max(seconds))
        except BaseException as error:
            note(paths[0], f"caught {{' '.join(sorted(names))}} {{type(error).__name__}}")
            raise
        return names

    @app.function(max_containers=1, timeout=1)
    @mesh.batched(max_batch_size=2, wait_ms=60_000)
    def too_long(xs):
        time.sleep(60)

    together = threading.Barrier(2)

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=2)
    @mesh.batched(max_batch_size=2, wait_ms=60_000)
    def meets(xs):
        together.wait(20)
        return [len(xs)] * len(xs)

    @app.function(max_containers=1)
    @mesh.batched(max_batch_size=50, wait_ms=20)
    def counts(xs):
        return [x + 1 for x in xs]
"""


def jobs(name: str) -> str:
    return JOBS.format(name=name)


# --- putting inputs together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["full", "full_later"])
def test_a_full_batch_runs_and_each_caller_gets_its_own(mesh: Mesh, function: str) -> None:
    f = getattr(mesh.deploy(jobs("full")), function)
    assert list(f.map(range(8))) == [(2 * x, 4) for x in range(8)]
    calls = [f.spawn(x) for x in range(4)]
    assert [call.get(timeout=30) for call in calls] == [(2 * x, 4) for x in range(4)]

    async def remotes() -> list[tuple[int, int]]:
        return await asyncio.gather(*(f.remote.aio(x) for x in range(4)))

    assert asyncio.run(remotes()) == [(2 * x, 4) for x in range(4)]


def test_a_batch_that_is_not_full_runs_after_its_time(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("partial"))
    assert module.partial.remote(0) == 1
    began = time.monotonic()
    calls = [module.partial.spawn(x) for x in range(5)]
    assert [call.get(timeout=30) for call in calls] == [5] * 5
    assert time.monotonic() - began > 0.4


def test_parameters_are_put_together_by_name(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("names"))
    assert list(module.pairs.starmap([("a", 1), ("b", 2), ("c", 3)])) == ["a-1", "b-2", "c-3"]
    calls = [module.pairs.spawn("a", 1), module.pairs.spawn("b", b=2), module.pairs.spawn(b=3, a="c")]
    assert [call.get(timeout=30) for call in calls] == ["a-1", "b-2", "c-3"]
    calls = [module.keywords.spawn(1, 2, c=3), module.keywords.spawn(4, b=5, c=6), module.keywords.spawn(7, c=9, b=8)]
    assert [call.get(timeout=30) for call in calls] == ["1-2-3", "4-5-6", "7-8-9"]


def test_wrong_arguments_fail_their_call_alone(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("arity"))
    wrong = [((1,), {}, "missing"), ((1, 2, 3), {}, "too many"), ((1, 2), {"b": 3}, "multiple values")]
    for args, kwargs, text in wrong:
        good = module.pairs.spawn("a", 1), module.pairs.spawn("b", 2)
        bad = module.pairs.spawn(*args, **kwargs)
        with pytest.raises(InvalidError, match=rf"'pairs' is batched and takes \(a, b\): .*{text}"):
            bad.get(timeout=30)
        assert [call.get(timeout=30) for call in good] == ["a-1", "b-2"]


@pytest.mark.parametrize(
    ("kind", "given"), [("number", "a int"), ("short", "a list of 1"), ("tuple", "a tuple"), ("None", "a NoneType")]
)
def test_what_is_no_list_of_the_same_length_fails_each(mesh: Mesh, kind: str, given: str) -> None:
    module = mesh.deploy(jobs(f"wrong-{kind}"))
    calls = [module.wrong.spawn(kind) for _ in range(2)]
    for call in calls:
        with pytest.raises(InvalidError, match=f"return a list with a result for each of its 2 inputs, not {given}"):
            call.get(timeout=30)
    assert list(module.wrong.map(["fine", "fine"])) == ["fine", "fine"]


def test_a_value_that_cannot_travel_fails_its_call_alone(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("values"))
    lock, fine = module.odd_values.spawn("lock"), module.odd_values.spawn("fine")
    with pytest.raises(SerializationError):
        lock.get(timeout=30)
    assert fine.get(timeout=30) == "fine"


def test_an_exception_fails_each_and_each_has_its_own_retries(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("failing"))
    path = str(mesh.ledger("batch-fails").path)
    values = list(module.fails.starmap([(path, "a"), (path, "bad"), (path, "b")], return_exceptions=True))
    assert [type(value) for value in values] == [ValueError] * 3
    runs = mesh.ledger("batch-fails").lines()
    assert runs[0] == "run a b bad attempt 1"
    assert all(line.endswith("attempt 2") for line in runs[1:])
    assert sorted(" ".join(runs[1:]).replace("run", "").replace("attempt 2", "").split()) == ["a", "b", "bad"]


def test_the_first_input_speaks_for_its_batch(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("first"))
    worker = mesh.start_worker()
    calls = [module.knows.spawn(x) for x in range(3)]
    first = calls[0].object_id
    assert [call.get(timeout=30) for call in calls] == [(f"{first}.0", first)] * 3
    until(lambda: re.search(rf"{first}\.0.*printed by the batch", worker.log))


def test_batches_and_several_inputs_at_once(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("both"))
    assert list(module.meets.map(range(4))) == [2] * 4


def test_many_inputs_in_batches(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("many"))
    assert list(module.counts.map(range(1000))) == list(range(1, 1001))


@pytest.mark.parametrize("both", ["", "@mesh.method()"])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_method_is_batched(mesh: Mesh, both: str, kind: str) -> None:
    module = mesh.deploy(f"""
        import mesh
        app = mesh.App("batched-methods")

        @app.cls(max_containers=1)
        class Model:
            factor: int = mesh.parameter(default=2)

            {both}
            @mesh.batched(max_batch_size=3, wait_ms=60_000)
            {kind} times(self, xs, ys):
                return [self.factor * x * y + len(xs) for x, y in zip(xs, ys, strict=True)]
    """)
    assert list(module.Model(factor=10).times.map([1, 2, 3], [1, 1, 1])) == [13, 23, 33]
    assert list(module.Model().times.starmap([(1, 1), (2, 1), (3, 1)])) == [5, 7, 9]


def test_a_handle_is_given_batches_and_concurrency(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("handles"))
    three = module.full.with_batching(max_batch_size=3, wait_ms=60_000)
    assert list(three.map(range(3))) == [(2 * x, 3) for x in range(3)]
    pairs = module.meets.with_concurrency(max_inputs=2)
    assert list(pairs.map(range(4))) == [2] * 4


# --- cancel and timeout ----------------------------------------------------------------------------------------------


def begun(mesh: Mesh, names: str) -> int:
    lines = until(lambda: [line for line in mesh.ledger().lines() if line.startswith(f"begin {names} ")], what=names)
    return int(lines[-1].split()[-1])


def test_a_member_of_a_batch_that_has_not_begun_leaves_it(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("leaving"))
    path = str(mesh.ledger().path)
    leaver = module.sleeps.spawn(path, "leaver", 0)
    until(lambda: leaver.status().state in ("queued", "running"))
    leaver.cancel()
    with pytest.raises(RemoteError, match="cancelled: by "):
        leaver.get(timeout=10)
    calls = [module.sleeps.spawn(path, name, 0) for name in ("leave1", "leave2", "leave3")]
    assert [call.get(timeout=30) for call in calls] == ["leave1", "leave2", "leave3"]
    assert begun(mesh, "leave1 leave2 leave3")
    assert not [line for line in mesh.ledger().lines() if "leaver" in line]


@pytest.mark.parametrize(("function", "error"), [("sleeps", "InputCancellation"), ("waits", "CancelledError")])
def test_a_member_of_a_running_batch_is_cancelled_alone_and_the_last_ends_the_run(
    mesh: Mesh, function: str, error: str
) -> None:
    module = mesh.deploy(jobs(f"cancelled-{function}"))
    path = str(mesh.ledger().path)
    names = [f"{function}-{n}" for n in "abc"]
    calls = [getattr(module, function).spawn(path, name, 2) for name in names]
    process = begun(mesh, " ".join(names))
    calls[0].cancel()
    with pytest.raises(RemoteError, match="cancelled: by "):
        calls[0].get(timeout=10)
    assert [call.get(timeout=30) for call in calls[1:]] == names[1:]
    assert mesh.ledger().count(f"caught {' '.join(names)}") == 0

    again = [f"{function}-{n}" for n in "def"]
    calls = [getattr(module, function).spawn(path, name, 60) for name in again]
    assert begun(mesh, " ".join(again)) == process
    for call in calls:
        call.cancel()
        with pytest.raises(RemoteError, match="cancelled: by "):
            call.get(timeout=10)
    until(lambda: mesh.ledger().count(f"caught {' '.join(again)} {error}"))
    assert alive(process)


def test_the_timeout_is_that_of_the_run(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("timeouts"))
    for call in [module.too_long.spawn(x) for x in range(2)]:
        with pytest.raises(FunctionTimeoutError, match="ran longer than its timeout of 1 s"):
            call.get(timeout=30)


def test_a_worker_that_stops_hands_an_open_batch_back(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("handed-back"))
    worker = mesh.start_worker()
    calls = [module.full.spawn(x) for x in range(3)]
    until(lambda: "full" in worker.log)
    assert worker.stop() == 0
    mesh.start_worker()
    calls.append(module.full.spawn(3))
    assert [call.get(timeout=30) for call in calls] == [(2 * x, 4) for x in range(4)]
