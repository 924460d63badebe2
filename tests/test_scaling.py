"""Containers that follow the load, over real workers: how many there are, where they are, and when they end."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from mesh import FunctionCall
from mesh.exception import InvalidError, ServerWarning
from mesh.functions import FunctionAutoscalerSettings, FunctionStats
from tests.support import Mesh, in_loop, until

# --- placement -------------------------------------------------------------------------------------------------------


def test_a_call_waits_for_a_worker_with_its_labels_and_says_so(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os
        app = mesh.App("placed")

        @app.function(gpu=["a10g", "L4"], labels={"zone": "a"})
        def f():
            return os.environ["MESH_TASK_ID"]
        """
    )
    mesh.start_worker("--label", "zone=a")
    call = module.f.spawn()
    reason = "placed.f needs the label gpu=a10g or the label gpu=l4, which worker"
    until(lambda: reason in call.status().waiting_for, what="the call says what it waits for")
    with pytest.warns(ServerWarning, match="needs the label gpu=a10g"), pytest.raises(TimeoutError):
        call.get(timeout=4)
    assert reason in mesh.cli("call", "show", call.object_id).stdout
    assert reason in mesh.cli("worker", "list").stdout
    mesh.start_worker("--label", "gpu=l4", "--label", "zone=a")
    assert call.get(timeout=20)
    listed = json.loads(mesh.cli("worker", "list", "--json").stdout)
    assert sorted(w["labels"].get("gpu", "") for w in listed) == ["", "l4"]
    assert "gpu=l4,zone=a" in mesh.cli("worker", "list").stdout


def test_claims_of_cores_and_memory_are_kept(own_mesh: Callable[..., Mesh]) -> None:
    """Of ten that claim a core each, at most two run at once on two cores; one that claims more runs nowhere."""
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os, time
        app = mesh.App("claims")

        def seen(path):
            name = f"{path}.{os.getpid()}"
            open(name, "x").close()
            time.sleep(0.2)
            count = len(os.listdir(os.path.dirname(path)))
            os.unlink(name)
            return count

        @app.function(cpu=1)
        def core(path):
            return seen(path)

        @app.function(memory=(64, 400))
        def memory(path):
            return seen(path)

        @app.function(cpu=3)
        def cores():
            return 3

        @app.function(memory=2000)
        def much():
            return 2000
        """
    )
    mesh.start_worker("--containers", "8", "--cpus", "2", "--memory", "1000")
    for name in ("core", "memory"):
        (mesh.directory / name).mkdir()
        f = getattr(module, name)
        counts = FunctionCall.gather(*(f.spawn(str(mesh.directory / name / "x")) for _ in range(10)))
        assert max(counts) == 2
    cores, much = module.cores.spawn(), module.much.spawn()
    until(lambda: "needs 3 cores; worker" in cores.status().waiting_for)
    until(lambda: "needs 2,000 MiB of memory; worker" in much.status().waiting_for)
    mesh.start_worker("--cpus", "4", "--memory", "4000")
    assert (cores.get(timeout=20), much.get(timeout=20)) == (3, 2000)


def test_a_large_claim_finds_room_among_many_small_ones(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, time
        app = mesh.App("large")

        @app.function(cpu=1)
        def small():
            time.sleep(0.3)

        @app.function(cpu=4)
        def large():
            return "large"
        """
    )
    mesh.start_worker("--containers", "8", "--cpus", "4")
    calls = [module.small.spawn() for _ in range(400)]  # 30 s of work for four containers
    until(lambda: calls[8].status().state == "succeeded")
    assert module.large.remote() == "large"
    assert calls[-1].status().state == "queued"
    for call in calls:
        call.cancel()


# --- the load --------------------------------------------------------------------------------------------------------


def counts(mesh: Mesh) -> list[int]:
    """Containers of each worker of a mesh that lives."""
    return [len(worker.containers()) for worker in mesh.workers if worker.process.poll() is None]


def test_from_zero_to_many_and_back(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, time
        app = mesh.App("load")

        @app.function(scaledown_window=2)
        def f(seconds):
            time.sleep(seconds)
        """
    )
    mesh.start_worker("--containers", "6")
    assert counts(mesh) == [0]
    calls = [module.f.spawn(0.5) for _ in range(12)]
    until(lambda: counts(mesh) == [6], what="as many containers as there is room for")
    FunctionCall.gather(*calls)
    until(lambda: counts(mesh) == [0], what="no containers once the window has passed")
    module.f.remote(0)
    assert counts(mesh) == [1]


def test_inputs_go_to_the_container_that_was_used_last(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os, time
        app = mesh.App("last")

        @app.function(scaledown_window=4)
        def f(seconds):
            time.sleep(seconds)
            return os.getpid()
        """
    )
    mesh.start_worker("--containers", "4")
    first = FunctionCall.gather(*(module.f.spawn(0.6) for _ in range(4)))
    assert len(set(first)) == 4
    used = {module.f.remote(0.1)}
    while counts(mesh) != [1]:  # those that are too many end, while it goes on
        used.add(module.f.remote(0.1))
    assert len(used) == 1


