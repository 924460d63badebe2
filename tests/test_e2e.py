"""One call, from a caller to a container and back, on a real server with a real worker."""

from __future__ import annotations

import asyncio
import time

import pytest

import mesh as modal
from mesh import Function, FunctionCall
from mesh.broker.registry import Registry
from mesh.exception import ExecutionError, NotFoundError, NotReadyError, SerializationError
from tests.support import Mesh

JOBS = """
    import mesh, os, sys, time
    app = mesh.App({name!r})

    @app.function()
    def double(x, *, plus=0):
        return 2 * x + plus

    @app.function()
    async def later(x):
        import asyncio
        await asyncio.sleep(0.01)
        return x

    @app.function()
    def about():
        return {{
            "call": mesh.current_function_call_id(),
            "input": mesh.current_input_id(),
            "attempt": mesh.current_attempt(),
            "local": mesh.is_local(),
            "cwd": os.getcwd(),
            "file": __file__,
        }}

    class MyError(Exception):
        def __init__(self, code, text):
            super().__init__(f"{{code}}: {{text}}")
            self.code = code

    @app.function()
    def fail(code):
        raise MyError(code, "no")

    @app.function()
    def sleep(seconds):
        time.sleep(seconds)
        return "slept"

    @app.function()
    def give(what):
        return what

    @app.function()
    def fib(n):
        return n if n < 2 else fib.remote(n - 1) + fib.remote(n - 2)
"""


def jobs(mesh: Mesh, name: str) -> object:
    return mesh.deploy(JOBS.format(name=name))


def test_spawn_and_get(mesh: Mesh) -> None:
    jobs(mesh, "spawn-and-get")
    double = Function.from_name("spawn-and-get", "double")
    call = double.spawn(21, plus=1)
    assert call.object_id.startswith("fc-")
    assert len(call.object_id) == 29
    assert FunctionCall.from_id(call.object_id).get(timeout=10) == 43
    assert call.get() == 43  # reading does not use it up


def test_remote_in_both_faces(mesh: Mesh) -> None:
    module = jobs(mesh, "both-faces")
    assert module.double.remote(4) == 8
    assert module.later.remote("x") == "x"

    async def use() -> list[object]:
        call = await module.double.spawn.aio(5)
        return [await module.double.remote.aio(4), await call.get.aio(timeout=10), await call.num_inputs.aio()]

    assert asyncio.run(use()) == [8, 10, 1]


def test_a_container_knows_where_it_is(mesh: Mesh) -> None:
    module = jobs(mesh, "about")
    call = module.about.spawn()
    about = call.get()
    assert about["call"] == call.object_id
    assert about["input"] == f"{call.object_id}.0"
    assert about["attempt"] == 1
    assert about["local"] is False
    assert about["cwd"] != str(mesh.directory)
    assert about["file"].startswith(str(mesh.directory / "cache" / "code"))
    assert modal.is_local()
    assert modal.current_function_call_id() is None


def test_an_exception_comes_back_as_itself(mesh: Mesh) -> None:
    module = jobs(mesh, "exceptions")
    with pytest.raises(module.MyError) as caught:
        module.fail.remote(7)
    assert caught.value.code == 7
    assert str(caught.value) == "7: no"
    assert "in fail" in caught.value.__notes__[0]
    assert 'raise MyError(code, "no")' in caught.value.__notes__[0]


def test_not_ready_is_the_builtin_timeout(mesh: Mesh) -> None:
    module = jobs(mesh, "not-ready")
    call = module.sleep.spawn(0.7)
    began = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        call.get(timeout=0)
    assert isinstance(caught.value, NotReadyError)
    assert not isinstance(caught.value, modal.Error)
    with pytest.raises(TimeoutError):
        call.get(timeout=0.1)
    assert time.monotonic() - began < 0.6
    assert call.get(timeout=10) == "slept"


def test_status(mesh: Mesh) -> None:
    module = jobs(mesh, "status")
    call = module.give.spawn("x")
    call.get()
    status = call.status()
    assert (status.state, status.app, status.function, status.attempts) == ("succeeded", "status", "give", 1)
    assert status.created <= status.finished + 0.1
    failed = module.fail.spawn(1)
    with pytest.raises(module.MyError):
        failed.get()
    assert failed.status().state == "failed"
    assert failed.status().last_error == f"{module.__name__}.MyError: 1: no"


