"""The README's two commands on a machine that has Python and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, processes

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone of what is committed."""
    target = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", ROOT, target], check=True)
    return target


@pytest.fixture(params=[sys.executable, "/usr/bin/python3"], ids=["own", "debian"])
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Variables of `env -i`: an empty home, and a PATH with python3 only. Debian's Python has no ensurepip."""
    python = Path(request.param).resolve()
    folder, home = tmp_path / "bin", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    (folder / "python3").symlink_to(python)
    return {"HOME": str(home), "PATH": str(folder)}


def dev(checkout: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/bin/env", "-i", *(f"{k}={v}" for k, v in variables.items()), "python3", "dev", *arguments],
        cwd=checkout,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_demo_and_test(checkout: Path, bare: dict[str, str]) -> None:
    demo = dev(checkout, bare, "demo")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "result  {'be': 2, 'not': 1, 'or': 1, 'to': 2}" in demo.stdout
    assert not processes(str(checkout))
    assert not list(Path(bare["HOME"]).iterdir())
    tests = dev(checkout, bare, "test", "tests/test_spec.py", "tests/test_e2e.py")
    assert tests.returncode == 0, tests.stdout + tests.stderr
