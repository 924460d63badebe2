"""Deploying, deploying again, removing, stopping: what happens to calls under way, and to who comes second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from mesh import Function, FunctionCall
from mesh.broker import Broker
from mesh.exception import NotFoundError, RemoteError
from mesh.sweep import Sweeper
from tests.support import Mesh, until

VERSION = """
    import mesh, os, time
    app = mesh.App({name!r})

    @app.function(max_containers=10)
    def work(path, gate=""):
        with open(path, "a") as file:
            file.write("begin\\n")
        while gate and not os.path.exists(gate):
            time.sleep(0.05)
        return {version}

    @app.function()
    def {extra}():
        return {version}
"""


def test_a_redeploy_with_calls_queued_and_running(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(VERSION.format(name="redeploy", version=1, extra="extra"))
    worker = mesh.start_worker("--containers", "10")
    path = str(mesh.ledger().path)
    gate = mesh.directory / "gate"
    running = [module.work.spawn(path, str(gate)) for _ in range(10)]
    until(lambda: mesh.ledger().count() == 10, what="ten are running")
    queued = [module.work.spawn(path) for _ in range(1000)]
    mesh.redeploy(module, VERSION.format(name="redeploy", version=2, extra="extra"))
    until(lambda: "redeploy.work is now version" in worker.log, what="the worker knows the new version")
    gate.touch()
    assert FunctionCall.gather(*running) == [1] * 10
    assert FunctionCall.gather(*queued) == [2] * 1000
    assert mesh.ledger().count() == 1010
    old, new = running[0].object_id, queued[0].object_id
    ran = mesh.ask(lambda broker: broker.results.get_many([f"{old}.0", f"{new}.0"]))
    assert ran[f"{old}.0"].code != ran[f"{new}.0"].code  # each says which version it ran


def test_an_unchanged_deploy_is_no_new_version(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    path = mesh.write(VERSION.format(name="unchanged", version=1, extra="extra"))
    assert "deployed as version 1" in mesh.cli("deploy", str(path)).stderr
    again = mesh.cli("deploy", str(path)).stderr
    assert "unchanged has not changed: version 1 stays" in again
    path.write_text(path.read_text().replace("return 1", "return 2"))
    assert "deployed as version 2" in mesh.cli("deploy", str(path)).stderr


def test_a_redeploy_makes_consumers_of_new_functions_only(own_mesh: Callable[..., Mesh]) -> None:
    """One takes the server milliseconds; an app may have hundreds."""
    mesh = own_mesh()
    module = mesh.deploy(VERSION.format(name="again", version=1, extra="first"))
    made: list[str] = []

    async def listen(broker: Broker) -> Subscription:
        async def note(message: Msg) -> None:
            made.append(message.subject.split(".")[5])

        start = f"$JS.API.CONSUMER.CREATE.{broker.topology.calls}.>"
        return await broker.connection.subscribe(start, note)

    async def settle(broker: Broker) -> None:
        """Everything published so far has come to whoever listens, too."""
        await broker.connection.flush()

    subscription = mesh.ask(listen)
    module = mesh.redeploy(module, VERSION.format(name="again", version=2, extra="second"))
    mesh.ask(settle)
    assert made == ["again+second+_"]
    mesh.ask(lambda broker: subscription.unsubscribe())
    mesh.start_worker()
    assert module.work.remote(str(mesh.ledger().path)) == 2
    assert module.second.remote() == 2


def test_calls_of_a_removed_function_fail_with_the_reason(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(VERSION.format(name="removal", version=1, extra="gone"))
    queued = [module.gone.spawn() for _ in range(5)]
    mesh.redeploy(module, VERSION.format(name="removal", version=2, extra="other"))
    mesh.start_worker()
    for call in queued:
        with pytest.raises(NotFoundError, match=r"function removed: version 2 of app 'removal' does not have it"):
            call.get(timeout=20)
    with pytest.raises(NotFoundError, match="takes no more calls: function removed"):
        Function.from_name("removal", "gone").hydrate()
    assert module.other.remote() == 2


def test_functions_removed_long_ago_are_forgotten(
    own_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all apps, by whoever sweeps; those that are deployed stay, and so do those with calls queued."""
    mesh = own_mesh()
    kept = mesh.deploy(VERSION.format(name="kept", version=1, extra="queued"))
    gone = mesh.deploy(VERSION.format(name="gone", version=1, extra="idle"))
    call = kept.queued.spawn()
    for module, name in ((kept, "kept"), (gone, "gone")):
        mesh.redeploy(module, VERSION.format(name=name, version=2, extra="new"))

    async def sweep(broker: Broker) -> tuple[dict[str, list[str]], set[str]]:
        await Sweeper(broker, "w", 15, 60).removed()
        return await broker.registry.all_recorded(), await broker.consumers.names()

    recorded, _ = mesh.ask(sweep)
    assert sorted(recorded["gone"]) == ["idle", "new", "work"], "not long ago"
    monkeypatch.setattr("mesh.sweep.KEPT_REMOVED", -1.0)
    recorded, consumers = mesh.ask(sweep)
    assert {app: sorted(names) for app, names in recorded.items()} == {
        "gone": ["new", "work"],
        "kept": ["new", "queued", "work"],
    }
    assert {"gone+idle+_", "kept+queued+_"} & consumers == {"kept+queued+_"}
    mesh.start_worker()
    with pytest.raises(NotFoundError, match="function removed"):
        call.get()


