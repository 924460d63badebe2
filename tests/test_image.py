"""Images: environments of their own for functions, built on the worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from uv import find_uv_bin

from mesh import Image
from mesh.envcache import Hold, note_size, tidy
from mesh.exception import ImageBuildError, InvalidError, NotFoundError, UnimplementedError
from mesh.imagespec import ImageSpec, Step, inside
from tests.support import Mesh, gateway, until

# --- describing ------------------------------------------------------------------------------------------------------


def test_each_method_returns_another_image() -> None:
    base = Image.debian_slim("3.12")
    more = base.pip_install("a", ["b", "c"], pre=True, extra_options="--no-deps 'x y'").env({"A": "1"})
    assert base.spec.steps == ()
    assert more.spec.python == "3.12"
    assert more.spec.of(Step.PIP) == [["--prerelease", "allow", "--no-deps", "x y", "a", "b", "c"]]
    assert ImageSpec.from_json(more.spec.to_json()) == more.spec


def test_images_that_differ_only_in_what_containers_find_share_an_environment() -> None:
    one = Image.debian_slim().pip_install("a")
    for other in (one.env({"A": "1"}), one.workdir("/x"), one.apt_install("git"), Image.debian_slim().pip_install("a")):
        assert other.spec.digest == one.spec.digest
    for other in (
        one.pip_install("b"),
        one.run_commands("true"),
        Image.debian_slim("3.12").pip_install("a"),
        Image.debian_slim().env({"A": "1"}).pip_install("a"),  # it may be read as the package is built
    ):
        assert other.spec.digest != one.spec.digest


def test_of_two_values_of_a_variable_the_later_counts() -> None:
    image = Image.debian_slim().env({"A": "1", "B": "1"}).workdir("x").env({"A": "2"}).workdir("y")
    assert (image.spec.env, image.spec.workdir) == ({"A": "2", "B": "1"}, "y")


@pytest.mark.parametrize("version", ["3.10", "3", "2.7", "three", "3.12-dev", "4.0"])
def test_a_python_that_mesh_does_not_run_on_is_refused(version: str) -> None:
    with pytest.raises(InvalidError, match=r"python_version must be 3\.11 or newer"):
        Image.debian_slim(version)


def test_what_is_no_package_and_what_is_no_variable_is_refused() -> None:
    with pytest.raises(InvalidError, match="an image is described by strings, and 5 is none"):
        Image.debian_slim().pip_install(["a", 5])  # type: ignore[list-item]
    with pytest.raises(InvalidError, match=r"Image\.env: the value of A must be a string"):
        Image.debian_slim().env({"A": 5})  # type: ignore[dict-item]


def test_packages_are_read_from_files(tmp_path: Path) -> None:
    listed = tmp_path / "requirements.txt"
    listed.write_text("# ours\na==1  # why\nb \\\n  >=2\n\nc @ https://example.org/c#egg=c\n")
    image = Image.debian_slim().pip_install_from_requirements(str(listed), find_links="/w")
    assert image.spec.of(Step.PIP) == [["--find-links", "/w", "a==1", "b   >=2", "c @ https://example.org/c#egg=c"]]
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["a"]\n[project.optional-dependencies]\nweb = ["b"]\n')
    assert Image.debian_slim().pip_install_from_pyproject(str(project), ["web"]).spec.of(Step.PIP) == [["a", "b"]]
    with pytest.raises(InvalidError, match="has no optional dependencies 'x'; it has web"):
        Image.debian_slim().pip_install_from_pyproject(str(project), ["x"])
    listed.write_text("-r other.txt\n")
    with pytest.raises(InvalidError, match=r"'-r other\.txt' is an option"):
        Image.debian_slim().pip_install_from_requirements(str(listed))
    with pytest.raises(InvalidError, match=r"none\.txt cannot be read: No such file"):
        Image.debian_slim().pip_install_from_requirements(str(tmp_path / "none.txt"))


def test_pipe_passes_the_image_on() -> None:
    def with_package(image: Image, name: str, *, version: str) -> Image:
        return image.pip_install(f"{name}=={version}")

    piped = Image.debian_slim().pipe(with_package, "a", version="1")
    assert piped.spec == Image.debian_slim().pip_install("a==1").spec


@pytest.mark.parametrize(
    ("path", "within"),
    [
        ("/root", ""),
        ("/root/a", "a"),
        ("/rooted", "rooted"),
        ("root/a", "root/a"),
        ("a/b", "a/b"),
        ("../../x", "x"),
        ("/", ""),
        ("", ""),
    ],
)
def test_no_path_of_an_image_leads_out_of_its_container(path: str, within: str) -> None:
    assert inside(path) == within


def test_a_missing_import_counts_only_in_containers_of_the_image() -> None:
    with Image.debian_slim().imports():
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401


# --- building --------------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str) -> None:
    """A package of one module, as a wheel."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def wheels(tmp_path: Path) -> str:
    """A directory with two versions of the package `tiny`."""
    for version in ("1.0", "2.0"):
        wheel(tmp_path / "wheels", "tiny", version)
    return str(tmp_path / "wheels")


