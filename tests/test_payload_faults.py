"""Large payloads while things die: the submitter half-way, the worker that holds them, the server in between."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import mesh as modal
from mesh.broker import Broker
from mesh.payload import parse_name
from mesh.server import NatsServer
from mesh.sweep import Sweeper
from tests.support import Mesh, new_mesh, until
from tests.test_payloads import AT_ONCE, MB, deployed, names


def test_a_submitter_killed_half_way_leaves_what_the_sweep_removes(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    deployed(mesh, "half-way")
    script = mesh.write(
        "import mesh\nmesh.Function.from_name('half-way', 'digest').spawn(bytes(25_000_000))", folder="programs"
    )
    submitter = subprocess.Popen([sys.executable, str(script)], env=mesh.variables, cwd=mesh.directory)
    try:
        until(lambda: names(mesh), what="its upload has begun")
    finally:
        submitter.kill()
        submitter.wait()
    [name] = names(mesh)
    call = (parse_name(name) or ("", 0, ""))[0]

    async def sweep(broker: Broker) -> int:
        assert await broker.calls.find(call) is None, "killed too late: the call was submitted"
        return await Sweeper(broker, "w", 15.0, 60.0).payloads(AT_ONCE)

    assert mesh.ask(sweep) == 1
    assert names(mesh) == set()


def test_a_worker_killed_with_large_arguments_is_followed_by_another(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    module = deployed(mesh, "killed")
    first = mesh.start_worker()
    data, path = os.urandom(3 * MB), mesh.directory / "go"
    call = module.slow.spawn(data, str(path))
    ledger = mesh.ledger("killed-ledger")
    until(lambda: ledger.count("began") == 1)
    first.kill()
    path.touch()
    mesh.start_worker()
    assert call.get(40) == data
    assert ledger.count("began") == 2
    until(lambda: {name.split(".")[2] for name in names(mesh)} == {"out"})


def test_a_server_killed_while_payloads_are_on_their_way(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, ack_wait=4, blobs_size="256M") as mesh:
        module = deployed(mesh, "restarted")
        mesh.start_worker()
        assert module.back.remote(b"warm") == b"warm"
        data = os.urandom(16 * MB)
        calls: list[modal.FunctionCall[bytes]] = []
        submitting = threading.Thread(target=lambda: calls.extend(module.back.spawn(data) for _ in range(3)))
        submitting.start()
        for _ in range(2):
            before = len(names(mesh))
            until(lambda before=before: len(names(mesh)) > before or not submitting.is_alive())
            server.kill()
            server = own_server(store=tmp_path / "store", port=server.port)
        submitting.join(60)
        assert [call.get(60) == data for call in calls] == [True] * 3
