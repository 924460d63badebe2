"""Containers that die, code that does not start, inputs that take their worker along: each told apart, none lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from mesh import FunctionCall
from mesh.broker import Broker
from mesh.exception import ExecutionError, FunctionTimeoutError, InternalFailure, OutOfMemoryError
from mesh.records import WorkerRecord
from tests.support import Mesh, until

# --- while a call runs -----------------------------------------------------------------------------------------------

DYING = """
    import ctypes, mesh, os, signal, sys, time
    app = mesh.App({name!r})

    @app.function(memory=150)
    def die(how):
        if how == "segfault":
            ctypes.string_at(0)
        if how == "abort":
            os.abort()
        if how == "exit 0":
            os._exit(0)
        if how == "exit 3":
            os._exit(3)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "terminated":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "odd signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 3)
        if how == "out of memory":
            held = b"x" * (1 << 28)
            time.sleep(60)
        return how
"""


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("segfault", InternalFailure, r"container killed by signal 11 \(SIGSEGV\)"),
        ("abort", InternalFailure, r"container killed by signal 6 \(SIGABRT\)"),
        ("exit 0", InternalFailure, "container exited with status 0"),
        ("exit 3", InternalFailure, "container exited with status 3"),
        ("killed", InternalFailure, r"container killed by signal 9 \(SIGKILL\)"),
        ("terminated", InternalFailure, r"container killed by signal 15 \(SIGTERM\)"),
        ("odd signal", InternalFailure, r"container killed by signal 37 \(unknown\)"),
        (
            "out of memory",
            OutOfMemoryError,
            r"container out of memory: killed by its worker, limit 150 MiB, peak \d+ MiB",
        ),
    ],
)
def test_each_way_to_die_has_its_own_text(mesh: Mesh, how: str, error: type[Exception], text: str) -> None:
    module = mesh.deploy(DYING.format(name=f"dying-{how}".replace(" ", "-")))
    times = "; ".join([rf"{text} on \S+"] * 3)
    with pytest.raises(InternalFailure, match=f"^function 'die' crashed 3 times: {times}$") as caught:
        module.die.remote(how)
    assert type(caught.value) is error
    assert module.die.remote("live") == "live"


def test_a_crash_within_the_budget_costs_nothing(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os
        app = mesh.App("twice")

        @app.function()
        def twice(path):
            with open(path, "a") as file:
                file.write("x\\n")
            if len(open(path).readlines()) < 3:
                os._exit(7)
            return mesh.current_attempt(), mesh.last_error()
        """
    )
    mesh.start_worker()
    attempt, error = module.twice.remote(str(mesh.ledger().path))
    assert attempt == 1
    assert error.startswith("container exited with status 7 on ")


# --- an input that takes its worker along ----------------------------------------------------------------------------

POISON = """
    import mesh, os, signal, time
    app = mesh.App("poison")

    @app.function()
    def kill_the_worker(path):
        with open(f"/proc/{os.getppid()}/stat") as stat:  # of the zygote, whose parent the worker is
            worker = int(stat.read().rpartition(")")[2].split()[1])
        with open(path, "a") as file:
            file.write(f"{worker}\\n")
        os.kill(worker, signal.SIGKILL)
        time.sleep(60)

    @app.function()
    def fine(x):
        return x
"""


def test_an_input_that_kills_its_worker_ends_with_three_of_many_workers(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=1)
    module = mesh.deploy(POISON)
    workers = [mesh.start_worker() for _ in range(5)]
    call = module.kill_the_worker.spawn(str(mesh.ledger().path))
    others = [module.fine.spawn(n) for n in range(20)]
    with pytest.raises(InternalFailure, match=r"crashed 3 times: worker lost; worker \S+ lost; worker \S+ lost$"):
        call.get(timeout=60)
    assert mesh.ledger().count() == len(set(mesh.ledger().lines())) == 3
    dead = [worker for worker in workers if worker.process.poll() is not None]
    assert [worker.process.returncode for worker in dead] == [-signal.SIGKILL] * 3
    assert FunctionCall.gather(*others) == list(range(20))


# --- code that does not start ----------------------------------------------------------------------------------------

STARTING = """
    import ctypes, mesh, os, time
    app = mesh.App("starting")
    if not mesh.is_local():
        {at_import}

    @app.function(startup_timeout={startup_timeout}, timeout={timeout})
    def f(x):
        return x
"""
SLOW = "end = time.monotonic() + 600\n        while time.monotonic() < end: pass"


def records(mesh: Mesh) -> list[WorkerRecord]:
    async def read(broker: Broker) -> list[WorkerRecord]:
        return await broker.workers.all()

    return mesh.ask(read)


def starting(at_import: str, startup_timeout: float = 60, timeout: float = 60) -> str:
    return STARTING.format(at_import=at_import, startup_timeout=startup_timeout, timeout=timeout)


