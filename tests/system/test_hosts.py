"""Workers on separate hosts: network namespaces with an address each, on one wire with one NATS server."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mesh import FunctionCall
from mesh.server import NatsServer
from tests.support import Mesh, WorkerProcess, new_mesh, until
from tests.test_slots import TTL, begun, deploy, most_alive

pytestmark = pytest.mark.system


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Wire:
    """A network of this test alone: the server's address, and as many hosts as are asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._name = f"m{secrets.token_hex(3)}"
        self._net = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}"
        self._hosts = 0
        self.address = f"{self._net}.1"
        self._add("link", self._name, "type", "bridge")
        ip("addr", "add", f"{self.address}/24", "dev", self._name)
        ip("link", "set", self._name, "up")

    def _add(self, kind: str, name: str, *words: str) -> None:
        ip(kind, "add", name, *words)
        self._stack.callback(ip, kind, "del", name)

    def host(self) -> Host:
        """Another host."""
        self._hosts += 1
        number, link = self._hosts, f"{self._name}{self._hosts}"
        name = f"{self._name}-{number}"
        self._add("netns", name)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)  # which goes with its namespace
        ip("link", "set", link, "master", self._name, "up")
        inside = ("ip", "-n", name)
        for words in (
            ("addr", "add", f"{self._net}.{number + 1}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            subprocess.run([*inside, *words], check=True)
        return Host(name, link)


class Host:
    """A network namespace. What runs there reaches the server by its link alone."""

    def __init__(self, name: str, link: str) -> None:
        self._name = name
        self._link = link

    def start_worker(self, mesh: Mesh) -> WorkerProcess:
        return mesh.start_worker(inside=("ip", "netns", "exec", self._name))

    def unplug(self) -> None:
        ip("link", "set", self._link, "down")

    def plug_in(self) -> None:
        ip("link", "set", self._link, "up")


@pytest.fixture
def wire() -> Iterator[Wire]:
    with ExitStack() as stack:
        yield Wire(stack)


@pytest.fixture
def mesh(wire: Wire, own_server: Callable[..., NatsServer], tmp_path: Path) -> Iterator[Mesh]:
    server = own_server(host=wire.address)
    url = f"nats://{wire.address}:{server.port}"
    with new_mesh(server, tmp_path, nats_url=url, slot_ttl=TTL, ack_wait=2) as mesh:
        yield mesh


def hears_of(mesh: Mesh, worker: WorkerProcess) -> None:
    """Wait until this worker runs an input."""
    before = set(begun(mesh))
    until(lambda: (set(begun(mesh)) - before) & set(worker.containers()), 60, "it takes over")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cap", [1, 5])
def test_two_hosts_one_paused_one_killed(wire: Wire, mesh: Mesh, cap: int) -> None:
    work = deploy(mesh, f"max_containers={cap}")
    calls = [work.spawn(0.2) for _ in range(50 * cap)]
    first = wire.host().start_worker(mesh)
    until(lambda: len(set(begun(mesh))) == cap)
    second = wire.host().start_worker(mesh)  # joins late: every slot is taken
    os.kill(first.pid, signal.SIGSTOP)
    try:
        hears_of(mesh, second)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    second.kill()
    hears_of(mesh, first)
    FunctionCall.gather(*calls)
    assert most_alive(mesh) == cap


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cap", [1, 5])
def test_three_hosts_one_unplugged_one_killed_one_late(wire: Wire, mesh: Mesh, cap: int) -> None:
    work = deploy(mesh, f"max_containers={cap}")
    calls = [work.spawn(0.2) for _ in range(60 * cap)]
    hosts = [wire.host() for _ in range(3)]
    first = hosts[0].start_worker(mesh)
    until(lambda: len(set(begun(mesh))) == cap)
    second = hosts[1].start_worker(mesh)
    hosts[0].unplug()
    hears_of(mesh, second)
    third = hosts[2].start_worker(mesh)
    hosts[0].plug_in()
    second.kill()
    until(lambda: set(begun(mesh)[-5:]) <= {*first.containers(), *third.containers()}, 60, "the others take over")
    FunctionCall.gather(*calls)
    assert most_alive(mesh) == cap
    assert [worker.stop() for worker in (first, third)] == [0, 0]
