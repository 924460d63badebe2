"""Secrets: sealed on the server, opened by workers for those that name them, hidden in what these print and raise."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mesh as m
from mesh import vault
from mesh.broker import Broker
from mesh.exception import AlreadyExistsError, DataLossError, InvalidError, NotFoundError, PermissionDeniedError
from mesh.mask import Mask
from mesh.protocol import Failure
from mesh.sealing import Keys, seal
from mesh.secretref import SecretRef
from mesh.topology import Limits
from tests.support import Mesh, until

TOKEN = "tok-5f2a9c71"

SHOW = """
    import os
    import subprocess
    import mesh

    app = mesh.App("shop")

    @app.function(secrets=[mesh.Secret.from_name("pay")])
    def show(*names):
        return {name: os.environ.get(name) for name in names}

    @app.function()
    def plain():
        return sorted(os.environ)

    @app.function(secrets=[mesh.Secret.from_name("pay")])
    def leak():
        print("token:", os.environ["TOKEN"], flush=True)
        subprocess.run("echo shell: $TOKEN", shell=True)
        raise ValueError("bad token " + os.environ["TOKEN"])

    @app.function(
        secrets=[mesh.Secret.from_name("pay"), mesh.Secret.from_dict({"TOKEN": "later-one", "OWN": "own-value-77"})],
        env={"OWN": "last"},
    )
    def merged():
        return os.environ["TOKEN"], os.environ["OWN"], os.environ["USER_ID"]