def test_gather(mesh: Mesh) -> None:
    module = jobs(mesh, "gather")
    calls = [module.double.spawn(n) for n in range(20)]
    assert FunctionCall.gather(*calls) == [2 * n for n in range(20)]
    with pytest.raises(module.MyError):
        FunctionCall.gather(calls[0], module.fail.spawn(2))
    kept = FunctionCall.gather(calls[1], module.fail.spawn(3), return_exceptions=True)
    assert kept[0] == 2
    assert isinstance(kept[1], module.MyError)


def test_handles_travel_as_arguments_and_results(mesh: Mesh) -> None:
    module = jobs(mesh, "handles")
    function = module.give.remote(module.double)
    assert function.remote(3) == 6
    call = module.double.spawn(8)
    assert module.give.remote([call])[0].get() == 16


@pytest.mark.parametrize("value", [None, {"a": [1, 2.5, "é"]}, b"bytes", (1, 2), {1: "a"}, {"x", "y"}, float("inf")])
def test_values_come_back_exactly(mesh: Mesh, value: object) -> None:
    module = jobs(mesh, f"values-{abs(hash(repr(value)))}")
    back = module.give.remote(value)
    assert back == value
    assert type(back) is type(value)


def test_local_and_raw(mesh: Mesh) -> None:
    module = jobs(mesh, "local")
    assert module.double.local(2) == 4
    assert module.double.get_raw_f()(2) == 4
    with pytest.raises(TypeError, match="not callable"):
        module.double(2)
    with pytest.raises(ExecutionError, match="looked up by name"):
        Function.from_name("local", "double").local(2)


def test_recursion(mesh: Mesh) -> None:
    assert jobs(mesh, "recursion").fib.remote(5) == 5


def test_names_that_do_not_exist(mesh: Mesh) -> None:
    jobs(mesh, "exists")
    nothing = Function.from_name("no-such-app", "f")  # no I/O: nothing is raised here
    with pytest.raises(NotFoundError, match="no app of this name is deployed"):
        nothing.spawn(1)
    with pytest.raises(NotFoundError, match="it has about, double"):
        Function.from_name("exists", "no-such-function").remote()
    with pytest.raises(NotFoundError):
        Function.from_name("exists", "nope").hydrate()
    assert Function.from_name("exists", "double").hydrate().remote(1) == 2


def test_calls_that_do_not_exist(mesh: Mesh) -> None:
    with pytest.raises(NotFoundError, match="fc- and 26 characters"):
        FunctionCall.from_id("junk").get(timeout=0)
    unknown = FunctionCall.from_id("fc-01M85J7G2M9DTV3BX9ECJ4A3A7")
    with pytest.raises((NotFoundError, modal.exception.OutputExpiredError)):
        unknown.get(timeout=0)
    with pytest.raises((NotFoundError, modal.exception.OutputExpiredError)):
        unknown.get()  # does not wait for what cannot come


def test_what_cannot_be_sent(mesh: Mesh) -> None:
    import threading

    module = jobs(mesh, "unsendable")
    with pytest.raises(SerializationError, match=r"cannot send argument 1: at \['lock'\]"):
        module.give.spawn({"lock": threading.Lock()})
    with pytest.raises(SerializationError, match="cannot send plus"):
        module.double.spawn(1, plus=threading.Lock())


def test_an_app_that_is_not_on_the_mesh(mesh: Mesh) -> None:
    module = mesh.load(JOBS.format(name="not-running"))
    with pytest.raises(ExecutionError, match="is not running"):
        module.double.spawn(1)


def test_run_an_app_for_a_block(mesh: Mesh) -> None:
    module = mesh.load(JOBS.format(name="one-run"))
    with module.app.run():
        assert module.app.app_id.startswith("ap-")
        assert module.double.remote(3) == 6
        with pytest.raises(NotFoundError):
            Function.from_name("one-run", "double").remote(3)
    with pytest.raises(ExecutionError, match="is not running"):
        module.double.spawn(1)

    async def use() -> int:
        async with module.app.run():
            return await module.double.remote.aio(5)

    assert asyncio.run(use()) == 10


def test_many_first_calls_look_the_function_up_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs(mesh, "first-calls")
    reads, read = list[str](), Registry.function

    async def count(self: Registry, app: str, function: str) -> object:
        reads.append(function)
        return await read(self, app, function)

    monkeypatch.setattr(Registry, "function", count)
    double = Function.from_name("first-calls", "double")

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(double.remote.aio(n) for n in range(50)))

    assert asyncio.run(all_at_once()) == [2 * n for n in range(50)]
    assert reads == ["double"]
