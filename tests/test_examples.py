"""What is in examples/ runs, as its first lines say. (What needs packages of an index: tests/system.)"""

from __future__ import annotations

import re

from tests.support import ROOT, Mesh

EXAMPLES = ROOT / "examples"


def test_classes(mesh: Mesh) -> None:
    shown = mesh.cli("run", "-q", str(EXAMPLES / "translator.py")).stdout.splitlines()
    assert {"one call: Katze", "streamed: Katze and Hund", "batched: [1, 2, 3]", "patient: Hund"} <= set(shown)


def test_a_queue_of_jobs(mesh: Mesh) -> None:
    early = mesh.cli("run", "-q", str(EXAMPLES / "job_queue.py"), check=False)
    assert "no app of this name is deployed" in early.stderr, "as the example says, it is to be deployed first"
    mesh.cli("deploy", str(EXAMPLES / "job_queue.py"))
    pending, done = mesh.cli("run", "-q", str(EXAMPLES / "job_queue.py"), "--text", "banana").stdout.splitlines()
    assert re.fullmatch(r"fc-\w{26} pending", pending)
    assert done == f"{pending.split()[0]} done: {{'a': 3, 'b': 1, 'n': 2}}"
