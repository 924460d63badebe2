"""Several inputs a container: in threads or as tasks, each with its own output, timeout and cancel."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import mesh as mesh_module
from mesh.exception import FunctionTimeoutError, InvalidError, RemoteError
from tests.support import Mesh, alive, until

JOBS = """
    import asyncio, contextvars, mesh, os, threading, time
    app = mesh.App({name!r})
    own = contextvars.ContextVar("own", default="none")
    together = threading.Barrier(4)

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    def meets(name):
        '''Returns only where three others run in the same process.'''
        before = own.get()
        own.set(name)
        together.wait(20)
        print(f"printed by {{name}}")
        ids = mesh.current_function_call_id(), mesh.current_input_id()
        return os.getpid(), threading.current_thread() is threading.main_thread(), ids, before, own.get()

    arrived = 0
    everybody = asyncio.Event()

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    async def meets_later(name):
        global arrived
        arrived += 1
        if arrived % 4 == 0:
            everybody.set()
        await asyncio.wait_for(everybody.wait(), 20)
        print(f"printed by {{name}}")
        ids = mesh.current_function_call_id(), mesh.current_input_id()
        return os.getpid(), ids

    @app.function()
    def alone():
        return threading.current_thread() is threading.main_thread()

    @app.function(max_containers=1, timeout=2)
    @mesh.concurrent(max_inputs=4)
    def sleeps(path, name, seconds):
        note(path, f"begin {{name}} {{os.getpid()}}")
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.01)
        except BaseException as error:
            note(path, f"caught {{name}} {{type(error).__name__}}")
            raise
        return name

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    def sleeps_long(path, name, seconds):
        return sleeps.get_raw_f()(path, name, seconds)

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    async def waits(path, name, seconds):
        note(path, f"begin {{name}} {{os.getpid()}}")
        try:
            await asyncio.sleep(seconds)
        except BaseException as error:
            note(path, f"caught {{name}} {{type(error).__name__}}")
            raise
        return name

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    async def blocks(path, name, seconds):
        '''Awaits first, then blocks the loop that the others run in.'''
        note(path, f"begin {{name}} {{os.getpid()}}")
        if name.startswith("other"):
            await asyncio.sleep(seconds)
        else:
            await asyncio.sleep(0.3)
            note(path, f"blocks {{name}}")
            time.sleep(seconds)
        return name

    @app.function(max_containers=1, timeout=1)
    @mesh.concurrent(max_inputs=4)
    def stubborn(path, name, seconds):
        note(path, f"begin {{name}} {{os.getpid()}}")
        if name == "stubborn":
            while True:
                try:
                    time.sleep(0.05)
                except BaseException:
                    note(path, f"swallowed {{name}}")
        time.sleep(seconds)
        return name

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    def fails(name):
        if name == "bad":
            raise ValueError(name)
        return name

    @app.function()
    def leaf(x):
        return x + 1

    @app.function(max_containers=1)
    @mesh.concurrent(max_inputs=4)
    def parent(x):
        return leaf.remote(x)