HEAD = """
    import os
    import subprocess
    import sys
    import mesh

    app = mesh.App("shop")
    base = mesh.Image.debian_slim().env({"UV_NO_INDEX": "1", "UV_FIND_LINKS": "WHEELS"})
"""

APP = (
    HEAD
    + """
    one = base.pip_install("tiny==1.0").env({"IMAGE": "1", "BOTH": "image"}).workdir("/root/work")
    two = base.pip_install("tiny==2.0")
    broken = base.pip_install("tiny==3.0")
    made = base.run_commands("echo $MADE > made", "pip install tiny==2.0", "cp made $VIRTUAL_ENV/made")

    with one.imports():
        import tiny
    with broken.imports():
        import no_such_package

    @app.function(image=one, env={"BOTH": "function"})
    def first():
        inner = subprocess.run(["python", "-c", "import tiny; print(tiny.version)"], capture_output=True, text=True)
        return tiny.version, inner.stdout.strip(), os.environ["IMAGE"], os.environ["BOTH"], os.getcwd()

    @app.function(image=two)
    def second():
        import tiny
        return tiny.version, sys.prefix

    @app.function(image=two.env({"A": "b"}))
    def third():
        return sys.prefix

    @app.function(image=broken)
    def never():
        return 0

    @app.function()
    def plain():
        return sys.prefix, first.remote()[0]
"""
)


def test_two_versions_of_a_package_in_one_app_and_an_image_that_cannot_be_built(
    own_mesh: Callable[..., Mesh], wheels: str
) -> None:
    mesh = own_mesh()
    worker = mesh.start_worker()
    app = mesh.deploy(APP.replace("WHEELS", wheels))
    broken = app.never.spawn()
    *versions, image, both, directory = app.first.remote()
    assert (versions, image, both) == (["1.0", "1.0"], "1", "function")
    assert directory.endswith("/work")
    version, prefix = app.second.remote()
    assert (version, app.third.remote()) == ("2.0", prefix)
    assert app.plain.remote() == (sys.prefix, "1.0")  # which calls another from its container
    reason = until(lambda: broken.status().waiting_for, what="why the image cannot be built")
    assert "the image of shop.never cannot be built: pip install tiny==3.0 failed, with 1:" in reason
    assert "there is no version of tiny==3.0" in reason
    assert "image im-" in worker.log
    assert "pip install tiny==1.0" in worker.log
    assert "does not run shop.never: the image of shop.never" in mesh.cli("check", check=False).stderr


def test_a_redeploy_that_changes_only_a_dependency_takes_effect(own_mesh: Callable[..., Mesh], wheels: str) -> None:
    mesh = own_mesh()
    worker = mesh.start_worker()
    source = (
        HEAD.replace("WHEELS", wheels)
        + """
    @app.function(image=base.pip_install("tiny==1.0"))
    def version():
        import tiny
        return tiny.version
"""
    )
    app = mesh.deploy(source)
    assert app.version.remote() == "1.0"
    app = mesh.redeploy(app, source.replace("1.0", "3.0"))
    until(lambda: "shop.version is now version" in worker.log, what="the worker heard of it")
    call = app.version.spawn()
    until(lambda: "cannot be built" in call.status().waiting_for, what="the failed build")
    wheel(Path(wheels), "tiny", "3.0")
    app = mesh.redeploy(app, source.replace("1.0", "3.0").replace("return", "return 'now', "))  # builds it once more
    assert call.get(timeout=60) == ("now", "3.0")
    assert worker.log.count("is built, in") == 2


def test_what_a_run_cannot_build_ends_it_with_the_whole_error(own_mesh: Callable[..., Mesh], wheels: str) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    file = mesh.write(
        HEAD.replace("WHEELS", wheels)
        + """
    @app.function(image=base.pip_install("tiny==3.0"))
    def never():
        pass

    @app.function(image=base.run_commands("echo so far; exit 3"))
    def neither():
        pass
"""
    )
    done = mesh.cli("run", f"{file}::never", check=False)
    assert done.returncode == 1
    assert "ImageBuildError" in done.stderr
    assert "there is no version of tiny==3.0" in " ".join(done.stderr.split())
    done = mesh.cli("run", f"{file}::neither", check=False)
    assert "echo so far; exit 3 failed, with 3:\nso far" in done.stderr


