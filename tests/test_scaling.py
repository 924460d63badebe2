"""Containers that follow the load, over real workers: how many there are, where they are, and when they end."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from mesh import FunctionCall
from mesh.exception import ServerWarning
from tests.support import Mesh, until

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