def test_three_workers_do_not_start_three_times_as_many(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, time
        app = mesh.App("shared")

        @app.function()
        def f(folder, n):
            name = f"{folder}/{n}"
            open(name, "x").close()
            time.sleep(600)
        """
    )
    for _ in range(3):
        mesh.start_worker("--containers", "12")
    folder = mesh.directory / "running"
    folder.mkdir()
    calls = [module.f.spawn(str(folder), n) for n in range(12)]
    until(lambda: len(list(folder.iterdir())) == 12, what="all of them run")
    assert sum(counts(mesh)) <= 15
    for call in calls:
        call.cancel(terminate_containers=True)


# --- bounds, over the fleet ------------------------------------------------------------------------------------------


def test_a_minimum_belongs_to_all_workers_together(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(
        """
        import mesh
        app = mesh.App("minimum")

        @app.function(min_containers=4, scaledown_window=1)
        def f():
            pass
        """
    )
    first = mesh.start_worker()
    until(lambda: counts(mesh) == [4], what="one worker has all of them")
    mesh.start_worker()
    until(lambda: counts(mesh) == [2, 2], what="two share them")
    mesh.start_worker()
    until(lambda: sorted(counts(mesh)) == [1, 1, 2], what="three share them")
    first.kill()
    until(lambda: sorted(counts(mesh)) == [2, 2], timeout=40, what="what the dead one had is somewhere else")
    assert mesh.workers[1].stop() == 0
    until(lambda: counts(mesh) == [4], what="one that drained is replaced")


def test_a_minimum_goes_to_where_there_is_room(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(
        """
        import mesh
        app = mesh.App("room")

        @app.function(min_containers=5, labels={"zone": "a"})
        def f():
            pass
        """
    )
    mesh.start_worker("--containers", "1", "--label", "zone=a")
    mesh.start_worker("--containers", "8", "--label", "zone=a")
    mesh.start_worker("--containers", "8")
    until(lambda: counts(mesh) == [1, 4, 0])


def test_a_buffer_is_kept_while_the_pool_is_in_use(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, time
        app = mesh.App("buffer")

        @app.function(buffer_containers=2, scaledown_window=3)
        def f(seconds):
            time.sleep(seconds)
        """
    )
    mesh.start_worker()
    mesh.start_worker()
    call = module.f.spawn(600)
    until(lambda: sum(counts(mesh)) == 3, what="two idle ones beside the one that runs")
    call.cancel()
    until(lambda: sum(counts(mesh)) == 0, timeout=30, what="nothing is left after the window")


# --- containers that have served long enough -------------------------------------------------------------------------


def test_a_container_ends_after_so_many_inputs(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os
        app = mesh.App("uses")

        @app.function(max_inputs=3, max_containers=1)
        def f():
            return os.environ["MESH_TASK_ID"]
        """
    )
    mesh.start_worker()
    names = FunctionCall.gather(*(module.f.spawn() for _ in range(9)))
    assert sorted(names.count(name) for name in set(names)) == [3, 3, 3]


def test_a_batch_takes_no_more_than_is_left_of_its_container(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os
        app = mesh.App("batches-of-uses")

        @app.function(max_inputs=5, max_containers=1)
        @mesh.batched(max_batch_size=3, wait_ms=10)
        def f(xs):
            return [(os.environ["MESH_TASK_ID"], len(xs)) for _ in xs]
        """
    )
    mesh.start_worker()
    runs = FunctionCall.gather(*(module.f.spawn(n) for n in range(30)))
    names = [name for name, _ in runs]
    assert max(names.count(name) for name in names) == 5
    assert max(size for _, size in runs) == 3


def test_its_replacement_is_there_before_it_has_ended(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os, time
        app = mesh.App("replaced")

        @app.function(max_inputs=2)
        def f(seconds):
            time.sleep(seconds)
        """
    )
    mesh.start_worker()
    module.f.remote(0)
    assert counts(mesh) == [1]
    last = module.f.spawn(600)
    until(lambda: counts(mesh) == [2], what="another one beside the one that runs its last input")
    last.cancel()


def test_a_container_that_has_grown_too_large_takes_no_other_input(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os
        app = mesh.App("large")
        kept = []

        @app.function(recycle_memory=128)
        def f(mib, keep):
            data = bytearray(os.urandom(1 << 20) * mib)
            if keep:
                kept.append(data)
            return os.environ["MESH_TASK_ID"]
        """
    )
    worker = mesh.start_worker("--verbose")
    small = {module.f.remote(1, True) for _ in range(3)} | {module.f.remote(200, False)}
    assert len(small) == 1  # what an input needs only while it runs does not count
    assert {module.f.remote(200, True)} == small
    assert module.f.remote(1, False) not in small
    until(lambda: "MiB after an input, more than recycle_memory=128" in worker.log)
    until(lambda: counts(mesh) == [1])