def test_calls_of_a_stopped_app_fail_with_the_reason(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(VERSION.format(name="stopped", version=1, extra="extra"))
    worker = mesh.start_worker("--containers", "1")
    path = str(mesh.ledger().path)
    gate = mesh.directory / "gate"
    running = module.work.spawn(path, str(gate))
    until(lambda: mesh.ledger().count() == 1)
    queued = [module.work.spawn(path) for _ in range(20)]
    mesh.cli("app", "stop", "stopped", "--yes")
    for call in queued:
        with pytest.raises(NotFoundError, match="app 'stopped' was stopped by"):
            call.get(timeout=20)
    gate.touch()
    assert running.get(timeout=10) == 1
    assert worker.process.poll() is None
    assert mesh.cli("app", "list").stdout == ""
    assert "stopped" in mesh.cli("app", "list", "--all").stdout
    assert mesh.cli("app", "stop", "stopped", "--yes", check=False).returncode == 3


def test_of_two_deploys_at_once_one_wins_whole(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    functions = "".join(f"\n@app.function()\ndef f{n}():\n    return {{version}}\n" for n in range(200))
    files = [
        mesh.write(f"import mesh\napp = mesh.App('race')\n{functions.format(version=version)}", folder=f"v{version}")
        for version in (1, 2)
    ]
    mesh.cli("init")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mesh", "deploy", str(file)], env=mesh.variables, stderr=subprocess.PIPE, text=True
        )
        for file in files
    ]
    said = [process.communicate(timeout=60)[1] for process in started]
    codes = [process.returncode for process in started]
    mesh.start_worker("--containers", "4")
    answers = {Function.from_name("race", f"f{n}").remote() for n in (0, 100, 199)}
    if codes == [0, 0]:  # they did not meet: the later one counts
        assert len(answers) == 1
    else:
        assert sorted(codes) == [0, 7]
        assert "was deployed by somebody else at the same moment; nothing of this deployment was kept" in "".join(said)
        assert answers == {codes.index(0) + 1}


def test_a_deploy_that_lost_the_race_says_so(own_mesh: Callable[..., Mesh]) -> None:
    """The same as above, with the meeting made certain: the head moves between reading and writing it."""
    from mesh.exception import ConflictError

    mesh = own_mesh()
    module = mesh.deploy(VERSION.format(name="raced", version=1, extra="extra"))

    async def late(broker: Broker) -> None:
        head, sequence = await broker.registry.head("raced")
        record = await broker.registry.function("raced", "extra")
        assert head is not None
        assert record is not None
        await broker.registry.publish(head, [record], sequence)
        await broker.registry.publish(head, [record], sequence)

    with pytest.raises(ConflictError, match="nothing of this deployment was kept"):
        mesh.ask(late)
    assert module.app.name == "raced"


