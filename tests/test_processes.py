"""Clients in many processes, threads and loops: forks, short loops, many waiters, reconnects."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import mesh as modal
from mesh import FunctionCall
from mesh.broker import Broker, Unanswered
from mesh.broker.bucket import Bucket
from mesh.exception import AsyncUsageWarning, NotReadyError
from mesh.server import NatsServer
from tests.support import Mesh, new_mesh

ECHO = """
    import mesh, time
    app = mesh.App({name!r})

    @app.function()
    def echo(x):
        return x

    @app.function()
    def late(seconds, x):
        time.sleep(seconds)
        return x
"""


def test_get_without_waiting_returns_at_once(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()  # no worker: the queue is cold
    module = mesh.deploy(ECHO.format(name="at-once"))
    call = module.echo.spawn(1)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        call.get(timeout=0)
    assert time.monotonic() - began < 1


def test_a_value_that_is_there_is_found_however_short_the_timeout(mesh: Mesh) -> None:
    module = mesh.deploy(ECHO.format(name="short"))
    call = module.echo.spawn("there")
    assert call.get() == "there"
    assert [FunctionCall.from_id(call.object_id).get(timeout=1e-6) for _ in range(20)] == ["there"] * 20


def test_ten_waiters_in_ten_processes(mesh: Mesh) -> None:
    module = mesh.deploy(ECHO.format(name="ten-waiters"))
    call = module.late.spawn(3, "for all")
    program = mesh.write(
        """
        import mesh, sys
        print(mesh.FunctionCall.from_id(sys.argv[1]).get(timeout=20))
        """,
        folder="programs",
    )
    waiters = [
        subprocess.Popen(
            [sys.executable, program, call.object_id], env=mesh.variables, stdout=subprocess.PIPE, text=True
        )
        for _ in range(10)
    ]
    assert [waiter.communicate(timeout=40)[0] for waiter in waiters] == ["for all\n"] * 10


def test_many_waiters_on_one_call(mesh: Mesh) -> None:
    module = mesh.deploy(ECHO.format(name="many-waiters"))

    async def wait() -> list[str]:
        call = await module.late.spawn.aio(0.5, "x")
        return list(await asyncio.gather(*(call.get.aio(timeout=20) for _ in range(500))))

    assert asyncio.run(wait()) == ["x"] * 500


def test_one_waiter_on_many_calls(mesh: Mesh) -> None:
    module = mesh.deploy(ECHO.format(name="many-calls"))

    async def wait() -> list[int]:
        calls = await asyncio.gather(*(module.echo.spawn.aio(n) for n in range(500)))
        return await FunctionCall.gather.aio(*calls)

    assert asyncio.run(wait()) == list(range(500))


def test_a_program_that_waited_in_its_own_loop_ends(mesh: Mesh) -> None:
    """The loop's end cancels what reads answers, before the connection takes back what it said of its client."""
    mesh.deploy(ECHO.format(name="own-loop"))

    def waiting() -> set[str]:
        return set(mesh.ask(lambda broker: Bucket(broker.connection, broker.topology, "clients").keys()))

    before = waiting()  # what clients of other tests left that were killed
    done = mesh.python(
        """
        import asyncio, mesh
        late = mesh.Function.from_name("own-loop", "late")
        print(asyncio.run(late.remote.aio(4, "x")))  # long enough to say that somebody waits
        """
    )
    assert done.stdout == "x\n", done.stderr
    assert waiting() <= before


def test_a_request_at_the_end_of_its_loop_ends(mesh: Mesh) -> None:
    """Where everything is cancelled, also what would notice that there is no answer, it is told at once."""

    async def last_words() -> None:
        broker = await Broker.open(mesh.settings)
        try:
            await asyncio.sleep(60)
        finally:
            with pytest.raises(Unanswered, match="event loop ends"):
                await broker.connection.api("INFO")
            await broker.close()
            said.append("ended")

    async def ends_at_once() -> None:
        tasks.append(asyncio.create_task(last_words()))
        await asyncio.sleep(0.5)

    said: list[str] = []
    tasks: list[asyncio.Task[None]] = []
    asyncio.run(ends_at_once())
    assert said == ["ended"]


def test_a_get_begun_before_a_reconnect_still_ends(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, ack_wait=5) as mesh:
        module = mesh.deploy(ECHO.format(name="reconnect"))
        mesh.start_worker()
        assert module.echo.remote(1) == 1
        call = module.late.spawn(2, "after")
        answers: list[str] = []
        waiter = threading.Thread(target=lambda: answers.append(call.get()))
        waiter.start()
        time.sleep(0.5)  # the waiter listens by now; if not, the test is only easier
        server.kill()
        time.sleep(2.5)  # the call ends while the server is away
        own_server(store=tmp_path / "store", port=server.port)
        waiter.join(15)
        assert answers == ["after"]