# --- while it is deployed --------------------------------------------------------------------------------------------

COUNTED = """
    import mesh, time
    app = mesh.App("counted")

    @app.function(max_containers=9, scaledown_window=1)
    def f(seconds):
        time.sleep(seconds)
    """


def test_the_autoscaler_is_changed_while_it_is_deployed(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(COUNTED)
    mesh.start_worker()
    mesh.start_worker()
    kept: dict[str, object] = {"max_containers": 9, "buffer_containers": 0, "scaledown_window": 1}
    settings = module.f.update_autoscaler(min_containers=4)
    assert settings == FunctionAutoscalerSettings(min_containers=4, **kept)  # type: ignore[arg-type]
    until(lambda: counts(mesh) == [2, 2], what="the minimum is there, on both workers")
    running = {pid for worker in mesh.workers for pid in worker.containers()}

    settings = module.f.update_autoscaler(max_containers=12, buffer_containers=1)  # a lower one would end some
    assert (settings.min_containers, settings.max_containers, settings.buffer_containers) == (4, 12, 1)
    mesh.start_worker()  # one that comes later is told, too
    until(lambda: sorted(counts(mesh)) == [1, 1, 2])
    assert running & {pid for worker in mesh.workers for pid in worker.containers()}

    module.app.deploy()  # of what is there already: what the source says holds again
    until(lambda: sum(counts(mesh)) == 0)
    assert module.f.update_autoscaler() == FunctionAutoscalerSettings(min_containers=0, **kept)  # type: ignore[arg-type]


def test_a_maximum_that_is_lowered_ends_idle_containers_at_once(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(COUNTED.replace("scaledown_window=1", "scaledown_window=600, min_containers=5"))
    mesh.start_worker()
    until(lambda: counts(mesh) == [5])
    with pytest.raises(InvalidError, match=r"min_containers \(5\) must not be above max_containers \(2\)"):
        module.f.update_autoscaler(max_containers=2)
    module.f.update_autoscaler(min_containers=0, max_containers=2)
    until(lambda: counts(mesh)[0] <= 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_containers": -1}, "min_containers must be a whole number of at least 0, not -1"),
        ({"max_containers": 0}, "max_containers must be a whole number of at least 1, not 0"),
        ({"buffer_containers": 0.5}, "buffer_containers must be a whole number of at least 0, not 0.5"),
        ({"scaledown_window": 0}, "scaledown_window must be a number from 1 to 86400, not 0"),
    ],
)
def test_settings_of_the_autoscaler_out_of_range(mesh: Mesh, options: dict[str, object], text: str) -> None:
    module = mesh.deploy(COUNTED)
    with pytest.raises(InvalidError, match=text):
        module.f.update_autoscaler(**options)
    assert in_loop(module.f.update_autoscaler.aio()).max_containers == 9


def test_an_instance_has_an_autoscaler_of_its_own_and_a_method_has_none(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh
        app = mesh.App("instances")

        @app.cls(scaledown_window=1)
        class Model:
            size: int = mesh.parameter(default=1)

            @mesh.method()
            def ask(self):
                return self.size
        """
    )
    mesh.start_worker()
    model = module.Model(size=2)
    with pytest.raises(InvalidError, match=r"'Model.ask' is a method: .* Model\(…\).update_autoscaler"):
        model.ask.update_autoscaler(min_containers=1)
    assert model.update_autoscaler(min_containers=2).min_containers == 2
    until(lambda: counts(mesh) == [2])
    assert model.ask.remote() == 2
    until(lambda: model.get_current_stats().num_total_runners == 2)
    assert module.Model(size=3).get_current_stats() == FunctionStats(backlog=0, num_total_runners=0)


def test_statistics_say_what_waits_and_runs_over_all_workers(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(COUNTED.replace("scaledown_window=1", "scaledown_window=600"))
    assert module.f.get_current_stats() == FunctionStats(backlog=0, num_total_runners=0)
    calls = [module.f.spawn(600) for _ in range(6)]
    assert in_loop(module.f.get_current_stats.aio()) == FunctionStats(backlog=6, num_total_runners=0)
    mesh.start_worker("--containers", "2")
    mesh.start_worker("--containers", "2")
    full = FunctionStats(backlog=2, num_total_runners=4, num_running_inputs=4)
    until(lambda: module.f.get_current_stats() == full)
    for call in calls[2:]:
        call.cancel()
    for call in calls[:2]:
        call.cancel()
    idle = FunctionStats(backlog=0, num_total_runners=4, input_headroom=4)
    until(lambda: module.f.get_current_stats() == idle)
