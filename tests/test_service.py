"""deploy/mesh-worker.service: what it says to systemd fits what a worker does."""

from __future__ import annotations

import re
import shlex

from mesh.cli.render import ExitCode as CommandExit
from mesh.config import Settings
from mesh.worker import ExitCode
from tests.support import ROOT

UNIT = ROOT / "deploy" / "mesh-worker.service"


def settings() -> dict[str, str]:
    """The last value of each setting of the unit."""
    lines = [line for line in UNIT.read_text().splitlines() if line and line[0] not in "#["]
    return dict(line.split("=", 1) for line in lines)


def test_the_worker_has_time_to_drain() -> None:
    """The grace for what runs, as long again to store what it came to, and some seconds to end."""
    assert int(settings()["TimeoutStopSec"]) >= 2 * Settings().grace + 15


def test_only_the_worker_is_told_to_stop() -> None:
    """Its containers are its own to end: a SIGTERM to each of them would kill what the grace is for."""
    assert settings()["KillMode"] == "mixed"


def test_it_is_started_again_unless_it_was_used_wrongly() -> None:
    unit = settings()
    assert unit["Restart"] == "on-failure"
    assert unit["StartLimitIntervalSec"] == "0"
    assert unit["RestartPreventExitStatus"].split() == [str(CommandExit.USAGE.value)]
    assert ExitCode.DRAINED == 0


def test_a_container_killed_for_its_memory_does_not_end_the_worker() -> None:
    assert settings()["OOMPolicy"] == "continue"


def test_its_command_and_variables_exist() -> None:
    program, *words = shlex.split(settings()["ExecStart"])
    assert (program.rpartition("/")[2], words) == ("mesh", ["worker", "--log-format", "json"])
    names = set(re.findall(r"MESH_(\w+)", UNIT.read_text()))
    assert {name.lower() for name in names} <= set(Settings.__dataclass_fields__)