def test_a_get_begun_while_the_server_is_away_waits_for_it(
    own_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, ack_wait=5) as mesh:
        module = mesh.deploy(ECHO.format(name="away"))
        call = module.echo.spawn("after")
        server.kill()
        began = time.monotonic()
        with pytest.raises(NotReadyError, match="has no result after 1 s"):
            call.get(timeout=1)
        assert time.monotonic() - began < 4
        answers: list[str] = []
        waiter = threading.Thread(target=lambda: answers.append(FunctionCall.from_id(call.object_id).get()))
        waiter.start()
        time.sleep(0.5)  # it has begun by now; if not, the test is only easier
        own_server(store=tmp_path / "store", port=server.port)
        mesh.start_worker()
        waiter.join(30)
        assert answers == ["after"]


def test_submitting_while_the_server_is_away(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, submit_timeout=2) as mesh:
        module = mesh.deploy(ECHO.format(name="away"))
        module.echo.spawn(1)
        server.kill()
        began = time.monotonic()
        with pytest.raises(
            modal.exception.ConnectionError, match=r"call fc-\w{26} to away.echo: no answer .* 2 s .*may have"
        ):
            module.echo.spawn(2)
        assert 2 <= time.monotonic() - began < 4
        own_server(store=tmp_path / "store", port=server.port)
        mesh.start_worker()
        assert module.echo.remote(3) == 3


FORKS = """
    import os, sys, mesh, multiprocessing
    f = mesh.Function.from_name("forks", "echo")
    assert f.remote("before") == "before"

    def spawn_many(who):
        calls = [f.spawn(f"{who}{n}") for n in range(1000)]
        assert mesh.FunctionCall.gather(*calls[-50:]) == [f"{who}{n}" for n in range(950, 1000)]

    if sys.argv[1] == "fork":
        child = os.fork()
        spawn_many("child" if child == 0 else "parent")
        if child == 0:
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        context = multiprocessing.get_context("fork")
        child = context.Process(target=spawn_many, args=("child",))
        child.start()
        spawn_many("parent")
        child.join()
        assert child.exitcode == 0
    assert f.remote("after") == "after"
    print("fine")
"""


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_a_fork_after_the_first_call(own_mesh: Callable[..., Mesh], how: str) -> None:
    mesh = own_mesh()
    mesh.deploy(ECHO.format(name="forks"))
    mesh.start_worker("--containers", "2")
    done = mesh.python(FORKS, how)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_many_short_loops(own_mesh: Callable[..., Mesh]) -> None:
    """Connections go with their loops: no socket, no entry and no warning is left."""
    mesh = own_mesh()
    mesh.deploy(ECHO.format(name="loops"))
    mesh.start_worker()
    done = mesh.python(
        """
        import asyncio, mesh, os, warnings
        from mesh import client
        warnings.simplefilter("error")
        f = mesh.Function.from_name("loops", "echo")

        async def once(n):
            assert await f.remote.aio(n) == n

        for n in range(50):
            asyncio.run(once(n))
        import uvloop
        for n in range(10):
            uvloop.run(once(n))
        assert not client._entries, client._entries
        open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        print(sum("socket" in name for name in open_files))
        """
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_program_ends_while_something_waits(mesh: Mesh) -> None:
    mesh.deploy(ECHO.format(name="ends"))
    began = time.monotonic()
    done = mesh.python(
        """
        import mesh, threading, time
        f = mesh.Function.from_name("ends", "late")
        threading.Thread(target=lambda: f.remote(30, "x"), daemon=True).start()
        time.sleep(1)
        print("ending")
        """
    )
    assert done.stdout == "ending\n", done.stderr
    assert time.monotonic() - began < 8


def test_the_blocking_face_in_a_running_loop_warns_and_works(mesh: Mesh) -> None:
    module = mesh.deploy(ECHO.format(name="in-loop"))

    async def use() -> int:
        with pytest.warns(AsyncUsageWarning, match="await the .aio form instead"):
            return module.echo.remote(5)

    assert asyncio.run(use()) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.echo.remote(6) == 6


def test_threads_share_the_blocking_face(mesh: Mesh) -> None:
    module = mesh.deploy(ECHO.format(name="threads"))
    answers: list[int] = []
    threads = [threading.Thread(target=lambda n=n: answers.append(module.echo.remote(n))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == list(range(20))


def test_a_process_pool_of_the_users(mesh: Mesh) -> None:
    module = mesh.deploy(ECHO.format(name="pool"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(os.getpid) != os.getpid()
    assert module.echo.remote(1) == 1
