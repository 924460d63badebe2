"""Files of the deploying machine in containers: `Image.add_local_file`, `add_local_dir`, `add_local_python_source`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mesh import Image, localfiles
from mesh.bundle import Bundle
from mesh.exception import InvalidError, NotFoundError, RequestSizeError
from tests.support import Mesh, until


def files_of(image: Image) -> list[str]:
    (digest,) = image.spec.files
    return sorted(Bundle.unpack(localfiles.packed(digest), digest).files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.html", "b.tmp", "deep/c.css", "deep/er/d.tmp"):
        path = tmp_path / "page" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "page"


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ((), ["a.html", "b.tmp", "deep/c.css", "deep/er/d.tmp"]),
        (["*.tmp"], ["a.html", "deep/c.css"]),
        (["**/*.css", "a.*"], ["b.tmp", "deep/er/d.tmp"]),
        (["deep"], ["a.html", "b.tmp"]),
        (["deep/er"], ["a.html", "b.tmp", "deep/c.css"]),
        (lambda path: path.name != "a.html", ["a.html"]),
    ],
)
def test_what_is_ignored_stays_here(folder: Path, ignore: localfiles.Ignore, left: Sequence[str]) -> None:
    assert files_of(Image.debian_slim().add_local_dir(folder, "/page", ignore=ignore)) == [f"page/{n}" for n in left]


@pytest.mark.parametrize(
    ("at", "found"), [("x.html", "x.html"), ("/x.html", "x.html"), ("x/", "x/a.html"), ("../../x", "x")]
)
def test_a_file_is_put_inside_of_the_container_only(folder: Path, at: str, found: str) -> None:
    assert files_of(Image.debian_slim().add_local_file(folder / "a.html", at)) == [found]


def test_what_is_not_there_or_too_large_is_said_at_once(folder: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no .*/nothing to take into the image"):
        Image.debian_slim().add_local_file(folder / "nothing", "x")
    with pytest.raises(InvalidError, match="has no files, or all are ignored"):
        Image.debian_slim().add_local_dir(folder, "x", ignore=["*"])
    with (folder / "large").open("wb") as file:
        file.truncate(localfiles.LIMIT + 1)
    with pytest.raises(RequestSizeError, match="has more than 104,857,600 bytes"):
        Image.debian_slim().add_local_dir(folder, "x")


APP = """
import importlib
from pathlib import Path
import mesh

HERE = Path(__file__).parent
image = (
    mesh.Image.debian_slim()
    .add_local_dir(HERE / "page", "/srv/page")
    .add_local_file(HERE / "page" / "a.html", "/srv/page/deep/")
    .workdir("/srv")
    .add_local_python_source("found_by_name")
)
app = mesh.App("with-files", image=image)

@app.function()
def look():
    found = {str(path): path.read_text() for path in sorted(Path("page").rglob("*")) if path.is_file()}
    Path("page/a.html").write_text("changed")
    return {**found, "module": importlib.import_module("found" + "_by_name").WORD}
"""


def test_containers_find_them_and_a_change_is_a_new_version(mesh: Mesh, folder: Path) -> None:
    mesh.write("WORD = 'imported'", "found_by_name")
    home = folder.rename(mesh.directory / "src" / "page")
    module = mesh.deploy(APP)
    expected = {f"page/{name}": name for name in ("a.html", "b.tmp", "deep/c.css", "deep/er/d.tmp")}
    expected |= {"page/deep/a.html": "a.html", "module": "imported"}
    assert module.look.remote() == expected
    (home / "a.html").write_text("new")
    mesh.redeploy(module, APP)
    expected |= {"page/a.html": "new", "page/deep/a.html": "new"}
    until(lambda: module.look.remote() == expected, what="containers have the new file")


def test_a_module_that_is_not_here_is_said_at_deploy(mesh: Mesh) -> None:
    image = 'mesh.Image.debian_slim().add_local_python_source("nowhere", "json")'
    with pytest.raises(InvalidError, match="add_local_python_source: no module of yours here is named json, nowhere"):
        mesh.deploy(f"import mesh\napp = mesh.App('a', image={image})\n@app.function()\ndef f(): ...")
