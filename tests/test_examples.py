"""What is in examples/ runs, as its first lines say. (Document OCR: tests/system.)"""

from __future__ import annotations

import re

import httpx

from tests.support import ROOT, Mesh, until
from tests.test_web import gateway

EXAMPLES = ROOT / "examples"


def test_classes(mesh: Mesh) -> None:
    shown = mesh.cli("run", "-q", str(EXAMPLES / "translator.py")).stdout.splitlines()
    assert {"one call: Katze", "streamed: Katze and Hund", "batched: [1, 2, 3]", "patient: Hund"} <= set(shown)


def test_a_queue_of_jobs_and_a_page_for_it(mesh: Mesh) -> None:
    early = mesh.cli("run", "-q", str(EXAMPLES / "job_queue.py"), check=False)
    assert "no app of this name is deployed" in early.stderr, "as the example says, it is to be deployed first"
    mesh.cli("deploy", str(EXAMPLES / "job_queue.py"))
    pending, done = mesh.cli("run", "-q", str(EXAMPLES / "job_queue.py"), "--text", "banana").stdout.splitlines()
    assert re.fullmatch(r"fc-\w{26} pending", pending)
    assert done == f"{pending.split()[0]} done: {{'a': 3, 'b': 1, 'n': 2}}"
    mesh.cli("deploy", str(EXAMPLES / "job_queue_web.py"))
    with gateway(mesh) as address, httpx.Client(base_url=f"{address}/job-queue-web/web", timeout=60) as site:
        job = site.post("/submit?text=pea").json()["job"]
        assert site.get(f"/result/{job}").status_code == 202
        until(lambda: site.get(f"/result/{job}").status_code == 200)
        assert site.get(f"/result/{job}").json() == {"a": 1, "e": 1, "p": 1}
        assert site.get("/result/fc-01M85KENBEDVG6VWEK24XNHWD3").status_code == 404
