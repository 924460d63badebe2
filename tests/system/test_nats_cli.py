"""docs/inspect.md with the real `nats` command."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from mesh import FunctionCall
from mesh.broker import Broker
from mesh.protocol import new_call_id, new_client_token
from tests.documented import Facts, check
from tests.support import ROOT, Mesh

pytestmark = pytest.mark.system
NATS = ROOT / ".dev" / "bin" / "nats"


def nats(mesh: Mesh, words: list[str]) -> str:
    done = subprocess.run(
        [NATS, *words],
        env={**mesh.variables, "NATS_URL": mesh.server.url},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=20,
    )
    return done.stdout + done.stderr


async def _root(broker: Broker) -> str:
    return broker.topology.root


def test_every_documented_command(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    facts = Facts.make(mesh)
    check(facts, mesh.ask(_root), lambda words: nats(mesh, words))


def test_a_call_by_hand(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    Facts.make(mesh)
    call, root = new_call_id(new_client_token()), mesh.ask(_root)
    nats(mesh, ["pub", f"{root}.call.shop.send_invoice._.{call}.0", '{"args": [9], "kwargs": {}}'])
    assert FunctionCall.from_id(call).get(timeout=20) == {"sent": 9}
    assert nats(mesh, ["kv", "get", f"{root}_results", f"{call}.0", "--raw"]).strip() == '{"sent":9}'
