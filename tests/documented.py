"""The commands of docs/inspect.md: read from the page, with the names of a real mesh put in, and what to see."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from mesh import Cls, Function
from mesh.broker.bucket import Bucket
from mesh.protocol import new_call_id, new_client_token
from tests.support import ROOT, Mesh, until

PAGE = ROOT / "docs" / "inspect.md"

SHOP = """
    import mesh
    app = mesh.App("shop")

    @app.function(retries=mesh.Retries(max_retries=1, initial_delay=60))
    def send_invoice(number):
        print("sending", number)
        if number == 0:
            raise ValueError("no such customer")
        return {"sent": number}

    @app.function()
    def pages(number):
        yield from range(number)

    @app.function(max_containers=1)
    def print_labels(number):
        return number

    @app.cls()
    class Printer:
        paper: str = mesh.parameter()

        @mesh.method()
        def print(self, text):
            return self.paper

    @app.function()
    def refuse(number):
        raise ValueError("not today")
"""

# The command as the page has it → what its answer must hold. `{…}` are facts of the mesh.
EXPECTED = {
    "nats consumer report MESH_CALLS": "shop+send_invoice+_",
    "nats consumer info MESH_CALLS shop+send_invoice+_": "shop+send_invoice+_",
    "nats stream subjects MESH_CALLS 'mesh.call.shop.>'": "{retrying}",
    "nats stream get MESH_CALLS -S mesh.call.shop.send_invoice._.{retrying}.0": '{{"args":[0],"kwargs":{{}}}}',
    "nats kv get mesh_pools shop.Printer.{pool} --raw": '"construction":{{"kwargs":{{"paper":"A4"}}}}',
    "nats kv get mesh_workers {worker} --raw": '"containers":',
    "nats stream subjects MESH_DEAD": "mesh.dead.shop.refuse.{failed}.0",
    "nats stream get MESH_DEAD -S mesh.dead.shop.refuse.{failed}.0": "ValueError: not today",
    "nats kv ls mesh_clients": "24XNHWD3",
    "nats kv get mesh_clients 24XNHWD3 --raw": "web-1/4711",
    "nats kv ls mesh_slots": "shop.print_labels._.0",
    "nats kv get mesh_slots shop.print_labels._.0 --raw": "{worker}",
    "nats kv get mesh_attempts {retrying}.0 --raw": "ValueError: no such customer",
    "nats kv ls mesh_functions": "shop.send_invoice",
    "nats kv get mesh_functions shop --raw": '"state":"deployed"',
    "nats kv get mesh_functions shop.send_invoice --raw": '"name":"send_invoice"',
    "nats kv history mesh_functions shop": "shop",
    "nats kv ls mesh_secrets": "named.pay",
    "nats kv get mesh_meta secret_key --raw": "{public}",
    "nats kv get mesh_results {done}.0 --raw": '{{"sent":7}}',
    "nats stream get KV_mesh_results -S '$KV.mesh_results.{done}.0'": "Mesh-Function: shop.send_invoice",
    "nats kv ls mesh_workers": "{worker}",
    "nats stream get MESH_LOGS -S mesh.log.shop.send_invoice.{done}.0": "sending 7",
    'nats pub mesh.call.shop.send_invoice._.{new}.0 \'{{"args": [1], "kwargs": {{}}}}\'': "",
    "nats kv get mesh_results {new}.0 --raw": '{{"sent":1}}',
    "nats sub 'mesh.log.shop.>'": None,  # these go on until they are stopped: tested by calls made meanwhile
    "nats sub 'mesh.flow.*.*.out'": None,
    "nats sub 'mesh.flow.*.*.credit'": None,
    "nats sub 'mesh.freed.>'": None,
    "nats sub 'mesh.done.>'": None,
}


@dataclass
class Facts:
    """What stands for the examples of the page."""

    worker: str
    done: str
    failed: str
    retrying: str
    new: str
    pool: str
    public: str

    @classmethod
    def make(cls, mesh: Mesh) -> Facts:
        """A call in each state."""
        mesh.deploy(SHOP)
        mesh.cli("init")
        mesh.cli("secret", "create", "pay", "TOKEN=tok-1")
        public, _ = mesh.ask(lambda broker: broker.secrets.public_key())
        log = mesh.start_worker().log
        send, refuse = Function.from_name("shop", "send_invoice"), Function.from_name("shop", "refuse")
        done, failed, retrying = send.spawn(7), refuse.spawn(1), send.spawn(0)
        assert done.get(timeout=20) == {"sent": 7}
        assert Function.from_name("shop", "print_labels").remote(1) == 1  # its idle container keeps a slot
        until(lambda: failed.status().state == "failed")
        until(lambda: retrying.status().state == "retrying")
        assert Cls.from_name("shop", "Printer")(paper="A4").print.remote("hello") == "A4"
        pools = mesh.ask(lambda broker: broker.pools.all())
        worker = re.search(r"worker (\S+) is ready", log)
        assert worker is not None
        until(lambda: mesh.ask(lambda broker: broker.connection.get(broker.topology.dead, _letter(broker, failed))))
        mesh.ask(lambda broker: Bucket(broker.connection, broker.topology, "clients").put("24XNHWD3", b"web-1/4711"))
        new, pool = new_call_id(new_client_token()), pools[0].pool
        return cls(worker[1], done.object_id, failed.object_id, retrying.object_id, new, pool, public)


def _letter(broker: object, call: object) -> str:
    return f"{broker.topology.root}.dead.shop.refuse.{call.object_id}.0"  # type: ignore[attr-defined]


def commands_on_the_page() -> list[str]:
    """Every `nats` command, as a reader sees it."""
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("nats ")]


def check(facts: Facts, root: str, run: Callable[[list[str]], str]) -> None:
    """Run every documented command, and see that it answers its question."""
    examples = {"done": "fc-01M85KENBEDVG6VWEK24XNHWD3", "worker": "web-1-3fa9c1", "pool": "58c0f2a6d1"}
    known = [_as_on_the_page(command, examples) for command in EXPECTED]
    assert sorted(set(commands_on_the_page())) == sorted(set(known)), (
        "a command of the page has no test, or the reverse"
    )
    for command, expected in EXPECTED.items():
        if expected is None:
            continue
        filled = command.format(**vars(facts)).replace("mesh_", f"{root}_").replace("MESH_", f"{root.upper()}_")
        words = [
            word.replace("mesh.", f"{root}.") if word.startswith("mesh.") else word for word in shlex.split(filled)
        ]
        wanted = expected.format(**vars(facts)).replace("mesh.", f"{root}.")
        until(lambda words=words, wanted=wanted: wanted in run(words[1:]), what=f"{' '.join(words)} shows {wanted!r}")


def _as_on_the_page(command: str, examples: dict[str, str]) -> str:
    """With the page's own examples for the facts."""
    call = examples["done"]
    names = dict.fromkeys(("done", "failed", "retrying", "new"), call)
    filled = command.format(worker=examples["worker"], pool=examples["pool"], **names)
    return filled.replace("shop.refuse.", "shop.send_invoice.")