"""


def jobs(name: str) -> str:
    return JOBS.format(name=name)


def began(mesh: Mesh, name: str) -> int:
    """The process in which the input of this name runs."""
    lines = until(lambda: [line for line in mesh.ledger().lines() if line.startswith(f"begin {name} ")], what=name)
    return int(lines[-1].split()[2])


# --- where inputs run ------------------------------------------------------------------------------------------------


def test_sync_inputs_run_in_a_thread_each(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("threads"))
    calls = [module.meets.spawn(f"n{i}") for i in range(8)]  # two rounds of four
    answers = [call.get(timeout=60) for call in calls]
    assert len({pid for pid, *_ in answers}) == 1
    for number, (call, (_, main, ids, before, after)) in enumerate(zip(calls, answers, strict=True)):
        assert not main
        assert ids == (call.object_id, f"{call.object_id}.0")
        assert (before, after) == ("none", f"n{number}"), "context variables of one input are not seen by another"


def test_async_inputs_run_as_tasks_of_one_loop(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("tasks"))
    calls = [module.meets_later.spawn(f"n{i}") for i in range(4)]
    answers = [call.get(timeout=60) for call in calls]
    assert len({pid for pid, _ in answers}) == 1
    assert [ids for _, ids in answers] == [(call.object_id, f"{call.object_id}.0") for call in calls]


def test_a_container_for_one_input_runs_it_in_the_main_thread(mesh: Mesh) -> None:
    assert mesh.deploy(jobs("main-thread")).alone.remote() is True


@pytest.mark.parametrize("function", ["meets", "meets_later"])
def test_what_inputs_print_is_their_own(own_mesh: Callable[..., Mesh], function: str) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("prints"))
    worker = mesh.start_worker()
    names = {getattr(module, function).spawn(f"n{i}"): f"n{i}" for i in range(4)}
    for call in names:
        call.get(timeout=60)
    lines = until(lambda: found if len(found := re.findall(r"(fc-\w+\.0).*printed by (n\d)", worker.log)) == 4 else [])
    assert {(f"{call.object_id}.0", name) for call, name in names.items()} == set(lines)


def test_one_failure_is_its_own(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("failing"))
    values = list(module.fails.map(["a", "bad", "b"], return_exceptions=True))
    assert values[0] == "a"
    assert isinstance(values[1], ValueError)
    assert values[2] == "b"


def test_target_inputs_say_how_many_containers_and_max_inputs_how_many_inputs(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy("""
        import mesh, os, time
        app = mesh.App("targets")
        @app.function()
        @mesh.concurrent(max_inputs=10, target_inputs=10)
        def one(path, seconds):
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\\n")
            time.sleep(seconds)
    """)
    mesh.start_worker()
    calls = [module.one.spawn(str(mesh.ledger().path), 2) for _ in range(30)]
    for call in calls:
        call.get(timeout=60)
    used = [mesh.ledger().lines().count(pid) for pid in set(mesh.ledger().lines())]
    assert sum(used) == 30
    assert len(used) <= 3


# --- cancel and timeout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "error"), [("sleeps_long", "InputCancellation"), ("waits", "CancelledError")])
def test_some_are_cancelled_and_the_others_go_on(mesh: Mesh, function: str, error: str) -> None:
    module = mesh.deploy(jobs(f"some-{function}"))
    path = str(mesh.ledger().path)
    f = getattr(module, function)
    calls = {name: f.spawn(path, f"some-{function}-{name}", 60 if name in "ab" else 3) for name in "abcd"}
    processes = {began(mesh, f"some-{function}-{name}") for name in "abcd"}
    assert len(processes) == 1
    for name in "ab":
        calls[name].cancel()
        with pytest.raises(RemoteError, match="cancelled: by "):
            calls[name].get(timeout=10)
        assert mesh.ledger().count(f"caught some-{function}-{name} {error}") == 1
    for name in "cd":
        assert calls[name].get(timeout=30) == f"some-{function}-{name}"
        assert mesh.ledger().count(f"caught some-{function}-{name}") == 0
    assert f.remote(path, f"some-{function}-e", 0) == f"some-{function}-e"
    assert began(mesh, f"some-{function}-e") in processes, "the container goes on"


def test_each_input_has_a_timeout_of_its_own(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("timeouts"))
    path = str(mesh.ledger().path)
    module.sleeps.remote(path, "warm", 0)
    late = module.sleeps.spawn(path, "late", 60)
    process = began(mesh, "late")
    rounds = 0
    while mesh.ledger().count("caught late") == 0:  # others begin and end meanwhile, and are none the worse for it
        assert module.sleeps.remote(path, f"short{rounds}", 0.1) == f"short{rounds}"
        assert began(mesh, f"short{rounds}") == process
        rounds += 1
    with pytest.raises(FunctionTimeoutError, match="ran longer than its timeout of 2 s"):
        late.get(timeout=20)
    assert rounds > 2
    assert mesh.ledger().count("caught late InputCancellation") == 1
    assert mesh.ledger().count("caught short") == 0


def test_a_task_that_blocks_the_loop_is_interrupted_alone(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("blocking"))
    mesh.start_worker(MESH_CANCEL_GRACE="6")
    path = str(mesh.ledger().path)
    other = module.blocks.spawn(path, "other", 1)
    blocker = module.blocks.spawn(path, "blocker", 60)
    until(lambda: mesh.ledger().count("blocks blocker"))
    blocker.cancel()
    with pytest.raises(RemoteError, match="cancelled"):
        blocker.get(timeout=20)
    assert other.get(timeout=20) == "other"
    assert module.blocks.remote(path, "other again", 0) == "other again"
    assert len({line.split()[-1] for line in mesh.ledger().lines() if line.startswith("begin")}) == 1


def test_a_thread_that_cannot_be_interrupted_ends_after_the_others(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("retired"))
    worker = mesh.start_worker(MESH_CANCEL_GRACE="1")
    path = str(mesh.ledger().path)
    stubborn = module.stubborn.spawn(path, "stubborn", 0)
    process = began(mesh, "stubborn")
    until(lambda: mesh.ledger().count("swallowed"))
    other = module.stubborn.spawn(path, "other", 0.9)  # by the time the stubborn one is given up, others run
    began(mesh, "other")
    with pytest.raises(FunctionTimeoutError):
        stubborn.get(timeout=20)
    assert other.get(timeout=20) == "other"
    assert module.stubborn.remote(path, "next", 0) == "next"
    assert began(mesh, "next") != process, "it takes no more inputs"
    until(lambda: not alive(process), what="the container is killed when its others have ended")
    assert worker.process.poll() is None


def test_terminate_kills_the_container_and_the_others_run_again(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("terminated"))
    path = str(mesh.ledger().path)
    victim = module.sleeps_long.spawn(path, "victim", 60)
    other = module.sleeps_long.spawn(path, "bystander", 1.5)
    process = began(mesh, "victim")
    assert began(mesh, "bystander") == process
    victim.cancel(terminate_containers=True)
    assert not alive(process)
    assert other.get(timeout=30) == "bystander"
    assert began(mesh, "bystander") != process
    assert other.status().attempts == 1, "it was handed back, which is no try"


# --- with the rest of a worker ---------------------------------------------------------------------------------------


def test_a_container_lends_its_place_only_when_all_its_inputs_wait(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(jobs("lending"))
    mesh.start_worker("--containers", "1")
    assert sorted(module.parent.map(range(8))) == list(range(1, 9))


def test_all_that_run_long_are_listed_as_running(mesh: Mesh) -> None:
    module = mesh.deploy(jobs("listed"))
    path = str(mesh.ledger().path)
    calls = [module.sleeps_long.spawn(path, f"listed-{i}", 60) for i in range(3)]
    until(lambda: all(call.status().state == "running" for call in calls))
    for call in calls:
        call.cancel()


def test_a_crash_takes_all_with_it_and_each_is_tried_again(mesh: Mesh) -> None:
    module = mesh.deploy("""
        import mesh, os, time
        app = mesh.App("crashing")
        @app.function(max_containers=1)
        @mesh.concurrent(max_inputs=3)
        def crashes(path, name):
            with open(path, "a") as file:
                file.write(f"begin {name} {os.getpid()}\\n")
            if name == "poison":
                time.sleep(0.5)
                os._exit(3)
            time.sleep(1)
            return name
    """)
    path = str(mesh.ledger("crashes").path)
    calls = [module.crashes.spawn(path, name) for name in ("poison", "x", "y")]
    with pytest.raises(mesh_module.exception.InternalFailure, match="exited with status 3"):
        calls[0].get(timeout=60)
    for call in calls[1:]:
        try:
            assert call.get(timeout=60) in "xy"
        except mesh_module.exception.InternalFailure:
            pass  # it ran beside the poison three times


# --- classes ---------------------------------------------------------------------------------------------------------

MODEL = """
    import asyncio, mesh, os, threading, time
    app = mesh.App({name!r})

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.cls(max_containers=1, scaledown_window=1)
    @mesh.concurrent(max_inputs=2)
    class Model:
        path: str = mesh.parameter()

        @mesh.enter()
        async def opens(self):
            self.loop = asyncio.get_running_loop()
            note(self.path, "enter 1")

        @mesh.enter()
        def loads(self):
            note(self.path, "enter 2")

        @mesh.method()
        async def later(self, x):
            return x, asyncio.get_running_loop() is self.loop

        @mesh.method()
        def now(self, x, seconds=0):
            note(self.path, "input")
            time.sleep(seconds)
            return x, threading.current_thread() is threading.main_thread()

        @mesh.exit()
        def fails(self):
            note(self.path, "exit 1")
            raise ValueError("will not close")

        @mesh.exit()
        async def closes(self):
            note(self.path, f"exit 2 {{asyncio.get_running_loop() is self.loop}}")
