"""Bad input gets a clear error at the earliest moment, loses nothing, and the worker lives on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest

import mesh as modal
from mesh import Function, FunctionCall, options
from mesh.broker import Broker, Stored
from mesh.config import Settings
from mesh.exception import (
    AuthError,
    ConnectionError,
    DeserializationError,
    ExecutionError,
    FunctionTimeoutError,
    InternalFailure,
    InvalidError,
    NotFoundError,
    OutputExpiredError,
    ResourceExhaustedError,
    SerializationError,
    ServerWarning,
    ServiceError,
    UnimplementedError,
    VersionError,
)
from mesh.protocol import Address, new_call_id, new_client_token
from mesh.server import Credentials, NatsServer
from tests.support import Mesh, new_mesh, until

ODD = """
    import ctypes, mesh, os, sys, threading, time
    app = mesh.App({name!r})

    class Unpicklable(Exception):
        def __init__(self, text):
            super().__init__(text)
            self.lock = threading.Lock()

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no words")
        __repr__ = __str__

    class Weird:
        def __reduce__(self):
            raise TypeError("I stay here")
        def __repr__(self):
            raise RuntimeError("no words")

    @app.function()
    def echo(x=None):
        return x

    @app.function()
    def returns_a_lock():
        return {{"a": [threading.Lock()]}}

    @app.function()
    def returns_weird():
        return Weird()

    @app.function()
    def returns_a_coroutine():
        async def inner(): ...
        return inner()

    @app.function()
    def raises_unpicklable():
        raise Unpicklable("with a lock")

    @app.function()
    def raises_mute():
        raise Mute()

    @app.function()
    def raises_exit():
        sys.exit(3)

    @app.function()
    def raises_interrupt():
        raise KeyboardInterrupt

    @app.function()
    def exits():
        os._exit(0)

    @app.function()
    def segfaults():
        ctypes.string_at(0)

    @app.function()
    def closes_stdout():
        sys.stdout.close()
        os.close(1)
        print("still here")
        return "closed"

    @app.function()
    def closes_sockets():
        os.closerange(3, 1000)
        return "closed"

    @app.function()
    def forks():
        if os.fork() == 0:
            return "child"
        os.wait()
        return "parent"

    @app.function(timeout=1)
    def hangs():
        while True:
            pass

    @app.function()
    def sleeps(seconds):
        time.sleep(seconds)
"""


@pytest.fixture
def odd(mesh: Mesh, request: pytest.FixtureRequest) -> object:
    """The module above, deployed under a name of the test's own; at the end the worker must still be of use."""
    module = mesh.deploy(ODD.format(name=request.node.name.replace("[", "-").replace("]", "")))
    yield module
    assert module.echo.remote("alive") == "alive"


# --- what functions return and raise ---------------------------------------------------------------------------------


def test_a_result_that_cannot_be_pickled(odd: object) -> None:
    with pytest.raises(SerializationError, match=r"at \['a'\]\[0\]: .*lock.* cannot be pickled"):
        odd.returns_a_lock.remote()


def test_a_result_whose_repr_raises(odd: object) -> None:
    with pytest.raises(SerializationError, match="whose repr raises RuntimeError> cannot be pickled: I stay here"):
        odd.returns_weird.remote()


def test_a_function_that_forgot_to_be_async(odd: object) -> None:
    with pytest.raises(InvalidError, match="returned a coroutine: make it an async function"):
        odd.returns_a_coroutine.remote()


def test_an_exception_that_cannot_be_pickled(odd: object) -> None:
    with pytest.raises(SerializationError, match=r"Unpicklable: with a lock \(the exception itself could not be sent"):
        odd.raises_unpicklable.remote()


def test_an_exception_whose_str_raises(odd: object) -> None:
    with pytest.raises(odd.Mute):
        odd.raises_mute.remote()


def test_sys_exit_is_a_failure_and_not_an_exit_here(odd: object) -> None:
    with pytest.raises(ExecutionError, match="SystemExit: 3"):
        odd.raises_exit.remote()
    with pytest.raises(ExecutionError, match="KeyboardInterrupt"):
        odd.raises_interrupt.remote()


