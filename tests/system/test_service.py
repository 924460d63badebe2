"""deploy/mesh-worker.service, read by systemd itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.system


def test_systemd_has_nothing_to_say(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "mesh-worker.service").read_text()
    program = Path(sys.executable).with_name("mesh")
    unit = tmp_path / "mesh-worker.service"
    unit.write_text(text.replace("/opt/mesh/bin/mesh", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