def test_a_long_build_keeps_nobody_else_from_running(own_mesh: Callable[..., Mesh], wheels: str) -> None:
    """Not even where its function could fill the worker; and who waits for it is told what is being done."""
    mesh = own_mesh()
    mesh.start_worker("--containers", "1")
    gate = mesh.directory / "gate"
    os.mkfifo(gate)
    app = mesh.deploy(
        HEAD.replace("WHEELS", wheels)
        + f"""
    @app.function(image=base.run_commands(": < {gate}"))
    def slow():
        return "slow"

    @app.function()
    def quick():
        return "quick"
"""
    )
    calls = [app.slow.spawn() for _ in range(5)]
    said = f"shop.slow waits for its image: : < {gate}"
    until(lambda: calls[0].status().waiting_for == said, what="what is being built")
    assert app.quick.remote() == "quick"
    gate.write_text("")
    assert [call.get(timeout=60) for call in calls] == ["slow"] * 5


def test_building_takes_no_longer_than_startup_timeout_and_goes_on_all_the_same(
    own_mesh: Callable[..., Mesh], wheels: str
) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    gate = mesh.directory / "gate"
    os.mkfifo(gate)
    app = mesh.deploy(
        HEAD.replace("WHEELS", wheels)
        + f"""
    @app.function(image=base.run_commands(": < {gate}"), startup_timeout=1)
    def slow():
        return "slow"
"""
    )
    call = app.slow.spawn()
    said = "its image was not built within its startup_timeout of 1 s"
    until(lambda: said in call.status().waiting_for, what="that it takes too long")
    gate.write_text("")
    assert call.get(timeout=60) == "slow"


def test_web_functions_have_images_and_requests_wait_for_them(own_mesh: Callable[..., Mesh], wheels: str) -> None:
    mesh = own_mesh()
    worker = mesh.start_worker()
    mesh.deploy(
        HEAD.replace("WHEELS", wheels)
        + """
    @app.function(image=base.pip_install("tiny==1.0"))
    @mesh.wsgi_app()
    def page():
        import tiny

        def answer(environ, start):
            start("200 OK", [("Content-Type", "text/plain")])
            return [tiny.version.encode()]

        return answer

    @app.function(image=base.pip_install("tiny==3.0"))
    @mesh.asgi_app()
    def never(): ...
"""
    )
    with gateway(mesh) as address:
        assert httpx.get(f"{address}/shop/page", timeout=60).text == "1.0"
        assert httpx.get(f"{address}/shop/never", timeout=60).status_code >= 500
    assert "is built, in" in worker.log


# --- a project, and code by value ------------------------------------------------------------------------------------


def test_a_locked_project_is_installed_without_itself(own_mesh: Callable[..., Mesh], wheels: str) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    project = mesh.directory / "src" / "project"
    project.mkdir(parents=True)
    (project / "pyproject.toml").write_text(
        '[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["tiny<2"]\n'
        f'[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n'
    )
    subprocess.run([find_uv_bin(), "lock", "--quiet", "--project", str(project)], check=True, env=mesh.variables)
    with pytest.raises(NotFoundError, match="no-project"):
        Image.debian_slim().uv_sync(str(project.with_name("no-project")))
    app = mesh.deploy(
        HEAD.replace("WHEELS", wheels)
        + """
    from pathlib import Path
    import importlib.metadata

    @app.function(image=base.uv_sync(str(Path(__file__).parent / "project")))
    def versions():
        return sorted((d.name, d.version) for d in importlib.metadata.distributions() if d.name in ("tiny", "mine"))
"""
    )
    assert app.versions.remote() == [("tiny", "1.0")]


# --- environments that are kept --------------------------------------------------------------------------------------


def test_environments_go_that_nobody_uses_the_least_used_first(tmp_path: Path) -> None:
    for number in range(4):
        environment = tmp_path / f"env-{number}"
        environment.mkdir()
        (environment / "content").write_bytes(bytes(100))
        note_size(environment, environment)
        os.utime(tmp_path / f"env-{number}.used", (time.time() - 100 + number,) * 2)
    held = Hold(tmp_path / "env-0")
    os.utime(tmp_path / "env-0.used", (0, 0))
    assert tidy(tmp_path, 1000) == []
    assert tidy(tmp_path, 250) == ["env-1", "env-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env-0", "env-0.used", "env-3", "env-3.used"]
    held.end()
    assert tidy(tmp_path, 1000) == ["env-0"]  # for a month


# --- what the worker's machine lacks ---------------------------------------------------------------------------------

DPKG = """#!/bin/sh
# Says of every package in the directory `installed` that it is there, as dpkg-query does.
shift 3
for name in "$@"; do [ -e {0}/installed/$name ] && echo "$name installed"; done
exit 0
"""
APT = """#!/bin/sh
echo "$@" >> {0}/apt.log
for name in "$@"; do [ "$name" = tesseract ] && : > {0}/installed/tesseract; done
[ ! -e {0}/broken ] || {{ echo "E: Unable to locate package"; exit 100; }}
"""