def test_a_function_that_exits_its_process(odd: object) -> None:
    with pytest.raises(InternalFailure, match="crashed 3 times: container exited with status 0 on") as caught:
        odd.exits.remote()
    assert str(caught.value).count("exited with status 0") == 3


def test_a_function_that_segfaults(odd: object) -> None:
    with pytest.raises(InternalFailure, match=r"crashed 3 times: container killed by signal 11 \(SIGSEGV\)"):
        odd.segfaults.remote()


def test_a_function_that_closes_stdout(odd: object) -> None:
    assert odd.closes_stdout.remote() == "closed"


def test_a_function_that_closes_every_descriptor(odd: object) -> None:
    with pytest.raises(InternalFailure, match="crashed 3 times"):
        odd.closes_sockets.remote()


def test_a_function_that_forks_answers_once(odd: object) -> None:
    assert odd.forks.remote() == "parent"


def test_a_function_that_never_ends(odd: object) -> None:
    began = time.monotonic()
    with pytest.raises(FunctionTimeoutError, match="ran longer than its timeout of 1 s") as caught:
        odd.hangs.remote()
    assert 1 <= time.monotonic() - began < 5
    assert not isinstance(caught.value, TimeoutError)


# --- code ------------------------------------------------------------------------------------------------------------


def test_code_that_cannot_be_pickled(mesh: Mesh) -> None:
    module = mesh.load(
        """
        import mesh, threading
        app = mesh.App("unpicklable-code")
        lock = threading.Lock()

        @app.function(serialized=True)
        def locked():
            with lock:
                return 1
        """
    )
    with pytest.raises(SerializationError, match=r"cannot send function 'locked' by value: at its global 'lock'"):
        module.app.deploy()


def test_code_by_value(mesh: Mesh) -> None:
    app = modal.App("by-value")
    factor = 3

    @app.function(serialized=True)
    def times(x: int) -> int:
        return factor * x

    app.deploy()
    assert times.remote(5) == 15


