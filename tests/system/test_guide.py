"""Modal's guide to job queues as a person follows it: `mesh run`, `mesh deploy`, `mesh serve`, curl; with its image,
whose packages come from the index."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mesh.protocol import new_call_id, new_client_token
from tests.guide import PAGE, QUEUE, for_mesh, mended
from tests.support import Mesh, until
from tests.test_guide import SLOW

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-s", *arguments], capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize(
    ("page", "pending", "expired"),
    [(for_mesh(PAGE), "500", "500"), (mended(for_mesh(PAGE)), "202", "404")],
    ids=["word for word", "mended"],
)
def test_it_is_served_and_driven_with_curl(
    own_mesh: Callable[..., Mesh], page: str, pending: str, expired: str
) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    queue = mesh.write(for_mesh(QUEUE), "my_job_queue")
    mesh.cli("deploy", str(queue))
    assert "{'result': 'my-data'}" in mesh.cli("run", str(queue), timeout=120).stdout
    slow = mesh.deploy(SLOW).wait.spawn()
    log = mesh.directory / "serve.log"
    file = mesh.write(page, "my_job_queue_endpoint", folder="page")
    with log.open("wb") as output:
        serving = subprocess.Popen(
            [sys.executable, "-m", "mesh", "serve", str(file)], env=mesh.variables, stdout=output, stderr=output
        )
    try:
        address = until(lambda: re.search(r"http://\S+fastapi_app", log.read_text()), timeout=60)
        assert address is not None
        submit: Callable[[], str] = lambda: curl("-X", "POST", f"{address[0]}/submit?data=data")  # noqa: E731
        call = json.loads(until(lambda: (a := submit()).startswith("{") and a, timeout=240, what="the image is there"))
        result: Callable[[], str] = lambda: curl("-X", "GET", f"{address[0]}/result/{call['call_id']}")  # noqa: E731
        until(lambda: result() == '{"result":"data"}')
        old = new_call_id(new_client_token(), time.time() - 8 * 86_400)
        for job, status in ((slow.object_id, pending), (old, expired)):
            assert curl("-o", "/dev/null", "-w", "%{http_code}", f"{address[0]}/result/{job}") == status
        slow.cancel()
    finally:
        serving.send_signal(signal.SIGINT)
        assert serving.wait(60) == 0
