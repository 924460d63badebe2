"""The command: what it prints, where, and the exit code it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh import Function
from tests.support import ROOT, Mesh, processes, until

APP = """
    import mesh
    app = mesh.App({name!r})

    @app.function()
    def square(x: int):
        print("squaring", x)
        return x * x

    @app.function()
    def fail():
        raise ValueError("no luck")

    @app.local_entrypoint()
    def main(count: int = 3, *, word: str = "w", flag: bool = False):
        print("sum", sum(square.remote(n) for n in range(count)), word, flag)
        return "written"
"""


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_an_entrypoint(mesh: Mesh) -> None:
    path = mesh.write(APP.format(name="cli-run"))
    done = mesh.cli("run", str(path), "--count", "4", "--word", "x", "--flag")
    assert done.stdout.splitlines()[-1] == "sum 14 x True"
    assert [line for line in done.stdout.splitlines() if "squaring" in line] == [f"squaring {n}" for n in range(4)]
    assert "✓ cli-run is on the mesh as ap-" in done.stderr
    assert "├ function square" in done.stderr
    assert "✓ cli-run completed" in done.stderr


def test_run_quietly_and_write_the_result(mesh: Mesh) -> None:
    path = mesh.write(APP.format(name="cli-quiet"))
    target = mesh.directory / "result.txt"
    done = mesh.cli("run", "-q", "-w", str(target), f"{path}::main", "--count", "1")
    assert done.stderr == ""
    assert target.read_text() == "written"


def test_run_a_function(mesh: Mesh) -> None:
    path = mesh.write(APP.format(name="cli-function"))
    target = mesh.directory / "square.txt"
    done = mesh.cli("run", "-q", "-w", str(target), f"{path}::square", "--x", "3", check=False)
    assert "takes a str or bytes, and the function returned int" in done.stderr
    assert done.returncode == 2
    assert done.stdout == "squaring 3\n"


def test_run_what_fails(mesh: Mesh) -> None:
    path = mesh.write(APP.format(name="cli-fails"))
    done = mesh.cli("run", f"{path}::fail", check=False)
    assert done.returncode == 1
    assert "ValueError: no luck" in done.stderr
    assert 'raise ValueError("no luck")' in done.stderr  # the remote line


def test_run_an_entrypoint_that_fails(mesh: Mesh) -> None:
    path = mesh.write(
        """
        import mesh
        app = mesh.App("entry-fails")

        @app.local_entrypoint()
        def main():
            {}["missing"]
        """
    )
    done = mesh.cli("run", str(path), check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'missing'"
    frames = [line for line in done.stderr.splitlines() if line.strip().startswith("File")]
    assert len(frames) == 1  # from the user's first frame on
    assert str(path) in frames[0]


def test_run_an_async_entrypoint_and_a_module(mesh: Mesh) -> None:
    path = mesh.write(
        """
        import mesh
        app = mesh.App("entry-async")

        @app.function()
        async def double(x):
            return 2 * x

        @app.local_entrypoint()
        async def main():
            print("awaited", await double.remote.aio(4))
        """,
        "entry_async",
        folder="pkg",
    )
    (path.parent / "__init__.py").touch()
    assert mesh.cli("run", "-q", str(path)).stdout == "awaited 8\n"
    assert mesh.cli("run", "-q", "-m", "pkg.entry_async").stdout == "awaited 8\n"


def test_run_on_words_as_they_are(mesh: Mesh) -> None:
    path = mesh.write(
        """
        import mesh
        app = mesh.App("words")

        @app.local_entrypoint()
        def main(*words):
            print(words)
        """
    )
    assert mesh.cli("run", "-q", str(path), "a", "--b", "c").stdout == "('a', '--b', 'c')\n"


@pytest.mark.parametrize(
    ("signature", "flags", "shown"),
    [
        ("a: int, b: float = 1.5", ["--a", "2"], "{'a': 2}"),
        ("foo_bar: str", ["--foo-bar", "x"], "{'foo_bar': 'x'}"),
        ("when: datetime", ["--when", "2026-01-02"], "{'when': datetime.datetime(2026, 1, 2, 0, 0)}"),
        ("kind: Literal['a', 'b']", ["--kind", "b"], "{'kind': 'b'}"),
        ("n: int | None = None", ["--n", "3"], "{'n': 3}"),
        ("raw", ["--raw", "3"], "{'raw': '3'}"),
        ("on: bool = True", ["--no-on"], "{'on': False}"),
    ],
)
def test_flags_come_from_the_signature(mesh: Mesh, signature: str, flags: list[str], shown: str) -> None:
    names = signature.split(",")
    given = ", ".join(f"{name.split(':')[0].split('=')[0].strip()!r}" for name in names)
    path = mesh.write(
        f"""
        import mesh
        from datetime import datetime
        from typing import Literal
        app = mesh.App("flags")

        @app.local_entrypoint()
        def main({signature}):
            print({{name: value for name, value in locals().items() if name in ({given},)[:1]}})
        """
    )
    assert mesh.cli("run", "-q", str(path), *flags).stdout == f"{shown}\n"


@pytest.mark.parametrize(
    ("signature", "flags", "text"),
    [
        ("a: int", [], "the following arguments are required: --a"),
        ("a: int", ["--a", "x"], "invalid int value: 'x'"),
        ("a: list", ["--a", "x"], "parameter 'a' has the type list, which no flag can give"),
        ("a: int = 1", ["--b", "2"], "unrecognized arguments: --b 2"),
        ("a, *rest", [], "has *rest beside other parameters"),
    ],
)
def test_wrong_flags(mesh: Mesh, signature: str, flags: list[str], text: str) -> None:
    path = mesh.write(f"import mesh\napp = mesh.App('f')\n@app.local_entrypoint()\ndef main({signature}): ...\n")
    done = mesh.cli("run", str(path), *flags, check=False)
    assert done.returncode == 2
    assert text in done.stderr


def test_run_without_a_mesh_starts_one(tmp_path: Path, own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    path = mesh.write(APP.format(name="alone"))
    variables = {key: value for key, value in mesh.variables.items() if key != "MESH_NATS_URL"}
    for _ in range(2):  # its data is kept, so a second time finds everything in place
        done = subprocess.run(
            [sys.executable, "-m", "mesh", "run", str(path)], env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "no mesh is running: starting one for this run" in done.stderr
        assert done.stdout.splitlines()[-1] == "sum 5 w False"
    assert not processes(str(mesh.directory / "data"))


# --- files that are not what they should be --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "deploy"])
@pytest.mark.parametrize(
    ("source", "ref", "code", "text"),
    [
        (None, "nowhere.py", 3, "there is no file"),
        (None, "package.module", 2, "is not the name of a Python file; for a module say -m package.module"),
        ("x = 1", "FILE", 3, "there is no App in"),
        ("import mesh\na = mesh.App('a')\nb = mesh.App('b')", "FILE", 2, "there are several"),
        ("1 / 0", "FILE", 1, "raised while it was imported: ZeroDivisionError"),
        ("import not_installed_at_all", "FILE", 1, "which lacks 'not_installed_at_all': run `python -m mesh`"),
        ("import sys\nsys.exit(4)", "FILE", 1, "raised while it was imported: SystemExit: 4"),
        ("def f(:", "FILE", 1, "SyntaxError"),
    ],
)
def test_files_that_cannot_be_used(mesh: Mesh, command: str, source: str, ref: str, code: int, text: str) -> None:
    path = mesh.write(source or "")
    if source and "App('a')" in source and command == "run":
        path.write_text(source + "\n@a.local_entrypoint()\ndef x(): ...\n@b.local_entrypoint()\ndef y(): ...\n")
    done = mesh.cli(command, str(path) if ref == "FILE" else ref, check=False)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "mesh/cli" not in done.stderr  # no traceback of our own


def test_references_that_name_nothing(mesh: Mesh) -> None:
    path = mesh.write(APP.format(name="refs"))
    run = mesh.cli("run", f"{path}::nope", check=False)
    assert (run.returncode, "there are main, square, fail" in run.stderr) == (3, True), run.stderr
    deploy = mesh.cli("deploy", f"{path}::nope", check=False)
    assert (deploy.returncode, "there is no App called 'nope'" in deploy.stderr) == (3, True), deploy.stderr


# --- deploy, apps, calls ---------------------------------------------------------------------------------------------


def test_deploy_and_look(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    path = mesh.write(APP.format(name="looked-at"))
    done = mesh.cli("deploy", str(path), "--tag", "first")
    assert "├ function square" in done.stderr
    assert "✓ looked-at is deployed as version 1 in" in done.stderr
    mesh.start_worker()
    (app,) = json.loads(mesh.cli("app", "list", "--json").stdout)
    assert (app["app"], app["state"], app["version"], app["functions"]) == (
        "looked-at",
        "deployed",
        1,
        ["fail", "square"],
    )
    assert mesh.cli("app", "list").stdout.split("\t")[0] == "looked-at"
    (version,) = json.loads(mesh.cli("app", "history", "looked-at", "--json").stdout)
    assert version["tag"] == "first"
    square = Function.from_name("looked-at", "square")
    calls = [square.spawn(n) for n in range(3)]
    assert [call.get() for call in calls] == [0, 1, 4]
    failed = Function.from_name("looked-at", "fail").spawn()
    with pytest.raises(ValueError, match="no luck"):
        failed.get()
    listed = json.loads(mesh.cli("call", "list", "--json").stdout)
    assert [call["call"] for call in listed["calls"]] == [failed.object_id, *(c.object_id for c in reversed(calls))]
    assert listed["calls"][0]["state"] == "failed"
    assert listed["calls"][0]["last_error"] == "ValueError: no luck"
    assert listed["cut"] is False
    only = json.loads(mesh.cli("call", "list", "--state", "failed", "--json").stdout)["calls"]
    assert [call["call"] for call in only] == [failed.object_id]
    one = mesh.cli("call", "list", "--limit", "2")
    assert len(one.stdout.splitlines()) == 2
    assert "only the newest 2 are shown" in one.stderr
    assert json.loads(mesh.cli("call", "show", failed.object_id, "--json").stdout)["state"] == "failed"
    assert "last error   ValueError: no luck" in mesh.cli("call", "show", failed.object_id).stdout
    assert mesh.cli("call", "get", calls[2].object_id).stdout == "4\n"
    got = mesh.cli("call", "get", failed.object_id, check=False)
    assert (got.returncode, "ValueError: no luck" in got.stderr, "Remote traceback" in got.stderr) == (1, True, True)


def test_calls_that_have_not_ended(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(APP.format(name="waiting"))
    call = module.square.spawn(7)
    (listed,) = json.loads(mesh.cli("call", "list", "--app", "waiting", "--json").stdout)["calls"]
    assert (listed["call"], listed["state"], listed["preview"]) == (
        call.object_id,
        "queued",
        '{"args":[7],"kwargs":{}}',
    )
    assert json.loads(mesh.cli("call", "list", "--app", "other", "--json").stdout)["calls"] == []
    shown = mesh.cli("call", "show", call.object_id).stdout
    assert "waiting for  no worker is running" in shown
    assert mesh.cli("call", "get", call.object_id, "--timeout", "0", check=False).returncode == 4
    unknown = mesh.cli("call", "get", "fc-01M85J7G2M9DTV3BX9ECJ4A3A7", "--timeout", "0", check=False)
    assert unknown.returncode == 3
    assert mesh.cli("call", "show", "junk", check=False).returncode == 3


def test_init_says_what_it_made(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    assert "everything is there already" in mesh.cli("init").stderr
    assert "_CALLS" in mesh.cli("init", "--env", f"{mesh.settings.environment}x", "--json").stdout


def test_where_settings_come_from(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    (mesh.directory / "mesh.toml").write_text("containers = 3\ngrace = 5\n")
    shown = json.loads(mesh.cli("config", "show", "--json", MESH_GRACE="7").stdout)
    assert shown["containers"] == {"value": "3", "origin": str(mesh.directory / "mesh.toml")}
    assert shown["grace"] == {"value": "7.0", "origin": "MESH_GRACE"}
    assert shown["submit_timeout"]["origin"] == "default"
    hidden = mesh.cli("config", "show", "--url", "nats://me:opensesame@host:1").stdout
    assert "opensesame" not in hidden
    wrong = mesh.cli("config", "show", MESH_GRACE="soon", check=False)
    assert wrong.returncode == 2
    assert "grace = 'soon' (MESH_GRACE): could not convert" in wrong.stderr


def test_exit_codes_without_a_server(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    path = mesh.write(APP.format(name="no-server"))
    away = {"MESH_NATS_URL": "nats://127.0.0.1:1"}
    for command in (["deploy", str(path)], ["call", "list"], ["worker"], ["app", "list"], ["init"]):
        done = mesh.cli(*command, check=False, **away)
        assert (done.returncode, "cannot reach nats://127.0.0.1:1" in done.stderr) == (6, True), done.stderr
    nowhere = {key: value for key, value in mesh.variables.items() if key != "MESH_NATS_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "mesh", "deploy", str(path)], env=nowhere, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 6
    assert "no server: start one with `mesh up`, or set MESH_NATS_URL" in done.stderr


def test_usage_errors() -> None:
    done = subprocess.run([sys.executable, "-m", "mesh", "nonsense"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    done = subprocess.run([sys.executable, "-m", "mesh", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("mesh 0.")


# --- up --------------------------------------------------------------------------------------------------------------


def start_up(mesh: Mesh, *arguments: str, ready: str = "Ctrl-C ends it") -> tuple[subprocess.Popen[str], Path]:
    log = mesh.directory / "up.log"
    variables = {
        key: value for key, value in mesh.variables.items() if key not in ("MESH_NATS_URL", "MESH_ENVIRONMENT")
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mesh", "up", "--port", "0", "--sync", "2m", *arguments],
            env=variables,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    until(lambda: ready in log.read_text() or process.poll() is not None, what="mesh up is up")
    assert process.poll() is None, log.read_text()
    return process, log


def test_up_keeps_its_data_and_ends_cleanly(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    path = mesh.write(APP.format(name="kept"))
    variables = {
        key: value for key, value in mesh.variables.items() if key not in ("MESH_NATS_URL", "MESH_ENVIRONMENT")
    }

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mesh", *arguments], env=variables, capture_output=True, text=True, timeout=60
        )

    process, log = start_up(mesh, "--containers", "2")
    try:
        assert cli("deploy", str(path)).returncode == 0
        nested = mesh.write(
            """
            import mesh
            print(mesh.Function.from_name("kept", "square").remote(5))
            """,
            folder="programs",
        )
        assert subprocess.run([sys.executable, nested], env=variables, capture_output=True, text=True).stdout == "25\n"
        assert "squaring 5" in log.read_text()
        second = cli("up", "--port", "0")
        assert second.returncode == 7
        assert f"is in use by `mesh up`, process {process.pid}" in second.stderr
        state = mesh.directory / "state" / "up.json"
        assert oct(state.stat().st_mode)[-3:] == "600"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
        assert not state.exists()
    finally:
        process.kill()
        process.wait()
    assert "no server" in cli("app", "list").stderr
    process, _ = start_up(mesh)
    try:
        assert cli("app", "list").stdout.startswith("kept\t")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not processes(str(mesh.directory / "data")), what="the server goes with it")
        assert "no server" in cli("app", "list").stderr
    finally:
        process.kill()
        process.wait()


def test_up_logs_json_alone_and_says_when_it_writes_to_disk(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    process, log = start_up(mesh, "--log-format", "json", ready="is ready")
    try:
        kept = {k: v for k, v in mesh.variables.items() if k not in ("MESH_NATS_URL", "MESH_ENVIRONMENT")}
        check = [sys.executable, "-m", "mesh", "check"]
        done = subprocess.run(check, env=kept, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"1 copy, written to disk: 2m (as `mesh up`, process {process.pid}, set it)" in done.stdout
    finally:
        process.terminate()
        process.wait(30)
    assert all("text" in json.loads(line) for line in log.read_text().splitlines())


def test_up_starts_a_server_that_died_again(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    process, log = start_up(mesh)
    try:
        (server,) = processes(str(mesh.directory / "data"))
        os.kill(server, signal.SIGKILL)
        until(lambda: "the server is back" in log.read_text(), what="it is started again")
        variables = {
            key: value for key, value in mesh.variables.items() if key not in ("MESH_NATS_URL", "MESH_ENVIRONMENT")
        }
        path = mesh.write(APP.format(name="after"))
        done = subprocess.run(
            [sys.executable, "-m", "mesh", "run", "-q", str(path)],
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == "sum 5 w False", done.stderr
    finally:
        process.terminate()
        assert process.wait(20) == 0