def test_code_of_another_python(mesh: Mesh, own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    app = modal.App("other-python")

    @app.function(serialized=True)
    def f() -> int:
        return 1

    app.deploy()

    async def change_python(broker: Broker) -> None:
        import dataclasses

        head, sequence = await broker.registry.head("other-python")
        record = await broker.registry.function("other-python", "f")
        assert head is not None
        assert record is not None
        code = dataclasses.replace(record.code, python="3.99")
        newer = dataclasses.replace(head, version=2)
        await broker.registry.publish(newer, [dataclasses.replace(record, code=code, version="x")], sequence)

    mesh.ask(change_python)
    mesh.start_worker()
    call = f.spawn()
    told = pytest.warns(ServerWarning, match=r"was deployed by value from Python 3\.99, and can only run there")
    with told, pytest.raises(TimeoutError):
        call.get(timeout=4)
    assert "Python 3.99" in call.status().waiting_for


def test_a_module_missing_on_the_worker(mesh: Mesh) -> None:
    module = mesh.load(
        """
        import mesh
        app = mesh.App("missing-module")
        if mesh.is_local():
            import json as not_there
        else:
            import not_there

        @app.function()
        def f():
            return 1
        """
    )
    with (
        module.app.run(),
        pytest.raises(ExecutionError, match="'not_there' is not installed in this function's environment"),
    ):
        module.f.remote()


def test_a_caller_without_the_module(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(ODD.format(name="no-module"), name="only_here")
    mesh.deploy(
        """
        import mesh
        app = mesh.App("no-module-2")
        class Point: ...
        class MyError(Exception): ...
        @app.function()
        def gives():
            return Point()
        @app.function()
        def raises():
            raise MyError("mine")
        """,
        name="unknown_elsewhere",
    )
    mesh.start_worker()
    done = mesh.python(
        """
        from mesh import Function
        from mesh.exception import ExecutionError
        for name in ("gives", "raises"):
            try:
                Function.from_name("no-module-2", name).remote()
            except ExecutionError as error:
                print(error)
        """
    )
    assert "unknown_elsewhere.Point; module 'unknown_elsewhere' cannot be imported here" in done.stdout, done.stderr
    assert "unknown_elsewhere.MyError: mine (module 'unknown_elsewhere'" in done.stdout


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timeout": 0}, "timeout must be a number from 1 to 86400, not 0"),
        ({"timeout": None}, "timeout must be a number from 1 to 86400, not None"),
        ({"timeout": 10**9}, "timeout must be a number from 1 to 86400"),
        ({"startup_timeout": 0}, "startup_timeout must be a number from 1 to 86400, not 0"),
        ({"retries": -1}, "retries must be a whole number of at least 0, not -1"),
        ({"retries": "3"}, "retries must be a whole number of at least 0, a mesh.Retries or None, not '3'"),
        ({"max_containers": 0}, "max_containers must be a whole number of at least 1, not 0"),
        ({"min_containers": -1}, "min_containers must be a whole number of at least 0, not -1"),
        ({"min_containers": 3, "max_containers": 2}, r"min_containers \(3\) must not be above max_containers \(2\)"),
        ({"buffer_containers": -1}, "buffer_containers must be a whole number of at least 0, not -1"),
        ({"scaledown_window": 0}, "scaledown_window must be a number from 1 to 86400, not 0"),
        ({"cpu": 0}, "cpu must be a number from 0.01 to 1024, not 0"),
        ({"memory": 1}, "memory must be a whole number of at least 16, not 1"),
        ({"result_ttl": 5}, "result_ttl must be a number from 60 to 604800, not 5"),
        ({"keep_result": "no"}, "keep_result must be True or False, not 'no'"),
        ({"detach": 1}, "detach must be True or False, not 1"),
        ({"env": {"1A": "x"}}, "env: '1A' is no variable name"),
        ({"env": {"A": 1}}, "env: the value of A must be a string, not int"),
        ({"name": "a b"}, "function name 'a b' is not allowed: 1 to 64 characters out of"),
        ({"schedule": "daily"}, "schedule must be a mesh.Cron or a mesh.Period, not 'daily'"),
        ({"max_inputs": 0}, "max_inputs must be a whole number of at least 1, not 0"),
        ({"recycle_memory": 1}, "recycle_memory must be a whole number of at least 16, not 1"),
        ({"gpu": 4}, "gpu must be a name such as 'l4' or 'l4:2', or a list of them, not 4"),
        ({"gpu": ["l4", "l4:0"]}, "gpu: 'l4:0' names no GPU"),
        ({"labels": ["zone"]}, "labels must be a dict of names and values"),
        ({"labels": {"zone": ""}}, "labels: '' is not allowed: 1 to 63 characters out of"),
    ],
)
def test_an_option_out_of_range(options: dict[str, object], text: str) -> None:
    app = modal.App("options")
    with pytest.raises(InvalidError, match=text):

        @app.function(serialized=True, **options)
        def f() -> None: ...


def test_decorators_in_the_wrong_place() -> None:
    app = modal.App("wrong-place")
    with pytest.raises(InvalidError, match="forget the parentheses"):
        app.function(lambda: 1)
    with pytest.raises(InvalidError, match="not at the top level of its module"):

        @app.function()
        def nested() -> None: ...

    with pytest.raises(TypeError, match=r"use @app\.cls"):

        @app.function()
        class C: ...

    with pytest.raises(InvalidError, match="is a method"):

        class D:
            @app.function(serialized=True)
            def method(self) -> None: ...

    with pytest.raises(InvalidError, match="a lambda needs a name"):
        app.function(serialized=True)(lambda: 1)
    with pytest.raises(InvalidError, match="passes none"):

        @app.function(schedule=modal.Cron("* * * * *"), serialized=True)
        def needs(x: int) -> None: ...

    with pytest.raises(InvalidError, match="detach cannot be used on the generator function 'stream'"):

        @app.function(detach=True, serialized=True)
        def stream() -> object:
            yield 1

    with pytest.raises(InvalidError, match="retries cannot be used on the generator"):

        @app.function(retries=1, serialized=True)
        def generator() -> object:
            yield 1

    with pytest.raises(modal.exception.DeprecationError, match="use max_containers"):
        app.function(concurrency_limit=3)
    with pytest.raises(TypeError, match="no option 'colour'"):
        app.function(colour="red")