"""


def test_hooks_run_around_the_inputs_of_a_class(own_mesh: Callable[..., Mesh]) -> None:
    """Scaled down when idle, then drained with its worker while an input runs: both times its exit hooks run."""
    mesh = own_mesh()
    module = mesh.deploy(MODEL.format(name="hooks"))
    worker = mesh.start_worker()
    path = mesh.ledger().path
    model = module.Model(path=str(path))
    assert model.later.remote(1) == (1, True)
    assert model.now.remote(2) == (2, False)
    life = ["enter 1", "enter 2", "input", "exit 1", "exit 2 True"]
    until(lambda: mesh.ledger().lines() == life, what="it is scaled down")
    until(lambda: "the exit hook Model.fails failed" in worker.log and "ValueError: will not close" in worker.log)
    call = model.now.spawn(3, 1)
    until(lambda: mesh.ledger().count("input") == 2)
    assert worker.stop() == 0
    assert call.get(timeout=10) == (3, False)
    assert mesh.ledger().lines() == life * 2


def test_an_exit_hook_that_does_not_end_is_killed_and_the_worker_with_it_stops(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy("""
        import mesh, os, time
        app = mesh.App("stubborn-exit")
        @app.cls()
        class Model:
            @mesh.method()
            def pid(self):
                return os.getpid()
            @mesh.exit()
            def closes(self):
                while True:
                    try:
                        time.sleep(60)
                    except BaseException:
                        pass
    """)
    worker = mesh.start_worker(MESH_CANCEL_GRACE="1")
    process = module.Model().pid.remote()
    assert worker.stop() == 0
    assert not alive(process)


def test_exit_hooks_run_when_an_app_ends(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.load(MODEL.format(name="ending"))
    mesh.start_worker()
    with module.app.run():
        assert module.Model(path=str(mesh.ledger().path)).now.remote(1) == (1, False)
    until(lambda: mesh.ledger().count("exit 2 True"))


# --- options ---------------------------------------------------------------------------------------------------------


def test_concurrent_above_function_is_refused(mesh: Mesh) -> None:
    with pytest.raises(InvalidError, match="swap them"):
        mesh.load("""
            import mesh
            app = mesh.App("swapped")
            @mesh.concurrent(max_inputs=3)
            @app.function()
            def f(x): ...
        """)
