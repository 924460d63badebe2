"""Modal's guide to job queues, done with mesh."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from mesh.protocol import new_call_id, new_client_token
from tests.guide import PAGE, QUEUE, for_mesh, mended
from tests.support import Mesh, gateway, until

SLOW = """
import mesh, time
app = mesh.App("slow")

@app.function()
def wait():
    time.sleep(60)
"""


@pytest.fixture
def address(mesh: Mesh) -> Iterator[str]:
    with gateway(mesh) as address:
        yield address


@pytest.mark.parametrize(
    ("page", "pending", "expired"),
    [(for_mesh(PAGE), 500, 500), (mended(for_mesh(PAGE)), 202, 404)],
    ids=["word for word", "mended"],
)
def test_a_page_submits_jobs_and_polls_their_results(
    mesh: Mesh, address: str, page: str, pending: int, expired: int
) -> None:
    mesh.deploy(for_mesh(QUEUE), "my_job_queue")
    waiting = mesh.deploy(SLOW).wait.spawn()
    page = page.replace(", image=image", "")  # the worker has FastAPI: no index is asked, as in tests/system
    mesh.deploy(page, f"my_job_queue_endpoint_{pending}")
    with httpx.Client(base_url=f"{address}/fastapi-mesh/fastapi_app", timeout=60) as site:
        call = until(lambda: (a := site.post("/submit?data=data")).is_success and a.json()["call_id"])
        until(lambda: (a := site.get(f"/result/{call}")).status_code == 200 and a.json() == {"result": "data"})
        until(lambda: site.get(f"/result/{waiting.object_id}").status_code == pending)
        old = new_call_id(new_client_token(), time.time() - 8 * 86_400)
        assert site.get(f"/result/{old}").status_code == expired
        assert "/fastapi-mesh/fastapi_app/openapi.json" in site.get("/docs").text
        assert site.get("/openapi.json").json()["servers"] == [{"url": "/fastapi-mesh/fastapi_app"}]
    waiting.cancel()