def debian(folder: Path) -> str:
    """A PATH with a Debian that a test may change."""
    (folder / "bin").mkdir()
    (folder / "installed").mkdir()
    for name, text in {"dpkg-query": DPKG, "apt-get": APT, "sudo": '#!/bin/sh\nshift; exec "$@"\n'}.items():
        (folder / "bin" / name).write_text(text.format(folder))
        (folder / "bin" / name).chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


PACKAGES = (
    HEAD
    + """
    @app.function(image=base.apt_install("git=1:2.0", ["tesseract"]))
    def read():
        return "read"
"""
)


def test_calls_wait_for_debian_packages_and_say_which(own_mesh: Callable[..., Mesh], wheels: str) -> None:
    mesh = own_mesh()
    mesh.start_worker(PATH=debian(mesh.directory))
    (mesh.directory / "installed" / "git").touch()
    app = mesh.deploy(PACKAGES.replace("WHEELS", wheels))
    call = app.read.spawn()
    said = "shop.read waits: its image needs the Debian packages tesseract, which this worker does not have: `apt-get"
    until(lambda: call.status().waiting_for.startswith(said), what="which package is missing")
    assert not (mesh.directory / "apt.log").exists()
    (mesh.directory / "installed" / "tesseract").touch()
    assert call.get(timeout=60) == "read"


def test_a_worker_installs_debian_packages_only_where_it_may(own_mesh: Callable[..., Mesh], wheels: str) -> None:
    mesh = own_mesh()
    mesh.start_worker(PATH=debian(mesh.directory), MESH_APT_INSTALL="1")
    (mesh.directory / "installed" / "git").touch()
    (mesh.directory / "broken").touch()
    app = mesh.deploy(PACKAGES.replace("WHEELS", wheels).replace('"tesseract"', '"tesseract", "none"'))
    call = app.read.spawn()
    until(lambda: "E: Unable to locate package" in call.status().waiting_for, what="what apt-get said")
    (mesh.directory / "broken").unlink()
    app = mesh.redeploy(app, PACKAGES.replace("WHEELS", wheels))
    assert call.get(timeout=60) == "read"
    log = (mesh.directory / "apt.log").read_text()
    assert "install --yes --no-install-recommends -o DPkg::Lock::Timeout=600 -- tesseract none\nupdate\n" in log
    assert "git" not in log


def test_calls_wait_for_a_python_that_the_worker_lacks(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.start_worker()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        app = mesh.deploy("""
            import mesh
            app = mesh.App("shop")

            @app.function(image=mesh.Image.debian_slim("3.99"))
            def late():
                pass
        """)
    warned = [str(w.message) for w in caught]
    assert warned == ["no worker has Python 3.99, which the image of late needs: calls wait for one that has"]
    call = app.late.spawn()
    said = "shop.late waits: its image needs Python 3.99, which this worker does not have"
    until(lambda: call.status().waiting_for == said, what="which Python is missing")


# --- what cannot be had ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        Image.from_registry("python:3.12", add_python="3.12"),
        Image.from_dockerfile("Dockerfile"),
        Image.from_scratch(),
        Image.micromamba(),
        Image.debian_slim().dockerfile_commands("RUN x"),
        Image.debian_slim().run_function(print),
        Image.debian_slim().entrypoint([]),
    ],
)
def test_what_only_a_registry_has_can_be_written_and_not_deployed(mesh: Mesh, image: Image) -> None:
    app = mesh.load("import mesh\napp = mesh.App('shop')\n@app.function(serialized=True)\ndef f(): ...")
    app.app.function(image=image.pip_install("numpy").env({"A": "1"}), name="g", serialized=True)(app.f.get_raw_f())
    (step,) = image.spec.of(Step.REFUSED)
    with pytest.raises(UnimplementedError, match=f"the image of 'g' uses {step}, which mesh does not have"):
        app.app.deploy()


def test_code_by_value_needs_the_python_that_made_it(mesh: Mesh) -> None:
    app = mesh.load("import mesh\napp = mesh.App('shop')")
    app.app.function(image=Image.debian_slim("3.19"), name="f", serialized=True)(lambda: 5)
    with pytest.raises(InvalidError, match=r"'f' goes by value from Python 3\.\d+ and cannot run on the Python 3\.19"):
        app.app.deploy()


def test_a_function_takes_images_only(mesh: Mesh) -> None:
    with pytest.raises(InvalidError, match=r"image must be a mesh\.Image, not 'python:3\.12'"):
        mesh.load("import mesh\napp = mesh.App('shop')\n@app.function(image='python:3.12')\ndef f(): ...")


def test_an_error_of_a_build_names_the_image() -> None:
    assert ImageBuildError("no", "im-1").image_id == "im-1"
