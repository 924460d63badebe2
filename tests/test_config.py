"""Settings: which source wins, and what an error says."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.config import FIELDS, NO_SERVER, Settings, note_running, parse_size, running_mesh
from mesh.exception import AuthError, ConnectionError, InvalidError


class Home:
    """A user's home, with a project below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = root / "work" / "shop"
        self.project.mkdir(parents=True)
        self.state = root / ".local" / "state" / "mesh"

    def write(self, path: str, text: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def load(self, **flags: object) -> Settings:
        return Settings.load(flags, self.project)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return Home(tmp_path)


# --- which source wins -----------------------------------------------------------------------------------------------


def test_without_any_source_the_defaults_hold(home: Home) -> None:
    """Every setting by its name, too: to rename or drop one breaks somebody's mesh.toml."""
    settings = home.load()
    defaults: dict[str, object] = {
        "nats_url": "",
        "credentials": "",
        "container_url": "",
        "environment": "main",
        "submit_timeout": 30.0,
        "preview": True,
        "unpickle": True,
        "containers": 0,
        "cpus": 0.0,
        "memory": 0,
        "labels": "",
        "grace": 30.0,
        "cancel_grace": 30.0,
        "crash_budget": 3,
        "slot_ttl": 30,
        "max_age": 7 * 86_400.0,
        "ack_wait": 15.0,
        "calls_size": 0,
        "results_size": 0,
        "logs_size": 0,
        "dead_size": 0,
        "replicas": 1,
        "sync": "always",
        "nats_server": "",
        "data_dir": home.root / ".local" / "share" / "mesh",
        "cache_dir": home.root / ".cache" / "mesh",
        "state_dir": home.state,
        "log_format": "text",
    }
    assert {name: getattr(settings, name) for name in defaults} == defaults
    assert {settings.origin(name) for name in defaults} == {"default"}


SOURCES = ["flag", "variable", "mesh.toml", "personal"]


@pytest.mark.parametrize("strongest", range(len(SOURCES)), ids=SOURCES)
def test_the_stronger_source_wins_and_is_named(home: Home, strongest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    personal = home.write(".config/mesh/mesh.toml", 'environment = "personal"')
    origins = ["flag", "MESH_ENVIRONMENT", str(home.root / "work" / "shop" / "mesh.toml"), str(personal)]
    flags = {}
    if strongest <= 2:
        home.write("work/shop/mesh.toml", 'environment = "mesh-toml"')
    if strongest <= 1:
        monkeypatch.setenv("MESH_ENVIRONMENT", "variable")
    if strongest == 0:
        flags["environment"] = "flag"
    settings = home.load(**flags)
    assert settings.environment == ["flag", "variable", "mesh-toml", "personal"][strongest]
    assert settings.origin("environment") == origins[strongest]


def test_each_setting_comes_from_the_strongest_source_that_has_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write(".config/mesh/mesh.toml", 'environment = "personal"\ngrace = 1\ncontainers = 2')
    home.write("mesh.toml", "grace = 3")
    monkeypatch.setenv("MESH_CRASH_BUDGET", "4")
    settings = home.load(preview=False)
    assert (settings.environment, settings.containers) == ("personal", 2)
    assert (settings.grace, settings.crash_budget, settings.preview) == (3, 4, False)


def test_the_nearest_mesh_toml_counts_alone(home: Home) -> None:
    home.write("work/mesh.toml", 'environment = "far"\ngrace = 5')
    assert home.load().environment == "far"
    home.write("work/shop/mesh.toml", 'environment = "near"')
    assert (home.load().environment, home.load().grace) == ("near", 30.0)


def test_the_search_begins_in_the_working_directory(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write("work/mesh.toml", 'environment = "here"')
    monkeypatch.chdir(home.project)
    assert Settings.load().environment == "here"


def test_a_flag_that_was_not_given_counts_for_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_ENVIRONMENT", "staging")
    assert home.load(environment=None).environment == "staging"


def test_directories_follow_xdg(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "DATA", "CACHE", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(home.root / name))
    home.write("CONFIG/mesh/mesh.toml", 'environment = "xdg"')
    settings = home.load()
    assert settings.environment == "xdg"
    assert settings.data_dir == home.root / "DATA" / "mesh"
    assert settings.cache_dir == home.root / "CACHE" / "mesh"
    assert settings.state_dir == home.root / "STATE" / "mesh"


def test_a_directory_may_be_given_from_home(home: Home) -> None:
    assert home.load(data_dir="~/store").data_dir == home.root / "store"


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_can_be_a_variable_and_says_what_it_is(
    name: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = getattr(Settings(), name)
    monkeypatch.setenv(f"MESH_{name.upper()}", str(default))
    settings = home.load()
    assert getattr(settings, name) == default
    assert settings.origin(name) == f"MESH_{name.upper()}"
    assert FIELDS[name].metadata["doc"]


@pytest.mark.parametrize(
    "text", ['labels = "gpu=l4,zone=a"', 'labels = ["gpu=l4", "zone=a"]', "[labels]\ngpu='l4'\nzone='a'"]
)
def test_labels_may_be_written_as_text_as_a_list_or_as_a_table(home: Home, text: str) -> None:
    home.write("work/mesh.toml", text)
    assert home.load().labels == "gpu=l4,zone=a"
    assert home.load(labels=["disk=fast"]).labels == "disk=fast"


def test_a_label_without_a_value_is_refused(home: Home) -> None:
    with pytest.raises(InvalidError, match=r"labels = 'gpu' \(flag\): must be name=value, several with commas"):
        home.load(labels="gpu")


def test_settings_cannot_be_changed(home: Home) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        home.load().grace = 5  # type: ignore[misc]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (1024, 1024),
        ("512", 512),
        ("512b", 512),
        ("64K", 64 << 10),
        ("512M", 512 << 20),
        ("512 MiB", 512 << 20),
        ("1.5G", 3 << 29),
        ("20 gib", 20 << 30),
        ("2T", 2 << 40),
        (" 1 kB ", 1 << 10),
    ],
)
def test_a_size_is_bytes_or_has_a_unit(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "many", "-1", "-5G", "1X", "1 M M", "nan", True, [1]])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("flag", "texts"),
    [
        (True, ["1", "TRUE", "yes", "on", True, 1]),
        (False, ["0", "False", "no", "off", False, 0]),
    ],
)
def test_a_switch_is_on_or_off(flag: bool, texts: list[object], home: Home) -> None:
    assert [home.load(unpickle=text).unpickle for text in texts] == [flag] * len(texts)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("submit_timeout", 0.1, 3600),
        ("grace", 0, 86_400),
        ("cancel_grace", 0, 3600),
        ("max_age", 1, 315_360_000),
        ("ack_wait", 1, 300),
        ("crash_budget", 1, 10**9),
        ("replicas", 1, 5),
        ("containers", 0, 10**4),
    ],
)
def test_the_ends_of_each_range_belong_to_it(name: str, low: float, high: float, home: Home) -> None:
    assert getattr(home.load(**{name: low}), name) == low
    assert getattr(home.load(**{name: high}), name) == high
    with pytest.raises(InvalidError):
        home.load(**{name: low - 1})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("grace", "soon", "could not convert string to float: 'soon'"),
        ("grace", "-1", "must be from 0 to 86400"),
        ("grace", "nan", "must be from 0 to 86400"),
        ("ack_wait", "0.5", "must be from 1 to 300"),
        ("containers", "-1", "must be at least 0"),
        ("containers", "two", "invalid literal for int() with base 10: 'two'"),
        ("crash_budget", "0", "must be at least 1"),
        ("unpickle", "maybe", "must be true or false"),
        ("sync", "never", "must be one of always, 1s, 2m"),
        ("log_format", "xml", "must be one of text, json"),
        ("environment", "Main", "1 to 32 characters out of small letters, digits, hyphen"),
        ("calls_size", "much", "could not convert string to float"),
        ("calls_size", "-1G", "must not be below 0"),
        ("calls_size", "inf", "cannot convert float infinity to integer"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_where_it_stands(
    name: str, value: str, text: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MESH_{name.upper()}", value)
    with pytest.raises(InvalidError) as caught:
        home.load()
    assert str(caught.value).startswith(f"{name} = {value!r} (MESH_{name.upper()}): ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("grace = [30]", "grace = [30] ("),
        ("grace = {a = 1}", "grace = {'a': 1} ("),
        ("containers = [1]", "containers = [1] ("),
        ("calls_size = [1]", "calls_size = [1] ("),
        ("nats_url = 4222", "nats_url = 4222 ("),
        ("data_dir = 5", "data_dir = 5 ("),
        ("environment = 5", "environment = 5 ("),
        ("unpickle = []", "unpickle = [] ("),
        ("sync = 1", "sync = 1 ("),
    ],
)
def test_a_value_of_another_type_in_a_file_is_named_with_the_file(line: str, text: str, home: Home) -> None:
    path = home.write("work/shop/mesh.toml", line)
    with pytest.raises(InvalidError) as caught:
        home.load()
    assert str(caught.value).startswith(f"{text}{path}): ")


def test_a_flag_that_makes_no_sense_is_named_as_one(home: Home) -> None:
    with pytest.raises(InvalidError, match=r"^containers = -1 \(flag\): must be at least 0$"):
        home.load(containers=-1)


def test_a_weaker_value_that_makes_no_sense_is_passed_over(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_GRACE", "soon")
    assert home.load(grace=5).grace == 5


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(home: Home) -> None:
    path = home.write("work/shop/mesh.toml", "graze = 5")
    with pytest.raises(InvalidError) as caught:
        home.load()
    assert str(caught.value).startswith(f"{path}: no setting is called 'graze'; there are nats_url, ")


@pytest.mark.parametrize("text", ["grace =", "\0", "grace = 1\ngrace = 2"])
def test_a_file_that_is_no_toml_is_named(text: str, home: Home) -> None:
    path = home.write("work/shop/mesh.toml", text)
    with pytest.raises(InvalidError) as caught:
        home.load()
    assert str(caught.value).startswith(f"{path} cannot be read: ")


def test_a_file_that_is_no_text_is_named(home: Home) -> None:
    (home.project / "mesh.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidError, match=r"mesh\.toml cannot be read: "):
        home.load()


# --- the server ------------------------------------------------------------------------------------------------------


def test_without_a_server_the_next_step_is_named(home: Home) -> None:
    with pytest.raises(ConnectionError) as caught:
        home.load().with_server()
    assert str(caught.value) == NO_SERVER == "no server: start one with `mesh up`, or set MESH_NATS_URL"


def test_a_container_without_a_way_to_call_says_so(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_IS_REMOTE", "1")
    with pytest.raises(AuthError, match=r"has no\s+MESH_CONTAINER_URL"):
        home.load().with_server()
    monkeypatch.setenv("MESH_NATS_URL", "nats://host")
    assert home.load().with_server().nats_url == "nats://host"


RUNNING = {"nats_url": "nats://mesh:pw@127.0.0.1:4222", "container_url": "nats://container:pw@127.0.0.1:4222"}


def test_the_running_mesh_of_this_user_is_found(home: Home) -> None:
    note_running(home.state, {**RUNNING, "pid": os.getpid()})
    settings = home.load()
    assert (settings.nats_url, settings.container_url) == (RUNNING["nats_url"], RUNNING["container_url"])
    assert settings.origin("nats_url") == settings.origin("container_url") == f"mesh up, process {os.getpid()}"
    assert settings.with_server() is settings


def test_any_other_address_is_stronger_than_the_running_mesh(home: Home) -> None:
    note_running(home.state, {**RUNNING, "pid": os.getpid()})
    home.write(".config/mesh/mesh.toml", 'nats_url = "nats://elsewhere"')
    settings = home.load()
    assert (settings.nats_url, settings.container_url) == ("nats://elsewhere", "")


def test_the_running_mesh_gives_what_was_not_set(home: Home) -> None:
    note_running(home.state, {**RUNNING, "pid": os.getpid()})
    assert home.load(container_url="nats://own").container_url == "nats://own"
    assert home.load(container_url="nats://own").nats_url == RUNNING["nats_url"]


def test_a_mesh_that_was_killed_is_not_found(home: Home) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    note_running(home.state, {**RUNNING, "pid": ended.pid})
    assert running_mesh(home.state) is None
    assert home.load().nats_url == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"pid": "one"}', '{"pid": null}'])
def test_a_note_that_nobody_can_read_is_none(text: str, home: Home) -> None:
    home.write(".local/state/mesh/up.json", text)
    assert home.load().nats_url == ""


def test_the_note_of_a_running_mesh_is_for_its_user_alone_and_goes_with_it(home: Home) -> None:
    values = {**RUNNING, "pid": os.getpid()}
    note_running(home.state, {**values, "pid": 1})
    note_running(home.state, values)
    note = home.state / "up.json"
    assert note.stat().st_mode & 0o777 == 0o600
    assert json.loads(note.read_text()) == values == running_mesh(home.state)
    assert [path.name for path in home.state.iterdir()] == ["up.json"]
    note_running(home.state, None)
    note_running(home.state, None)
    assert running_mesh(home.state) is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://host:4222", "nats://host:4222"),
        ("nats://user:secret@host:4222", "nats://host:4222"),
        ("nats://secret@host", "nats://host"),
        ("tls://user:secret@host:4222", "tls://host:4222"),
        ("user:secret@host", "nats://host"),
        ("host", "nats://host"),
        ("nats://user:secret@[::1]:4222", "nats://[::1]:4222"),
        ("nats://a:secret@one, nats://b:secret@two:4223", "nats://one,nats://two:4223"),
        ("nats://user:secret/secret@host", "nats://host"),
        ("nats://user:secret@secret@host", "nats://host"),
        ("nats://user:secret?secret#secret@host", "nats://host"),
        ("nats://user:secret@[::1", "nats://[::1"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str, home: Home) -> None:
    assert home.load(nats_url=url).safe_url == shown