def test_options_that_only_a_cloud_has_warn_once() -> None:
    app = modal.App("cloud")
    options._warned.clear()
    with pytest.warns(UserWarning, match="region= does nothing here"):
        app.function(region="eu")
    app.function(region="us")  # no second warning: those are errors in these tests


def test_options_that_are_not_built_stop_the_deploy(mesh: Mesh) -> None:
    app = modal.App("unbuilt-options")

    @app.function(schedule=modal.Period(minutes=5), serialized=True)
    def f() -> None: ...

    with pytest.raises(UnimplementedError, match="function 'f' uses schedule, which mesh does not have yet"):
        app.deploy()


def test_generators_are_refused_where_they_cannot_work(mesh: Mesh) -> None:
    app = modal.App("generators")

    @app.function(serialized=True)
    def numbers() -> object:
        yield 1

    app.deploy()
    for call in (numbers.spawn, numbers.remote):
        with pytest.raises(InvalidError, match=r"use \.remote_gen\(\)"):
            call()


@pytest.mark.parametrize("name", ["a b", "", "x" * 65, "ap-mine", 5, "a/b", "é"])
def test_app_names(name: object) -> None:
    with pytest.raises(InvalidError, match=r"is not allowed|must be a string"):
        modal.App(name)


def test_apps_without_what_a_deploy_needs(mesh: Mesh) -> None:
    with pytest.raises(InvalidError, match="needs a name to be deployed"):
        modal.App().deploy()
    with pytest.raises(InvalidError, match="has no functions"):
        modal.App("empty").deploy()


# --- call ids in every state -----------------------------------------------------------------------------------------


def test_a_call_id_in_every_state(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(max_age=2)
    module = mesh.deploy(ODD.format(name="states"))
    pending = module.echo.spawn("value")
    with pytest.raises(TimeoutError):
        FunctionCall.from_id(pending.object_id).get(timeout=0)
    assert pending.status().state == "queued"
    assert "no worker is running" in pending.status().waiting_for
    mesh.start_worker()
    assert FunctionCall.from_id(pending.object_id).get(timeout=10) == "value"
    failed = module.raises_exit.spawn()
    with pytest.raises(ExecutionError, match="SystemExit: 3"):
        FunctionCall.from_id(failed.object_id).get(timeout=10)

    def expired() -> bool:
        try:
            FunctionCall.from_id(pending.object_id).get(timeout=0)
        except OutputExpiredError as error:
            return "was kept for 2 s" in str(error)
        return False

    until(expired, what="the result expires")
    with pytest.raises(OutputExpiredError):
        pending.get()
    with pytest.raises(OutputExpiredError):
        pending.status()
    never = FunctionCall.from_id(new_call_id(new_client_token()))
    with pytest.raises(NotFoundError, match="it was never accepted, or its result was kept for a shorter time"):
        never.get()
    with pytest.raises(NotFoundError, match="fc- and 26 characters"):
        FunctionCall.from_id("fc-short").get()


# --- servers ---------------------------------------------------------------------------------------------------------


def use(url: str, tmp_path: Path) -> None:
    """What any first use of a mesh does."""

    async def connect() -> None:
        broker = await Broker.open(Settings.load({"nats_url": url}, start=tmp_path))
        try:
            await broker.ensure()
        finally:
            await broker.close()

    asyncio.run(connect())


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"cannot reach nats://127.0.0.1:{port}: .*start a mesh with `mesh up`"):
        use(f"nats://127.0.0.1:{port}", tmp_path)


def test_jetstream_off(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="JetStream is not enabled"):
        use(own_server(jetstream=False).url, tmp_path)