@pytest.mark.parametrize(
    ("at_import", "startup_timeout", "text"),
    [
        ("import not_there", 60, "ModuleNotFoundError: No module named 'not_there' ('not_there' is not installed in"),
        ("raise ValueError('bad set-up')", 60, "ValueError: bad set-up"),
        ("raise SystemExit(4)", 60, "SystemExit: 4"),
        ("open(__file__ + '.csv')", 60, "was not shipped: only .py files travel with a deploy"),
        ("os._exit(3)", 60, "its container exited with status 3 while it started"),
        ("os._exit(0)", 60, "its container exited with status 0 while it started"),
        ("ctypes.string_at(0)", 60, "its container killed by signal 11 (SIGSEGV) while it started"),
        ("time.sleep(600)", 1, "its imports and set-up took longer than its startup_timeout of 1 s"),
        (SLOW, 1, "its imports and set-up took longer than its startup_timeout of 1 s"),
    ],
)
def test_code_that_does_not_start_waits_for_better_code(
    own_mesh: Callable[..., Mesh], at_import: str, startup_timeout: float, text: str
) -> None:
    mesh = own_mesh()
    module = mesh.deploy(starting(at_import, startup_timeout))
    worker = mesh.start_worker()
    calls = [module.f.spawn(n) for n in range(12)]
    until(lambda: text in calls[0].status().waiting_for, what="status says what it waits for")
    until(lambda: any(text in call.status().last_error for call in calls), what="and the call what happened to it")
    until(lambda: text in records(mesh)[0].unfit.get("starting.f", ""), what="and the worker what it does not run")
    until(lambda: "trying again in 2 s" in worker.log, what="it rests longer each time")
    assert {call.status().state for call in calls} == {"queued"}
    mesh.redeploy(module, starting("pass"))
    assert FunctionCall.gather(*calls) == list(range(12))
    assert {call.status().attempts for call in calls} == {1}
    until(lambda: not records(mesh)[0].unfit, what="nothing is wrong any more")


def test_better_code_runs_at_once_however_long_the_rest_is(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(starting("os._exit(3)"))
    worker = mesh.start_worker()
    call = module.f.spawn(5)  # one alone is in the worker's hands each time it tries
    until(lambda: "trying again in 16 s" in worker.log, timeout=60, what="it rests longer each time")
    began = time.monotonic()
    mesh.redeploy(module, starting("pass"))
    assert call.get(timeout=60) == 5
    assert time.monotonic() - began < 12


def test_another_worker_runs_what_does_not_start_here(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(starting("os.environ['TZ'] == 'here' or os._exit(3)"))
    broken = mesh.start_worker(TZ="elsewhere")
    call = module.f.spawn(5)
    until(lambda: "trying again in 16 s" in broken.log, timeout=60, what="it does not start there")
    began = time.monotonic()
    mesh.start_worker(TZ="here")
    assert call.get(timeout=60) == 5
    assert time.monotonic() - began < 12
    later = [module.f.spawn(n) for n in range(30)]
    assert FunctionCall.gather(*later) == list(range(30))
    assert {call.status().attempts for call in [call, *later]} == {1}


def test_containers_that_fail_together_are_one_failure(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    starts = mesh.ledger()
    source = starting(f"print('x', file=open({str(starts.path)!r}, 'a')); time.sleep(0.5); os._exit(3)")
    module = mesh.deploy(source.replace("startup_timeout", "min_containers=4, startup_timeout"))
    worker = mesh.start_worker("--containers", "4")
    module.f.spawn(1)
    until(lambda: "trying again in 4 s" in worker.log)
    assert starts.count() >= 9  # of the four that are started each time the last may still be on its way


def test_starting_has_a_clock_of_its_own(own_mesh: Callable[..., Mesh]) -> None:
    """Imports that take longer than the `timeout` of a call are no timeout of the call's."""
    mesh = own_mesh()
    module = mesh.deploy(starting("time.sleep(2)", startup_timeout=60, timeout=1))
    mesh.start_worker()
    assert module.f.remote(5) == 5


def test_without_a_startup_timeout_its_timeout_limits_the_start(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(starting("time.sleep(600)", timeout=1).replace("startup_timeout=60, ", ""))
    mesh.start_worker()
    call = module.f.spawn(1)
    until(lambda: "longer than its startup_timeout of 1 s" in call.status().waiting_for)
    assert call.status().state == "queued"


@pytest.mark.parametrize(
    ("at_import", "error", "text"),
    [
        ("raise ValueError('bad set-up')", ExecutionError, "ValueError: bad set-up"),
        ("import not_there", ExecutionError, "'not_there' is not installed in this function's environment"),
        ("os._exit(3)", InternalFailure, "its container exited with status 3 while it started"),
        ("time.sleep(600)", FunctionTimeoutError, "longer than its startup_timeout of 1 s"),
    ],
)
def test_in_a_single_run_it_fails_the_call_at_once(
    mesh: Mesh, at_import: str, error: type[Exception], text: str
) -> None:
    module = mesh.load(starting(at_import, startup_timeout=1 if "sleep" in at_import else 60))
    with module.app.run(), pytest.raises(error, match=text):
        module.f.remote(1)


def test_a_container_that_is_flaky_at_start_delays_only_itself(own_mesh: Callable[..., Mesh]) -> None:
    """While one container serves, that another one does not start stops nothing."""
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os, time
        app = mesh.App("flaky")
        if not mesh.is_local():
            try:
                os.mkdir(os.environ["DIRECTORY"])
            except FileExistsError:
                os._exit(3)

        @app.function(env={{"DIRECTORY": {directory!r}}})
        def f(x):
            time.sleep(0.3)
            return x
        """.format(directory=str(mesh.directory / "mark"))
    )
    worker = mesh.start_worker("--containers", "4")
    calls = [module.f.spawn(n) for n in range(20)]
    assert FunctionCall.gather(*calls) == list(range(20))
    assert "status 3 while it started" in worker.log
    assert len(worker.containers()) == 1
