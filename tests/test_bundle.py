"""An app's source on its way to workers: exactly what is local, the same bytes for the same source, nothing damaged."""

from __future__ import annotations

import importlib
import importlib.machinery
import io
import random
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.bundle import LIMIT, Bundle, collect, is_local
from mesh.exception import DataLossError, InvalidError, RequestSizeError


class Project:
    """A directory of sources that is importable."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Files by their path."""
        for path, content in files.items():
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        importlib.invalidate_caches()

    def files(self, entry: str) -> list[str]:
        """Paths in the bundle of a module."""
        return sorted(collect({entry: None})[0].files)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Project(tmp_path)


# --- which files -----------------------------------------------------------------------------------------------------


def test_a_module_is_shipped_with_all_local_modules_it_imports(project: Project) -> None:
    entry = "import one_\nfrom two_ import x"
    project.write(
        {"entry_.py": entry, "one_.py": "import three_", "two_.py": "x = 1", "three_.py": "", "other_.py": ""}
    )
    assert project.files("entry_") == ["entry_.py", "one_.py", "three_.py", "two_.py"]


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    import hidden_",
        "async def f():\n    from hidden_ import x",
        "class C:\n    def m(self):\n        import hidden_ as h",
        "try:\n    import hidden_\nexcept ImportError:\n    pass",
        "if False:\n    import hidden_",
        "import os, hidden_, sys",
        "import hidden_.inner.deep",
        "from hidden_.inner import x",
    ],
)
def test_an_import_counts_wherever_it_stands(code: str, project: Project) -> None:
    project.write({"entry_.py": code, "hidden_.py": ""})
    assert project.files("entry_") == ["entry_.py", "hidden_.py"]


def test_nothing_is_executed_to_find_imports(project: Project) -> None:
    project.write({"entry_.py": "import bomb_", "bomb_.py": "raise SystemExit('executed')"})
    assert project.files("entry_") == ["bomb_.py", "entry_.py"]
    assert "entry_" not in sys.modules


def test_modules_that_import_each_other_are_shipped_once(project: Project) -> None:
    project.write({"entry_.py": "import other_", "other_.py": "import entry_"})
    assert project.files("entry_") == ["entry_.py", "other_.py"]


def test_a_package_is_shipped_whole_with_its_data_left_out(project: Project) -> None:
    project.write(
        {
            "shop_/__init__.py": "",
            "shop_/tasks.py": "from . import helpers",
            "shop_/helpers.py": "import beside_",
            "shop_/deep/models.py": "",
            "shop_/logo.png": b"\x89PNG",
            "shop_/README.md": "",
            "beside_.py": "",
        }
    )
    expected = ["beside_.py", "shop_/__init__.py", "shop_/deep/models.py", "shop_/helpers.py", "shop_/tasks.py"]
    assert project.files("shop_.tasks") == expected