def test_three_processes_in_three_directories(own_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    """Deployer, worker without the module, and a service that imports it: classes are the same on every side."""
    mesh = own_mesh()
    source = """
        import mesh
        from dataclasses import dataclass
        from shapes.points import Point
        app = mesh.App("three")

        class MyError(Exception):
            pass

        @app.function()
        def mirror(point):
            assert isinstance(point, Point)
            if point.x == 0:
                raise MyError("on the axis")
            return Point(-point.x, point.y)
        """
    shapes = """
        from dataclasses import dataclass

        @dataclass
        class Point:
            x: int
            y: int
        """
    for side in ("deployer", "service"):
        mesh.write(source, "usermod", folder=side)
        mesh.write(shapes, "points", folder=f"{side}/shapes")
        (tmp_path / side / "shapes" / "__init__.py").touch()
    mesh.cli("deploy", str(tmp_path / "deployer" / "usermod.py"))
    mesh.start_worker()
    service = mesh.write(
        """
        import mesh, usermod
        from shapes.points import Point
        f = mesh.Function.from_name("three", "mirror")
        back = f.remote(Point(1, 2))
        assert isinstance(back, Point), type(back)
        assert back == Point(-1, 2)
        try:
            f.remote(Point(0, 0))
        except usermod.MyError as error:
            print("caught", error)
        """,
        "service",
        folder="service",
    )
    done = subprocess.run([sys.executable, service], env=mesh.variables, capture_output=True, text=True, timeout=60)
    assert done.stdout == "caught on the axis\n", done.stderr


def test_a_script_that_runs_its_own_app(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    done = mesh.python(
        """
        import mesh
        app = mesh.App("script")

        class Point:
            def __init__(self, x):
                self.x = x

        @app.function()
        def move(point):
            assert type(point) is Point
            return Point(point.x + 1)

        if __name__ == "__main__":
            with app.run():
                back = move.remote(Point(1))
                assert type(back) is Point, type(back)
                print("moved to", back.x)
        """
    )
    assert done.stdout == "moved to 2\n", done.stderr


def test_a_script_without_a_guard_says_what_to_do(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    done = mesh.python(
        """
        import mesh
        app = mesh.App("unguarded")

        @app.function()
        def f():
            return 1

        with app.run():
            f.remote()
        """
    )
    assert (
        'app.run() ran while a container imported this module: put it under `if __name__ == "__main__":`' in done.stderr
    )


async def everything(broker: Broker) -> dict[str, int]:
    """How many messages each stream of the environment holds, and its consumers."""
    counts: dict[str, int] = {}
    names = await broker.connection.api("STREAM.NAMES")
    for name in names["streams"]:
        if name.startswith(
            (broker.topology.root.upper(), f"KV_{broker.topology.root}_", f"OBJ_{broker.topology.root}_")
        ):
            info = await broker.connection.api(f"STREAM.INFO.{name}")
            counts[name] = info["state"]["messages"]
    counts["consumers"] = len(await broker.consumers.names())
    return counts


@pytest.mark.parametrize("how", ["killed", "ended", "interrupted"])
def test_nothing_is_left_of_a_run(own_mesh: Callable[..., Mesh], how: str) -> None:
    mesh = own_mesh()
    mesh.deploy(VERSION.format(name="stays", version=1, extra="extra"))
    worker = mesh.start_worker("--containers", "1")
    path = mesh.write(
        """
        import mesh, sys, time
        app = mesh.App("passing")

        @app.function()
        def work(seconds):
            time.sleep(seconds)

        @app.local_entrypoint()
        def main(wait: bool = False):
            calls = [work.spawn(60 if wait else 0) for _ in range(5)]
            print("\\n".join(call.object_id for call in calls), flush=True)
            if wait:
                time.sleep(60)
            mesh.FunctionCall.gather(*calls)
        """
    )
    before = mesh.ask(everything)
    flags = [] if how == "ended" else ["--wait"]
    running = subprocess.Popen(
        [sys.executable, "-m", "mesh", "run", "-q", str(path), *flags],
        env=mesh.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    calls = [FunctionCall.from_id(running.stdout.readline().strip()) for _ in range(5)]
    if how != "ended":
        until(lambda: worker.containers(), what="a call runs")
        os.kill(running.pid, signal.SIGKILL if how == "killed" else signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == {"killed": -9, "ended": 0, "interrupted": 130}[how], errors
    began = time.monotonic()

    def gone() -> bool:
        left = mesh.ask(everything)
        return {**left, "KV": 0} == {**before, "KV": 0, **results(left)}

    def results(left: dict[str, int]) -> dict[str, int]:
        return {
            name: count for name, count in left.items() if name.endswith(("_results", "_LOGS", "_workers", "_slots"))
        }

    until(gone, timeout=60, what="nothing is left")
    assert time.monotonic() - began < 60
    until(lambda: not worker.containers(), what="its containers are gone")
    for call in calls:
        if how == "ended":
            assert call.get(timeout=5) is None
        else:
            with pytest.raises(RemoteError, match=r"cancelled: (its app has|app 'passing') ended"):
                call.get(timeout=5)
    assert Function.from_name("stays", "extra").remote() == 1


def test_a_script_whose_name_holds_a_dot(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    script = mesh.directory / "job.v2.py"
    script.write_text("import mesh\napp = mesh.App('dot')\n@app.function()\ndef f(): ...\nwith app.run(): ...\n")
    done = subprocess.run([sys.executable, script], env=mesh.variables, capture_output=True, text=True, timeout=60)
    assert "job.v2.py cannot be imported by its name, because that holds a dot: rename it" in done.stderr
