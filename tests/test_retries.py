"""Failures that are tried again: how often, after what delay, and what does not count."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from mesh import FunctionCall
from mesh.broker import Broker, Stored
from mesh.exception import FunctionTimeoutError
from tests.support import Ledger, Mesh, until

FLAKY = """
    import mesh, os, time
    app = mesh.App({name!r})
    quick = {{"initial_delay": 0.2, "min_delay": 0.2, "backoff_coefficient": 2.0}}

    def note(path):
        with open(path, "a") as file:
            file.write(f"{{mesh.current_attempt()}} {{time.time()}} {{os.getpid()}} {{mesh.last_error()}}\\n")
        return len(open(path).readlines())

    @app.function(retries=mesh.Retries(max_retries=3, **quick))
    def works_at(path, count):
        if note(path) < count:
            raise ValueError(f"not yet")
        return mesh.current_attempt()

    @app.function(retries=2)
    def works_at_third(path):
        if note(path) < 3:
            raise ValueError("not yet")
        return mesh.current_attempt()

    @app.function()
    def never(path):
        note(path)
        raise ValueError("never")

    @app.function(retries=mesh.Retries(max_retries=5, retry_on=OSError, abort_on=FileNotFoundError, **quick))
    def picky(path, kind):
        note(path)
        raise {{"value": ValueError, "os": OSError, "file": FileNotFoundError}}[kind]("x")

    @app.function(timeout=1, retries=mesh.Retries(max_retries=1, **quick))
    def slow(path):
        if note(path) < 2:
            time.sleep(60)
        return "in time"

    @app.function(timeout=1, retries=mesh.Retries(max_retries=1, **quick))
    def always_slow(path):
        note(path)
        try:
            time.sleep(60)
        finally:
            open(path + ".finally", "a").write("x\\n")

    @app.function(retries=mesh.Retries(max_retries=1, **quick))
    def crashes_then_fails(path):
        count = note(path)
        if count == 1:
            os.kill(os.getpid(), 9)
        if count == 2:
            raise ValueError("a failure")
        return mesh.current_attempt()
"""


OWN = """
    import mesh
    app = mesh.App({name!r})

    class ShopError(Exception):
        pass

    class Busy(ShopError):
        def __init__(self, shop, *, code):
            super().__init__(f"{{shop}} is busy")
            self.code = code

    class Closed(Busy):
        pass

    ERRORS = {{
        "busy": lambda: Busy("book", code=1),
        "closed": lambda: Closed("book", code=2),
        "shop": lambda: ShopError("no"),
        "value": lambda: ValueError("no"),
        "exit": lambda: SystemExit(3),
    }}

    def raise_one(path, kind):
        with open(path, "a") as file:
            file.write(f"{{mesh.current_attempt()}}\\n")
        raise ERRORS[kind]()

    quick = {{"max_retries": 2, "initial_delay": 0, "min_delay": 0}}

    @app.function(retries=mesh.Retries(**quick, retry_on=Busy))
    def on_busy(path, kind):
        raise_one(path, kind)

    @app.function(retries=mesh.Retries(**quick, retry_on=(ShopError, SystemExit), abort_on=(Closed,)))
    def on_shop_but_closed(path, kind):
        raise_one(path, kind)

    if __name__ == "__main__":
        import sys
        app.deploy()
        calls = [app.registered_functions[name].spawn(*rest) for name, *rest in zip(*[iter(sys.argv[1:])] * 3)]
        for call in calls:
            try:
                call.get(timeout=40)
            except Exception as error:
                print(type(error).__name__)
