"""The pages of the README and of examples/ with their images, asked by curl as the text says."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import ROOT, Mesh, until
from tests.test_docs import blocks

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@contextmanager
def served(mesh: Mesh, file: Path) -> Iterator[str]:
    """`mesh serve` while the block lasts; gives the URL it prints."""
    log = mesh.directory / "serve.log"
    with log.open("wb") as output:
        serving = subprocess.Popen(
            [sys.executable, "-m", "mesh", "serve", str(file)], env=mesh.variables, stdout=output, stderr=output
        )
    try:
        found = until(lambda: re.search(r"web function web → (\S+)", log.read_text()), what="it says where it is")
        yield found[1]
        serving.send_signal(signal.SIGINT)
        assert serving.wait(30) == 0, log.read_text()
    finally:
        serving.kill()
        serving.wait()


def curl(words: str) -> str:
    command = ["curl", "-s", "--max-time", "200", *shlex.split(words.removeprefix("curl "))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_page_of_the_readme(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    readme = ROOT / "README.md"
    job_queue, page = (
        next(b for b in blocks(readme, "python") if word in b) for word in ("process_job(data)", "site.")
    )
    mesh.cli("deploy", str(mesh.write(job_queue, "my_job_queue")))
    commands = next(block for block in blocks(readme, "") if block.startswith("URL=")).splitlines()
    with served(mesh, mesh.write(page, "my_job_queue_web")) as url:
        said, submit, look = commands
        assert re.sub(r":\d+/", ":8700/", url) == said.removeprefix("URL=")
        answer = curl(submit.replace("$URL", url))
        (call,) = re.fullmatch(r'\{"call_id":"(fc-\w+)"\}', answer).groups()  # type: ignore[union-attr]
        asked = re.sub(r"fc-\w+", call, look.replace("$URL", url))
        assert until(lambda: curl(asked)) == '{"result":"hello"}', "202 has no text"


def test_the_page_of_the_queue(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    mesh.cli("deploy", str(ROOT / "examples" / "job_queue.py"))
    with served(mesh, ROOT / "examples" / "job_queue_web.py") as url:
        job = re.findall(r"fc-\w+", curl(f'-X POST "{url}/submit?text=pea"'))[0]
        status = "-o /dev/null -w '%{http_code}'"
        assert curl(f'{status} "{url}/result/{job}"') == "202"
        until(lambda: curl(f'{status} "{url}/result/{job}"') == "200")
        assert curl(f'"{url}/result/{job}"') == '{"a":1,"e":1,"p":1}'
        assert curl(f'{status} "{url}/result/fc-01M85KENBEDVG6VWEK24XNHWD3"') == "404"
