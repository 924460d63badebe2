"""What killed workers leave on the disk goes with the next one."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh import scratch
from mesh.scratch import Scratch
from tests.support import Mesh


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_folder_in_use_stays_however_old(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Scratch()
    monkeypatch.setattr(scratch, "_YOUNG", -1.0)
    scratch.remove_abandoned()
    assert mine.path.exists()
    mine.close()
    assert not mine.path.exists()


def test_a_folder_that_is_just_being_made_stays(temporary: Path) -> None:
    young = Path(tempfile.mkdtemp(prefix="mesh-worker-"))
    scratch.remove_abandoned()
    assert young.exists()


def test_what_a_killed_worker_left_is_removed(own_mesh: Callable[..., Mesh], temporary: Path) -> None:
    mesh = own_mesh()
    module = mesh.deploy("""
        import mesh, os
        app = mesh.App("scratch")

        @app.function()
        def where():
            open("left", "w").close()
            return os.getcwd()
    """)
    worker = mesh.start_worker(TMPDIR=str(temporary))
    where = Path(module.where.remote())
    assert where.is_relative_to(temporary)
    worker.kill()
    assert (where / "left").exists()
    scratch.remove_abandoned()
    assert where.exists(), "its worker may be just starting, as far as this can tell"
    hours_ago = time.time() - 7200
    os.utime(where.parent, (hours_ago, hours_ago))
    mesh.start_worker(TMPDIR=str(temporary))
    assert not where.exists()