"""


@pytest.fixture
def keyed(own_mesh: Callable[..., Mesh]) -> Mesh:
    """An environment with a key, and a secret; no worker yet."""
    mesh = own_mesh()
    assert mesh.ask(lambda broker: vault.establish(broker, key_file(mesh)))
    m.Secret.objects.create("pay", {"TOKEN": TOKEN, "USER_ID": "u-1"})
    return mesh


def key_file(mesh: Mesh) -> Path:
    return mesh.directory / "data" / "secret.key"


def stored(mesh: Mesh) -> bytes:
    """All that the server has of an environment, but for what functions return and raise."""

    async def read(broker: Broker) -> bytes:
        streams = [
            c["name"] for c in broker.topology.streams(Limits()) if not c["name"].endswith(("_results", "CALLS"))
        ]
        found = [s for name in streams for s in await broker.connection.get_range(name, 1, 1000, ">")]
        return b"".join(s.body + repr(s.headers).encode() for s in found)

    everything = mesh.ask(read)
    assert b"deployed_by" in everything
    return everything


# --- for whom --------------------------------------------------------------------------------------------------------


def test_only_functions_that_name_a_secret_get_it(keyed: Mesh) -> None:
    worker = keyed.start_worker()
    app = keyed.deploy(SHOW)
    assert app.show.remote("TOKEN", "USER_ID", "NOTHING") == {"TOKEN": TOKEN, "USER_ID": "u-1", "NOTHING": None}
    assert "TOKEN" not in app.plain.remote()
    assert app.merged.remote() == ("later-one", "last", "u-1")
    for pid in [worker.pid, *worker.zygotes(), *worker.containers()]:
        assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def test_output_and_errors_hide_the_values(keyed: Mesh) -> None:
    worker = keyed.start_worker("--verbose")
    app = keyed.deploy(SHOW)
    call = app.leak.spawn()
    with pytest.raises(ValueError):
        call.get(timeout=30)
    until(lambda: "shell: ***" in worker.log and "token: ***" in worker.log, what="the output in the worker's log")
    shown = keyed.cli("call", "show", call.object_id).stdout + keyed.cli("app", "list", "--json").stdout + worker.log
    assert "bad token ***" in shown
    assert TOKEN not in shown
    assert TOKEN.encode() not in stored(keyed)


def test_values_in_source_are_sealed_too_and_another_value_is_another_version(keyed: Mesh) -> None:
    source = """
        import os
        import mesh

        app = mesh.App("shop", secrets=[mesh.Secret.from_local_environ(["PROVIDED"])])

        @app.function()
        def f():
            return os.environ["PROVIDED"]
    """
    keyed.start_worker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROVIDED", "provided-here-1")
        module = keyed.deploy(source)
        assert module.f.remote() == "provided-here-1"
        patch.setenv("PROVIDED", "provided-here-2")
        module = keyed.redeploy(module, source)
        until(lambda: module.f.remote() == "provided-here-2", what="the new value")
    assert b"provided-here" not in stored(keyed)


def test_options_bring_secrets_of_their_own(keyed: Mesh) -> None:
    keyed.start_worker()
    app = keyed.deploy(SHOW)
    m.Secret.objects.create("other", {"EXTRA": "extra-value"})
    other = app.show.with_options(secrets=[m.Secret.from_name("other"), m.Secret.from_dict({"MORE": "more-value"})])
    assert other.remote("TOKEN", "EXTRA", "MORE") == {"TOKEN": None, "EXTRA": "extra-value", "MORE": "more-value"}
    assert b"more-value" not in stored(keyed)


# --- what is missing -------------------------------------------------------------------------------------------------


def test_a_missing_secret_is_said_at_deploy(keyed: Mesh) -> None:
    module = keyed.load(SHOW.replace('"pay")]', '"gone")]'))
    with pytest.raises(NotFoundError, match="there is no secret 'gone' in environment"):
        module.app.deploy()
    module = keyed.load(SHOW.replace('"pay")]', '"pay", required_keys=["TOKEN", "IBAN"])]'))
    with pytest.raises(NotFoundError, match="secret 'pay' has no IBAN: it has TOKEN, USER_ID"):
        module.app.deploy()


def test_an_environment_without_a_key_says_how_to_make_one(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    with pytest.raises(NotFoundError, match="has no key to seal secrets to: run `mesh init"):
        m.Secret.objects.create("pay", {"TOKEN": TOKEN})
    assert json.loads(mesh.cli("init", "--json").stdout)["key_file"] == str(key_file(mesh))
    m.Secret.objects.create("pay", {"TOKEN": TOKEN})


def test_a_single_run_that_brings_its_own_server_has_a_key(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    path = mesh.write("""
        import os
        import mesh

        app = mesh.App("shop", secrets=[mesh.Secret.from_dict({"TOKEN": "own-run-1"})])

        @app.function()
        def show():
            print(os.environ["TOKEN"], os.environ["TOKEN"][::-1])
    """)
    alone = {name: value for name, value in mesh.variables.items() if name != "MESH_NATS_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "mesh", "run", "-q", str(path)],
        env=alone, cwd=mesh.directory, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "*** 1-nur-nwo\n", done.stderr
    assert stat.S_IMODE(key_file(mesh).stat().st_mode) == 0o600


def test_a_call_waits_where_the_worker_has_no_key(keyed: Mesh) -> None:
    keyed.start_worker(MESH_SECRET_KEY_FILE=str(keyed.directory / "nothing"))
    app = keyed.deploy(SHOW)
    call = app.show.spawn("TOKEN")

    def reason() -> str:
        return call.status().waiting_for or ""

    until(lambda: "cannot read any: there is no key file" in reason(), what="the reason")
    assert app.plain.remote(), "other functions run"
    with app.app.run():
        once = app.show.spawn("TOKEN")
        until(lambda: "cannot read any" in (once.status().waiting_for or ""), what="the reason, of a single run")
    keyed.start_worker()
    assert call.get(timeout=60) == {"TOKEN": TOKEN}


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_file_is_for_its_owner_alone(keyed: Mesh) -> None:
    assert stat.S_IMODE(key_file(keyed).stat().st_mode) == 0o600
    key_file(keyed).chmod(0o644)
    with pytest.raises(InvalidError, match="can be read by others: chmod 600"):
        Keys.load(key_file(keyed))


def test_rotation_seals_everything_anew(keyed: Mesh) -> None:
    keyed.start_worker()
    app = keyed.deploy(SHOW)
    before = Keys.load(key_file(keyed))
    assert json.loads(keyed.cli("secret", "rotate", "--json").stdout)["sealed"] == 2
    after = Keys.load(key_file(keyed))
    assert after.public != before.public
    assert stat.S_IMODE(key_file(keyed).stat().st_mode) == 0o600
    record, _ = keyed.ask(lambda b: b.secrets.get("named.pay"))
    assert record is not None
    assert record.public == after.public
    with pytest.raises(DataLossError):
        before.open(record.sealed["TOKEN"])
    assert app.show.remote("TOKEN") == {"TOKEN": TOKEN}


def test_who_has_another_key_cannot_rotate_and_a_lost_public_key_comes_back_from_the_file(keyed: Mesh) -> None:
    strange = {"MESH_SECRET_KEY_FILE": str(keyed.directory / "strange")}
    Keys.new().save(keyed.directory / "strange")
    assert "run this where that key file is" in keyed.cli("secret", "rotate", check=False, **strange).stderr
    _, sequence = keyed.ask(lambda b: b.secrets.public_key())

    async def lose(broker: object) -> None:
        await broker.secrets._meta.delete(sequence)  # type: ignore[attr-defined]

    keyed.ask(lose)
    assert keyed.cli("init", check=False, **strange).returncode == 7
    keyed.cli("init")
    assert keyed.ask(lambda b: b.secrets.public_key())[0] == Keys.load(key_file(keyed)).public


def test_sealed_values_open_with_their_key_alone() -> None:
    keys, others = Keys.new(), Keys.new()
    sealed = seal(keys.public, "ünicode\nvalue")
    assert keys.open(sealed) == others.after(keys).open(sealed) == "ünicode\nvalue"
    assert seal(keys.public, "x") != seal(keys.public, "x")
    with pytest.raises(DataLossError):
        others.open(sealed)


# --- the command, and objects ----------------------------------------------------------------------------------------


def test_the_command(keyed: Mesh) -> None:
    (keyed.directory / ".env").write_text("A=from-dotenv\nB='two words'\n")
    (keyed.directory / "c.json").write_text('{"C": "from-json"}')
    keyed.cli("secret", "create", "mix", "D=from=line", "--from-dotenv", ".env", "--from-json", "c.json")
    listed = {entry["name"]: entry for entry in json.loads(keyed.cli("secret", "list", "--json").stdout)}
    assert listed["mix"]["keys"] == ["A", "B", "C", "D"]
    assert "from-" not in json.dumps(listed)
    again = keyed.cli("secret", "create", "mix", "E=5", check=False)
    assert (again.returncode, "--force" in again.stderr) == (1, True)
    keyed.cli("secret", "create", "mix", "E=5", "--force")
    assert m.Secret.from_name("mix").info().keys == ("E",)
    keyed.cli("secret", "delete", "mix", "--yes")
    assert keyed.cli("secret", "delete", "mix", "--yes", check=False).returncode == 3


def test_objects_in_python(keyed: Mesh) -> None:
    with pytest.raises(AlreadyExistsError):
        m.Secret.objects.create("pay", {"X": "y"})
    m.Secret.objects.create("pay", {"X": "y"}, allow_existing=True)
    assert [secret.name for secret in m.Secret.objects.list()] == ["pay"]
    m.Secret.from_name("pay").update({"TOKEN": "changed", "NEW": "added", "LEFT": None})
    assert m.Secret.from_name("pay").info().keys == ("NEW", "TOKEN", "USER_ID")
    m.Secret.objects.delete("pay")
    m.Secret.objects.delete("pay", allow_missing=True)
    with pytest.raises(NotFoundError):
        m.Secret.objects.delete("pay")
    with pytest.raises(NotFoundError, match="there is no secret 'pay'"):
        m.Secret.from_name("pay").hydrate()


# --- without a mesh --------------------------------------------------------------------------------------------------


def test_what_secrets_say_of_themselves() -> None:
    own = m.Secret.from_dict({"TOKEN": TOKEN, "NOT": None})
    assert TOKEN not in repr(own) + repr(own.ref) + str(own.ref.to_json())
    assert own.ref.to_json() == {"digest": m.Secret.from_dict({"TOKEN": TOKEN}).ref.digest}
    assert own.ref.digest != m.Secret.from_dict({"TOKEN": "other"}).ref.digest
    assert SecretRef.from_json(own.ref.to_json()).digest == own.ref.digest
    with pytest.raises(InvalidError, match="cannot be sent"):
        own.__reduce__()


@pytest.mark.parametrize(
    "make",
    [
        lambda: m.Secret.from_dict({"1A": "x"}),
        lambda: m.Secret.from_dict({"A": 5}),
        lambda: m.Secret.from_dict(["A"]),
        lambda: m.Secret.from_name("with space"),
        lambda: m.Secret.from_local_environ(["SURELY_NOT_SET"]),
        lambda: m.App().function(secrets=["pay"]),
        lambda: m.App().function(secrets=5),
        lambda: m.Secret("pay"),
    ],
)
def test_what_cannot_be_a_secret_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises((InvalidError, TypeError)):
        make()


def test_a_dotenv_file_is_found_upwards(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".env").write_text("TOKEN=found\nEMPTY\n")
    assert m.Secret.from_dotenv(tmp_path / "a" / "b").ref.values == {"TOKEN": "found"}
    with pytest.raises(NotFoundError):
        m.Secret.from_dotenv(tmp_path, filename=".no-such")


def test_what_is_masked() -> None:
    mask = Mask(["abcd", "abcdef", "1", "line one\nsecond line", "a\tb'c"])
    assert mask("abcdef abcd 1") == "*** *** 1"
    assert mask("x second line y") == "x *** y"
    assert mask(repr({"k": "a\tb'c"})) == "{'k': \"***\"}"
    failure = mask.failure(Failure(type="E", text="bad abcd", traceback="  abcd\n"))
    assert (failure.text, failure.traceback) == ("bad ***", "  ***\n")
    assert Mask()("abcd") == "abcd"


def test_a_key_that_is_not_the_environments_does_not_replace_it(keyed: Mesh) -> None:
    other = keyed.directory / "other.key"
    keyed.cli("init", MESH_SECRET_KEY_FILE=str(other))
    assert not other.exists(), "there is a key already, so no file is made that opens nothing"
    Keys.new().save(other)
    with pytest.raises(PermissionDeniedError):
        keyed.ask(lambda broker: vault.rotate(broker, other))