"""
OWN_CASES = [
    ("on_busy", "busy", 3, "Busy"),
    ("on_busy", "closed", 3, "Closed"),  # a class below the one that was named
    ("on_busy", "shop", 1, "ShopError"),  # and one above it
    ("on_busy", "value", 1, "ValueError"),
    ("on_shop_but_closed", "busy", 3, "Busy"),
    ("on_shop_but_closed", "closed", 1, "Closed"),  # abort_on goes first
    ("on_shop_but_closed", "shop", 3, "ShopError"),
    ("on_shop_but_closed", "value", 1, "ValueError"),
    ("on_shop_but_closed", "exit", 3, "ExecutionError"),
]


@pytest.mark.parametrize("how", ["module", "script"])
def test_exceptions_of_the_users_decide_by_inheritance(mesh: Mesh, how: str) -> None:
    """The worker decides, which has neither the classes nor the right to unpickle them."""
    source = OWN.format(name=f"own-{how}")
    ledgers = [mesh.ledger(f"own-{how}-{number}") for number in range(len(OWN_CASES))]
    cases = list(zip(OWN_CASES, ledgers, strict=True))
    if how == "module":
        module = mesh.deploy(source)
        calls = [getattr(module, name).spawn(str(ledger.path), kind) for (name, kind, _, _), ledger in cases]
        raised = [type(outcome).__name__ for outcome in FunctionCall.gather(*calls, return_exceptions=True)]
    else:
        arguments = [text for (name, kind, _, _), ledger in cases for text in (name, str(ledger.path), kind)]
        done = mesh.python(source, *arguments)
        assert done.stderr == ""
        raised = done.stdout.split()
    assert raised == [error for _, _, _, error in OWN_CASES]
    assert [ledger.count() for ledger in ledgers] == [tries for _, _, tries, _ in OWN_CASES]


@pytest.fixture
def flaky(mesh: Mesh, request: pytest.FixtureRequest) -> object:
    return mesh.deploy(FLAKY.format(name=request.node.name))


@pytest.fixture
def ledger(mesh: Mesh, request: pytest.FixtureRequest) -> Ledger:
    return mesh.ledger(request.node.name)


def times(ledger: Ledger) -> list[float]:
    return [float(line.split()[1]) for line in ledger.lines()]


def attempts(ledger: Ledger) -> list[int]:
    return [int(line.split()[0]) for line in ledger.lines()]


def test_fails_then_succeeds(flaky: object, ledger: Ledger) -> None:
    assert flaky.works_at.remote(str(ledger.path), 3) == 3
    assert attempts(ledger) == [1, 2, 3]
    first, second, third = times(ledger)
    assert 0.2 <= second - first < 1.0
    assert 0.4 <= third - second < 1.2  # the delay grows


def test_the_last_error_is_visible(flaky: object, ledger: Ledger) -> None:
    call = flaky.works_at.spawn(str(ledger.path), 4)
    until(lambda: ledger.count() >= 2)
    assert call.status().last_error == "ValueError: not yet"
    assert call.get(timeout=20) == 4
    assert ledger.lines()[1].endswith("ValueError: not yet")
    assert call.status().attempts == 4


def test_a_number_means_one_second_apart(flaky: object, ledger: Ledger) -> None:
    assert flaky.works_at_third.remote(str(ledger.path)) == 3
    first, second, third = times(ledger)
    assert 1.0 <= second - first < 2.0
    assert 1.0 <= third - second < 2.0


def test_all_retries_fail(mesh: Mesh, flaky: object, ledger: Ledger) -> None:
    call = flaky.works_at.spawn(str(ledger.path), 99)
    with pytest.raises(ValueError, match="not yet"):
        call.get(timeout=30)
    assert attempts(ledger) == [1, 2, 3, 4]
    assert (call.status().state, call.status().attempts) == ("failed", 4)
    letter = dead_letter(mesh, call.object_id)
    assert letter.headers["Mesh-Error"] == "ValueError: not yet"
    assert str(ledger.path).encode() in letter.body  # the original arguments


def dead_letter(mesh: Mesh, call: str) -> Stored:
    async def read(broker: Broker) -> list[Stored]:
        filter = f"{broker.topology.root}.dead.*.*.{call}.0"
        return await broker.connection.get_range(broker.topology.dead, 1, 10, filter)

    (letter,) = until(lambda: mesh.ask(read), what="its dead letter, which comes after its result")
    return letter


def test_without_retries_there_is_one_try(flaky: object, ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="never"):
        flaky.never.remote(str(ledger.path))
    assert attempts(ledger) == [1]


@pytest.mark.parametrize(("kind", "tries"), [("value", 1), ("os", 6), ("file", 1)])
def test_only_some_exceptions(mesh: Mesh, kind: str, tries: int) -> None:
    module = mesh.deploy(FLAKY.format(name=f"picky-{kind}"))
    ledger = mesh.ledger(f"picky-{kind}")
    with pytest.raises((ValueError, OSError)):
        module.picky.remote(str(ledger.path), kind)
    assert ledger.count() == tries


def test_a_timeout_is_tried_again(flaky: object, ledger: Ledger) -> None:
    assert flaky.slow.remote(str(ledger.path)) == "in time"
    assert attempts(ledger) == [1, 2]


def test_timeouts_use_up_the_retries(flaky: object, ledger: Ledger) -> None:
    call = flaky.always_slow.spawn(str(ledger.path))
    began = time.monotonic()
    with pytest.raises(FunctionTimeoutError):
        call.get(timeout=30)
    assert 2.2 <= time.monotonic() - began < 10  # two tries of a second, never early
    assert ledger.count() == 2
    assert call.status().state == "timed_out"
    assert (ledger.path.with_name(ledger.path.name + ".finally")).read_text() == "x\nx\n"


def test_a_crash_is_no_try(flaky: object, ledger: Ledger) -> None:
    assert flaky.crashes_then_fails.remote(str(ledger.path)) == 2
    assert attempts(ledger) == [1, 1, 2]


def test_an_input_that_takes_every_worker_with_it_ends(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=1)
    module = mesh.deploy(
        """
        import mesh, os, signal, time
        app = mesh.App("poison")
        @app.function()
        def kill_the_worker(path):
            with open(path, "a") as file:
                file.write("begin\\n")
            with open(f"/proc/{os.getppid()}/stat") as stat:  # of the zygote, whose parent the worker is
                os.kill(int(stat.read().rpartition(")")[2].split()[1]), signal.SIGKILL)
            time.sleep(60)
        @app.function()
        def fine():
            return "fine"
        """
    )
    call = module.kill_the_worker.spawn(str(mesh.ledger().path))
    for count in (1, 2, 3):
        worker = mesh.start_worker()
        assert until(worker.process.poll) == -signal.SIGKILL
        assert mesh.ledger().count() == count
    mesh.start_worker()
    with pytest.raises(Exception, match=r"crashed 3 times: worker lost; worker .* lost; worker .* lost"):
        call.get(timeout=20)
    assert module.fine.remote() == "fine"
    assert mesh.ledger().count() == 3


def test_a_delay_outlives_its_worker(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    module = mesh.deploy(FLAKY.format(name="outlives"))
    worker = mesh.start_worker()
    call = module.works_at_third.spawn(str(mesh.ledger().path))
    until(lambda: mesh.ledger().count() == 1)
    until(lambda: call.status().state == "retrying", what="the failure is recorded")
    worker.kill()
    mesh.start_worker()
    assert call.get(timeout=20) == 3
    assert attempts(mesh.ledger()) == [1, 2, 3]


def test_a_try_counts_also_where_the_server_has_forgotten_its_delivery(own_mesh: Callable[..., Mesh]) -> None:
    """As a server that is killed forgets the newest: its deliveries are counted from one again."""
    mesh = own_mesh()
    module = mesh.deploy(FLAKY.format(name="forgotten"))
    first = mesh.start_worker()
    ledger = mesh.ledger()
    call = module.works_at_third.spawn(str(ledger.path))
    until(lambda: call.status().attempts == 1, what="the first try is written down")
    first.kill()
    mesh.ask(lambda broker: broker.consumers.remove("forgotten+works_at_third+_"))
    mesh.start_worker()
    assert call.get(timeout=30) == 3
    assert [line.split()[0] for line in ledger.lines()] == ["1", "2", "3"]
