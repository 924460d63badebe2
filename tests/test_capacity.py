"""Room for containers: who gets it, who gives it up, and that waiting for each other never stops everything."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from mesh import FunctionCall
from mesh.capacity import Capacity
from mesh.placement import Size
from tests.support import Mesh, until


def test_a_recursive_function_on_two_containers(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh
        app = mesh.App("recursive")

        @app.function()
        def fib(n):
            return n if n < 2 else fib.remote(n - 1) + fib.remote(n - 2)
        """
    )
    mesh.start_worker("--containers", "2")
    assert module.fib.remote(6) == 8


def test_nested_calls_through_other_functions(own_mesh: Callable[..., Mesh]) -> None:
    """Each call waits for one of another function, deeper than there are containers, sync and async by turns."""
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh
        app = mesh.App("nested")

        @app.function()
        def one(depth):
            return depth if depth == 0 else 1 + two.remote(depth - 1)

        @app.function()
        async def two(depth):
            if depth == 0:
                return 0
            call = await three.spawn.aio(depth - 1)
            return 1 + await call.get.aio()

        @app.function()
        def three(depth):
            return depth if depth == 0 else 1 + mesh.FunctionCall.gather(one.spawn(depth - 1))[0]
        """
    )
    mesh.start_worker("--containers", "2")
    assert module.one.remote(10) == 10


def test_fifteen_functions_on_four_containers(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    functions = "".join(f"\n@app.function()\ndef f{n}():\n    return {n}\n" for n in range(15))
    module = mesh.deploy(f"import mesh\napp = mesh.App('fifteen')\n{functions}")
    worker = mesh.start_worker("--containers", "4")
    began = time.monotonic()
    calls = [getattr(module, f"f{n}").spawn() for n in range(15)]
    assert FunctionCall.gather(*calls) == list(range(15))
    assert time.monotonic() - began < 15
    assert len(worker.containers()) <= 4


def test_a_busy_function_does_not_starve_another(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, time
        app = mesh.App("busy")

        @app.function()
        def busy():
            time.sleep(0.05)

        @app.function()
        def small():
            return "small"
        """
    )
    mesh.start_worker("--containers", "2")
    calls = [module.busy.spawn() for _ in range(600)]  # 15 s of work for two containers
    until(lambda: calls[20].status().state == "succeeded")
    began = time.monotonic()
    assert module.small.remote() == "small"
    assert time.monotonic() - began < 6
    assert calls[-1].status().state == "queued"


def test_no_more_pools_are_woken_than_there_is_room_for() -> None:
    """Hundreds of pools of one class may wait: to look at all of them at each event would take seconds of it."""
    fed, ended = list[object](), list[object]()

    def pool(number: int, containers: Sequence[object] = ()) -> Any:
        pool = SimpleNamespace(size=Size(containers=1), containers=containers, feed=lambda: fed.append(number))
        pool.starving_since = None if containers else float(number)
        pool.scaling = SimpleNamespace(spare=lambda: [c for c in containers if not c.stopping])
        return pool

    def idle(number: int) -> Any:
        container = SimpleNamespace(waiting=False, stopping=False, load=0, idle_since=float(number))

        def stop() -> None:
            container.stopping = True
            ended.append(number)

        container.stop = stop
        return container

    pools = [pool(n) for n in range(200)] + [pool(200 + n, [idle(n)]) for n in range(3)]
    Capacity(Size(containers=4), pools).changed()
    assert (fed, ended) == ([0, 1, 2, 3, 200, 201, 202], [0, 1, 2])


def test_max_containers_within_one_worker(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os, time
        app = mesh.App("capped")

        @app.function(max_containers=2)
        def capped(path):
            name = f"{path}.{os.getpid()}"
            open(name, "x").close()
            time.sleep(0.3)
            count = len([n for n in os.listdir(os.path.dirname(path)) if n.startswith(os.path.basename(path))])
            os.unlink(name)
            return count
        """
    )
    mesh.start_worker("--containers", "8")
    (mesh.directory / "running").mkdir()
    path = str(mesh.directory / "running" / "x")
    counts = FunctionCall.gather(*(module.capped.spawn(path) for _ in range(12)))
    assert max(counts) == 2


def test_short_calls_do_not_wait_behind_a_long_one(own_mesh: Callable[..., Mesh]) -> None:
    """Short runs are read ahead; when one turns out long, those behind it go to another container."""
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, time
        app = mesh.App("hostage")

        @app.function()
        def work(seconds):
            time.sleep(seconds)
            return seconds
        """
    )
    mesh.start_worker("--containers", "2")
    FunctionCall.gather(*(module.work.spawn(0) for _ in range(200)))  # from here on runs are known to be short
    long = module.work.spawn(8)
    until(lambda: long.status().state == "running")
    short = [module.work.spawn(0) for _ in range(40)]
    began = time.monotonic()
    assert FunctionCall.gather(*short) == [0] * 40
    assert time.monotonic() - began < 5
    assert long.get() == 8


def test_an_idle_container_goes_after_a_while(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh
        app = mesh.App("idle")

        @app.function(scaledown_window=1)
        def f():
            return 1

        @app.function(single_use_containers=True)
        def once():
            import os
            return os.getpid()
        """
    )
    worker = mesh.start_worker()
    assert module.f.remote() == 1
    assert len(worker.containers()) == 1
    until(lambda: not worker.containers(), timeout=10, what="the idle container ends")
    assert module.f.remote() == 1
    assert len({module.once.remote() for _ in range(3)}) == 3


def test_idle_containers_of_others_do_not_keep_a_function_at_one(own_mesh: Callable[..., Mesh]) -> None:
    """Its second input comes while the first runs, and is heard of only if it is asked for."""
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os, time
        app = mesh.App("second-one")

        @app.function()
        def idle():
            pass

        @app.function()
        def meets(path, name, other):
            open(f"{path}.{name}", "w").close()
            while not os.path.exists(f"{path}.{other}"):
                time.sleep(0.02)
            return name
        """
    )
    mesh.start_worker("--containers", "2")
    module.idle.remote()
    path = str(mesh.ledger().path)
    first = module.meets.spawn(path, "first", "second")
    until(mesh.ledger("ledger.first").path.exists)
    second = module.meets.spawn(path, "second", "first")
    assert FunctionCall.gather(first, second) == ["first", "second"]