def test_a_namespace_package_is_shipped_from_all_its_places(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Project(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.syspath_prepend(str(elsewhere.root))
    project.write({"space_/one.py": ""})
    elsewhere.write({"space_/two.py": ""})
    assert project.files("space_") == ["space_/one.py", "space_/two.py"]


@pytest.mark.parametrize(
    "path",
    [
        "shop_/.hidden/mod.py",
        "shop_/.#lock.py",
        "shop_/__pycache__/mod.py",
        "shop_/node_modules/mod.py",
        "shop_/lib/site-packages/mod.py",
        "shop_/lib/dist-packages/mod.py",
        "shop_/env/lib/mod.py",
    ],
)
def test_what_is_no_source_of_the_project_is_left_out(path: str, project: Project) -> None:
    project.write({"shop_/__init__.py": "", "shop_/env/pyvenv.cfg": "", path: ""})
    assert project.files("shop_") == ["shop_/__init__.py"]


def test_a_lock_file_that_an_editor_left_stops_nothing(project: Project) -> None:
    """Emacs makes a dangling link `.#mod.py` beside a file with unsaved changes."""
    project.write({"shop_/__init__.py": ""})
    (project.root / "shop_" / ".#mod.py").symlink_to("ann@laptop.42")
    assert project.files("shop_") == ["shop_/__init__.py"]


def test_the_standard_library_and_what_is_installed_stay_where_they_are(project: Project) -> None:
    project.write({"entry_.py": "import json, msgpack, mesh, nowhere_to_be_found\nimport concurrent.futures"})
    bundle, installed = collect({"entry_": None})
    assert list(bundle.files) == ["entry_.py"]
    assert installed == {"msgpack", "mesh", "nowhere_to_be_found"}


def test_an_installed_package_in_a_virtual_environment_beside_the_code_stays(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = project.root / "venv/lib/python3/site-packages"
    monkeypatch.syspath_prepend(str(installed))
    project.write({"venv/lib/python3/site-packages/third_party_.py": "", "entry_.py": "import third_party_"})
    assert project.files("entry_") == ["entry_.py"]
    assert not is_local(installed / "third_party_.py")


def test_what_is_local(tmp_path: Path) -> None:
    assert is_local(tmp_path / "job.py")
    assert not is_local(Path(io.__file__))
    assert not is_local(Path(pytest.__file__))
    assert not is_local(Path(sys.modules["mesh"].__file__ or ""))


def test_a_script_is_shipped_under_its_name_whatever_its_file_is_called(project: Project) -> None:
    project.write({"bin/run-it": "import helper_", "helper_.py": ""})
    bundle, _ = collect({"job": project.root / "bin" / "run-it"})
    assert sorted(bundle.files) == ["helper_.py", "job.py"]
    assert bundle.files["job.py"] == b"import helper_"


def test_a_module_that_is_not_ones_own_gives_an_empty_bundle() -> None:
    bundle, installed = collect({"msgpack": None})
    assert (dict(bundle.files), installed) == ({}, {"msgpack"})


def test_a_file_that_is_no_python_travels_as_it_is(project: Project) -> None:
    """It fails where it is imported, in a container as here."""
    project.write({"shop_/__init__.py": "import fine_", "shop_/template.py": "{{ nothing }} def", "fine_.py": ""})
    assert project.files("shop_") == ["fine_.py", "shop_/__init__.py", "shop_/template.py"]


def test_a_compiled_extension_beside_the_code_is_refused_with_the_way_out(project: Project) -> None:
    project.write({f"fast_{importlib.machinery.EXTENSION_SUFFIXES[0]}": b"\x7fELF", "entry_.py": "import fast_"})
    with pytest.raises(InvalidError, match=r"module 'fast_' is a compiled extension beside your code .* install it as"):
        project.files("entry_")


def test_an_import_of_main_stops_nothing(project: Project) -> None:
    project.write({"entry_.py": "import __main__"})
    assert project.files("entry_") == ["entry_.py"]


# --- the size --------------------------------------------------------------------------------------------------------


def test_too_much_source_is_refused_with_the_largest_files(project: Project) -> None:
    project.write({"shop_/__init__.py": "", "shop_/small.py": "x = 1", "shop_/table.py": b"#" * LIMIT})
    with pytest.raises(RequestSizeError) as caught:
        project.files("shop_")
    first, *listed = str(caught.value).splitlines()
    assert first == (
        f"the local source of this app takes {LIMIT + 5:,} bytes in 3 files; the limit is 10,485,760. The largest:"
    )
    assert listed == [
        "    10,485,760  shop_/table.py",
        "             5  shop_/small.py",
        "             0  shop_/__init__.py",
    ]


def test_as_much_source_as_the_limit_is_fine(project: Project) -> None:
    project.write({"large_.py": b"#" * LIMIT})
    assert project.files("large_") == ["large_.py"]


# --- the digest ------------------------------------------------------------------------------------------------------

BUNDLE = Bundle({"shop/__init__.py": b"", "shop/tasks.py": b"import this\n" * 20, "job.py": b"\xff not python"})


def test_the_digest_is_this_one() -> None:
    """It is the name of stored code: another way to make it would ship everything again."""
    assert BUNDLE.digest == "0da18778ad19304b23c211a425f0d946a87b087819f358916e3414a87b733cb8"


def test_the_digest_and_the_bytes_do_not_depend_on_order_or_place(tmp_path: Path) -> None:
    backwards = Bundle(dict(reversed(BUNDLE.files.items())))
    assert backwards.digest == BUNDLE.digest
    assert backwards.pack() == BUNDLE.pack()


@pytest.mark.parametrize(
    "files",
    [
        {**BUNDLE.files, "job.py": b"other"},
        {**BUNDLE.files, "more.py": b""},
        {name: content for name, content in BUNDLE.files.items() if name != "job.py"},
        {"shop/__init__.py": b"", "shop/tasks2.py": BUNDLE.files["shop/tasks.py"], "job.py": BUNDLE.files["job.py"]},
    ],
)
def test_the_digest_goes_over_every_path_and_content(files: dict[str, bytes]) -> None:
    assert Bundle(files).digest != BUNDLE.digest


PATHS = st.from_regex(r"[a-z]{1,5}(/[a-z]{1,5}){0,2}\.py", fullmatch=True)


@given(st.dictionaries(PATHS, st.binary()), st.randoms(use_true_random=False))
def test_a_bundle_survives_being_packed_in_any_order(files: dict[str, bytes], chance: random.Random) -> None:
    shuffled = list(files.items())
    chance.shuffle(shuffled)
    packed = Bundle(dict(shuffled)).pack()
    assert packed == Bundle(files).pack()
    assert dict(Bundle.unpack(packed, Bundle(files).digest).files) == files


def test_the_modules_of_a_bundle_are_its_top_level_names() -> None:
    assert BUNDLE.modules == ("job", "shop")


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_bundle_damaged_at_any_byte_is_never_taken_for_another() -> None:
    packed, digest = BUNDLE.pack(), BUNDLE.digest
    noticed = 0
    for position in range(len(packed)):
        damaged = packed[:position] + bytes([packed[position] ^ 0x55]) + packed[position + 1 :]
        try:
            assert Bundle.unpack(damaged, digest).files == BUNDLE.files  # a byte that means nothing
        except DataLossError:
            noticed += 1
    assert noticed > len(packed) / 2


def test_a_bundle_cut_anywhere_is_refused() -> None:
    packed = BUNDLE.pack()
    for length in range(len(packed)):
        with pytest.raises(DataLossError):
            Bundle.unpack(packed[:length], BUNDLE.digest)


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\x05\x06" + b"\0" * 18])
def test_what_is_no_bundle_is_refused_with_what_to_do(data: bytes) -> None:
    with pytest.raises(DataLossError, match=r"the source bundle abcdefabcdef .*; deploy the app again"):
        Bundle.unpack(data, "abcdef" * 10)


def test_another_bundle_than_asked_for_is_refused() -> None:
    with pytest.raises(DataLossError, match="does not match its digest; deploy the app again"):
        Bundle.unpack(BUNDLE.pack(), Bundle({}).digest)


# --- on the worker's disk --------------------------------------------------------------------------------------------


def test_a_bundle_is_written_as_it_was_and_compiled(tmp_path: Path) -> None:
    target = tmp_path / "code"
    BUNDLE.write(target)
    written = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*.py")}
    assert written == dict(BUNDLE.files)
    assert (target / "shop" / "__pycache__").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_a_traceback_names_the_file_where_it_was_written(tmp_path: Path) -> None:
    target = tmp_path / "code"
    Bundle({"job.py": b"raise ValueError"}).write(target)
    done = subprocess.run([sys.executable, "-c", "import job"], cwd=target, capture_output=True, text=True, check=False)
    assert f'File "{target}/job.py", line 1' in done.stderr


def test_two_workers_may_write_the_same_bundle(tmp_path: Path) -> None:
    target = tmp_path / "code"
    BUNDLE.write(target)
    BUNDLE.write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil.py", "shop/../../evil.py", "shop/evil.so", "evil", "shop/..", ".."]
)
def test_a_path_that_leads_elsewhere_is_never_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataLossError, match="holds the path"):
        Bundle({"fine.py": b"", name: b"x"}).write(tmp_path / "cache" / "code")
    assert list(tmp_path.rglob("*")) == []


def test_a_path_that_leads_elsewhere_comes_out_of_a_zip_as_it_is_and_is_refused_then(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../evil.py", b"x")
    forged = Bundle.unpack(buffer.getvalue(), Bundle({"../evil.py": b"x"}).digest)
    with pytest.raises(DataLossError, match=r"holds the path '\.\./evil\.py', which no bundle of ours does"):
        forged.write(tmp_path / "code")
    assert list(tmp_path.iterdir()) == []