def test_wrong_credentials(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server(credentials=Credentials("right", "also"))
    use(server.url, tmp_path)
    with pytest.raises(AuthError, match="refused these credentials") as caught:
        use(server.url.replace("right", "wrong"), tmp_path)
    assert "wrong" not in str(caught.value)
    with pytest.raises(AuthError):
        use(f"nats://{server.address}", tmp_path)


def test_a_server_that_is_too_old(tmp_path: Path) -> None:
    """A stand-in for the two lines in which an old server tells its level; everything else of it is not needed."""
    listener = socket.create_server(("127.0.0.1", 0))
    info = b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true}\r\n'
    answer = json.dumps({"limits": {"max_storage": -1}, "storage": 0, "api": {"total": 1, "errors": 0}}).encode()
    child = os.fork()
    if child == 0:
        try:
            connection, _ = listener.accept()
            connection.sendall(info)
            buffer = b""
            while data := connection.recv(65536):
                buffer += data
                while b"\r\n" in buffer:
                    line, _, buffer = buffer.partition(b"\r\n")
                    if line == b"PING":
                        connection.sendall(b"PONG\r\n")
                    elif line.startswith(b"SUB"):
                        inbox = line.split()[1].decode().removesuffix("*").encode()
                    elif line.startswith(b"PUB $JS.API.INFO"):
                        reply = line.split()[2]
                        connection.sendall(b"MSG %s 1 %d\r\n%s\r\n" % (reply, len(answer), answer))
                        assert inbox
        finally:
            os._exit(0)
    try:
        port = listener.getsockname()[1]
        listener.close()
        with pytest.raises(
            VersionError, match=r"too old: it has JetStream API level 0, mesh needs 4 \(nats-server 2.14"
        ):
            use(f"nats://127.0.0.1:{port}", tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_environment_that_was_never_made(server: NatsServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import mesh; mesh.Function.from_name('a', 'f').remote()"],
        env={**os.environ, "MESH_NATS_URL": server.url, "MESH_ENVIRONMENT": "never-made", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "create the environment with `mesh init`" in done.stderr


def test_a_full_queue(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(calls_size=200_000)
    module = mesh.deploy(ODD.format(name="full"))
    accepted: list[FunctionCall[str]] = []

    def fill() -> None:
        while len(accepted) < 20:
            accepted.append(module.echo.spawn("x" * 20_000))

    with pytest.raises(ResourceExhaustedError, match=r"submitting full\.echo: nothing was stored, because the queue"):
        fill()
    assert 5 < len(accepted) < 12
    mesh.start_worker()
    assert FunctionCall.gather(*accepted) == ["x" * 20_000] * len(accepted)  # nothing accepted is lost

    def again() -> str:
        with contextlib.suppress(ResourceExhaustedError):  # for two seconds this client remembers that it was full
            return str(module.echo.remote("again"))
        return ""

    assert until(again) == "again"


def test_no_room_for_the_environment(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    store = tmp_path / "small"
    store.mkdir()
    (store / "room.json").write_text(str(50_000_000))
    server = own_server(store=store, credentials=Credentials("m", "c"))
    settings = Settings.load({"nats_url": server.url, "calls_size": "1G"}, start=tmp_path)

    async def init() -> None:
        broker = await Broker.open(settings)
        try:
            await broker.ensure()
        finally:
            await broker.close()

    with pytest.raises(
        ResourceExhaustedError, match=r"cannot create MESH_CALLS with 1,073,741,824 bytes: .*calls_size"
    ):
        asyncio.run(init())


# --- messages made by hand -------------------------------------------------------------------------------------------


def publish(mesh: Mesh, subject: str, body: bytes, headers: dict[str, str] | None = None) -> None:
    mesh.ask(lambda broker: broker.connection.store(subject, body, headers))


def dead(mesh: Mesh, filter: str = "") -> list[Stored]:
    async def read(broker: Broker) -> list[Stored]:
        return await broker.connection.get_range(broker.topology.dead, 1, 100, f"{broker.topology.root}.dead.>")

    return [letter for letter in mesh.ask(read) if filter in letter.subject]


def test_garbage_in_the_queue(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(ODD.format(name="garbage"))
    worker = mesh.start_worker()
    root = mesh.ask(_root)
    publish(mesh, f"{root}.call.garbage.echo._.not-a-call.0", b"\xff\xfe")
    letters = until(lambda: dead(mesh), what="it is put aside")
    assert letters[0].subject == f"{root}.dead._malformed.garbage.echo._.not-a-call.0"
    assert "does not end with a call id" in letters[0].headers["Mesh-Error"]
    assert letters[0].body == b"\xff\xfe"
    assert module.echo.remote(1) == 1
    assert worker.process.poll() is None


async def _root(broker: Broker) -> str:
    return broker.topology.root


def test_a_call_whose_body_is_garbage(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(ODD.format(name="garbage-body"))
    mesh.start_worker()
    for body, text in ((b"\xff\xfe", "cannot be read as json"), (b"[1]", 'arguments must be {"args"')):
        call = new_call_id(new_client_token())
        publish(mesh, mesh.ask(_root) + f".call.garbage-body.echo._.{call}.0", body)
        with pytest.raises(DeserializationError, match=text):
            FunctionCall.from_id(call).get(timeout=10)
    assert module.echo.remote(1) == 1


def test_a_call_of_an_unknown_version(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(ODD.format(name="versions"))
    mesh.start_worker()
    call = new_call_id(new_client_token())
    publish(mesh, mesh.ask(_root) + f".call.versions.echo._.{call}.0", b"{}", {"Mesh-Version": "9"})
    with pytest.raises(VersionError, match="speaks version 9 of the protocol, this mesh speaks version 1"):
        FunctionCall.from_id(call).get(timeout=10)
    until(lambda: dead(mesh, call), what="its dead letter follows its result")
    assert module.echo.remote(1) == 1


def test_a_call_by_hand_to_a_function_that_does_not_exist(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(ODD.format(name="orphans"))
    call = new_call_id(new_client_token(), at=time.time() - 120)
    garbage = f"{mesh.ask(_root)}.call.nobody.nothing._.junk.0"
    publish(mesh, mesh.ask(_root) + f".call.orphans.nothing._.{call}.0", b"{}")
    publish(mesh, garbage, b"junk")
    mesh.start_worker(MESH_SWEEP_INTERVAL="0.3")
    with pytest.raises(NotFoundError, match="no function 'nothing' in app 'orphans'"):
        FunctionCall.from_id(call).get(timeout=20)
    until(lambda: dead(mesh, call), what="its dead letter, which comes after the result")
    until(lambda: dead(mesh, "_malformed"), what="the garbage is put aside")
    assert module.echo.remote(1) == 1


def test_a_handle_kept_over_an_undeploy(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(ODD.format(name="undeployed"))
    mesh.start_worker()
    kept = Function.from_name("undeployed", "echo")
    assert kept.remote(1) == 1
    mesh.cli("app", "stop", "undeployed", "--yes")
    with pytest.raises(NotFoundError, match="app 'undeployed' was stopped by"):
        kept.remote(2)  # from memory the function is still there: its worker says that it is not
    fresh = mesh.python("import mesh; mesh.Function.from_name('undeployed', 'echo').remote(3)")
    assert "takes no more calls: function removed: app 'undeployed' was stopped by" in fresh.stderr
    module.app.deploy()
    assert kept.remote(4) == 4


def test_a_pickle_that_the_caller_refuses(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(unpickle=False)
    module = mesh.deploy(ODD.format(name="no-pickles"))
    mesh.start_worker()
    assert module.echo.remote([1, "a"]) == [1, "a"]
    with pytest.raises(DeserializationError, match="MESH_UNPICKLE forbids"):
        module.echo.remote((1, 2))
    with pytest.raises(ExecutionError, match="Mute"):
        module.raises_mute.remote()


def test_a_result_that_is_garbage(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(ODD.format(name="bad-result"))
    call = new_call_id(new_client_token())

    async def forge(broker: Broker) -> None:
        address = Address("bad-result", "echo", "_", call)
        subject = f"$KV.{broker.topology.bucket('results')}.{address.key}"
        await broker.connection.store(subject, msgpack.packb([1]), {"Mesh-State": "failed"})

    mesh.ask(forge)
    with pytest.raises(InvalidError, match="the stored failure cannot be read"):
        FunctionCall.from_id(call).get(timeout=1)


def test_two_meshes_on_one_server_do_not_see_each_other(server: NatsServer, tmp_path: Path) -> None:
    with new_mesh(server, tmp_path / "a") as first:
        first.deploy(ODD.format(name="separate"))
        with new_mesh(server, tmp_path / "b") as second:
            found = second.python("import mesh; mesh.Function.from_name('separate', 'echo').remote()")
            assert "no app of this name is deployed" in found.stderr
