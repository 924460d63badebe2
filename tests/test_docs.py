"""The documentation does what it says: its code runs, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

import mesh as mesh_api
from mesh.cli import app
from mesh.config import FIELDS
from tests.support import ROOT, Mesh

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for its_language, text in found if its_language == language]


def test_the_readme_starts_with_two_commands() -> None:
    assert blocks(ROOT / "README.md", "shell")[0].splitlines() == ["python3 dev demo", "python3 dev test"]


def test_the_code_of_the_readme_runs(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    own_file, service, *_ = blocks(ROOT / "README.md", "python")
    path = mesh.directory / "my_job_queue.py"
    path.write_text(own_file)
    mesh.start_worker()
    assert "is deployed as version 1" in mesh.cli("deploy", str(path)).stderr
    assert mesh.cli("run", "-q", str(path)).stdout == "{'result': 'my-data'}\n"
    assert mesh.cli("run", "-q", str(path), "--data", "other").stdout == "{'result': 'other'}\n"
    program = mesh.directory / "service.py"
    program.write_text(service)
    done = subprocess.run([sys.executable, program], env=mesh.variables, capture_output=True, text=True, timeout=60)
    identifier, value = done.stdout.splitlines()
    assert identifier.startswith("fc-"), done.stderr
    assert value == "{'result': {'n': 1}}"


def test_images_and_secrets_are_described_as_the_readme_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").touch()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": __name__, "mesh": mesh_api, "app": mesh_api.App()}
    for block in blocks(ROOT / "README.md", "python")[3:]:
        exec(compile(block, "README.md", "exec"), names)
    assert names["image"].spec.packages == ["tesseract-ocr"]
    assert [secret.name for secret in names["charge"].spec.secrets] == ["pay"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands() -> dict[str, str]:
    """Every command, `mesh app list`, with its help."""
    group = typer.main.get_command(app)
    found: dict[str, str] = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if getattr(command, "invoke_without_command", False):
            found[f"mesh {name}"] = command.help or ""
        for subname, sub in getattr(command, "commands", {"": command}).items():
            found[f"mesh {name} {subname}".strip()] = sub.help or ""
    return found


def test_every_command_has_help_and_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for command, text in commands().items():
        assert text.strip(), f"{command} has no help"
        words = command.split()[1:]
        assert f"`{words[0]}" in changelog or f"`mesh {words[0]}" in changelog, f"{command} is not in the changelog"


def test_commands_in_the_documentation_exist() -> None:
    known = commands()
    for page in PAGES:
        for line in re.findall(r"^mesh .*$", "\n".join(blocks(page, "")), re.MULTILINE):
            words = line.split()
            assert any(" ".join(words[:count]) in known for count in (2, 3)), f"{page.name}: {line}"


def test_tests_that_the_documentation_names_exist() -> None:
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("**/test_*.py")}
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert any(f"def {name}(" in source for source in sources.values()), f"{page.name} names {name}"
        for file in re.findall(r"`(test_\w+\.py)`", page.read_text()):
            assert file in sources, f"{page.name} names {file}"


def test_every_setting_says_what_it_is() -> None:
    for name, field in FIELDS.items():
        assert field.metadata["doc"], name


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    for page in (ROOT / "docs" / "adr").glob("0*.md"):
        assert f"({page.name})" in index
