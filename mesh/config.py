"""Settings: read once, frozen, each knowing where its value came from. No other module reads the environment.

First wins: a command's flag · `MESH_*` variables · the nearest `mesh.toml` upwards · `~/.config/mesh/mesh.toml` ·
the running `mesh up` of this user (for the server's address only) · the default.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.exception import AuthError, ConnectionError, InvalidError
from mesh.labels import parse_labels
from mesh.spec import MAX_RESULT_AGE, check_environment

NO_SERVER = "no server: start one with `mesh up`, or set MESH_NATS_URL"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _path(value: object) -> Path:
    return Path(_text(value)).expanduser()


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    flags = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if str(value).lower() not in flags:
        raise ValueError("must be true or false")
    return flags[str(value).lower()]


def _number(low: float, high: float) -> Callable[[object], float]:
    def read(value: object) -> float:
        number = float(value)  # type: ignore[arg-type]  # whatever it is, float says so
        if not low <= number <= high:
            raise ValueError(f"must be from {low:g} to {high:g}")
        return number

    return read


def _count(low: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = int(str(value))
        if number < low:
            raise ValueError(f"must be at least {low}")
        return number

    return read


_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(value: object) -> int:
    """Bytes from a number, or from text such as `512M` or `20 GiB`."""
    text = str(value).strip().lower().removesuffix("b").removesuffix("i")
    unit = _UNITS.get(text[-1:], 1)
    number = float(text[:-1] if unit > 1 else text)
    if number < 0:
        raise ValueError("must not be below 0")
    return int(number * unit)


def _one_of(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if str(value) not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return read


def _environment(value: object) -> str:
    try:
        return check_environment(_text(value))
    except InvalidError as error:
        raise ValueError(str(error)) from None


def _labels(value: object) -> str:
    return ",".join(f"{name}={own}" for name, own in parse_labels(value).items())


def _home(variable: str, fallback: str) -> Path:
    """A directory of the XDG base directory specification."""
    return Path(os.environ.get(variable) or Path.home() / fallback) / "mesh"


def _setting(default: Any, read: Callable[[Any], Any], doc: str) -> Any:
    metadata = {"read": read, "doc": doc}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. `MESH_<NAME>` in the environment, `<name>` in `mesh.toml`; `mesh config show`."""

    nats_url: str = _setting("", _text, "the server, `nats://user:password@host:port`; several with commas")
    credentials: str = _setting("", _text, "path of a NATS credentials file, instead of user and password in the URL")
    container_url: str = _setting("", _text, "the server as functions reach it, for the calls they make themselves")
    environment: str = _setting("main", _environment, "the namespace all names live in")
    submit_timeout: float = _setting(30.0, _number(0.1, 3600), "seconds a call is submitted for before giving up")
    preview: bool = _setting(True, _flag, "write the start of the arguments (where they are JSON) beside a call")
    unpickle: bool = _setting(True, _flag, "read results that are pickles; pickles can run code")
    containers: int = _setting(0, _count(0), "containers a worker may run; 0 means 8 for each core")
    cpus: float = _setting(0.0, _number(0, 4096), "cores that containers may claim by `cpu=`; 0: the machine's")
    memory: int = _setting(0, _count(0), "MiB that containers may claim by `memory=`; 0: the machine's")
    labels: str = _setting("", _labels, "what functions may ask of a worker, such as gpu=l4,zone=a")
    apt_install: bool = _setting(
        False,
        _flag,
        "let a worker install the Debian packages that images name: as root, or by a sudo that asks nothing",
    )
    images_size: int = _setting(
        10 << 30, parse_size, "bytes that environments of images may take on a machine; the least used ones go"
    )
    grace: float = _setting(30.0, _number(0, 86_400), "seconds a stopping worker gives running calls")
    cancel_grace: float = _setting(30.0, _number(0, 3600), "seconds a cancelled or late call has for its `finally`")
    crash_budget: int = _setting(3, _count(1), "containers or workers an input may lose before it fails")
    caller_silence: float = _setting(
        60.0, _number(8, 3600), "seconds after which a silent client that waits in `remote` is dead; same everywhere"
    )
    slot_ttl: int = _setting(
        30, _count(2), "seconds until a dead worker's part of `max_containers` is free; same everywhere"
    )
    sweep_interval: float = _setting(60.0, _number(0.1, 3600), "seconds between looks for calls nobody would run")
    max_age: float = _setting(MAX_RESULT_AGE, _number(1, 10 * 365 * 86_400), "seconds results are kept; used by init")
    ack_wait: float = _setting(15.0, _number(1, 300), "seconds until the calls of a dead worker move; used by init")
    calls_size: int = _setting(0, parse_size, "bytes reserved for queued calls; 0: a quarter of what is free")
    results_size: int = _setting(0, parse_size, "bytes reserved for results; 0: a quarter of what is free")
    logs_size: int = _setting(0, parse_size, "bytes reserved for logs; 0: a twentieth of what is free")
    dead_size: int = _setting(0, parse_size, "bytes reserved for dead letters; 0: a twentieth of what is free")
    blobs_size: int = _setting(0, parse_size, "bytes reserved for large payloads; 0: a quarter of what is free")
    payload_limit: int = _setting(1 << 30, parse_size, "bytes that arguments or a result may have; same everywhere")
    replicas: int = _setting(1, _count(1), "copies of every stream, on a cluster; used by init")
    sync: str = _setting(
        "always", _one_of("always", "1s", "2m"), "when `mesh up` writes to disk: `always` is before it confirms"
    )
    nats_server: str = _setting("", _text, "path of the nats-server program; empty: the one installed with mesh")
    data_dir: Path = _setting(lambda: _home("XDG_DATA_HOME", ".local/share"), _path, "what `mesh up` keeps")
    cache_dir: Path = _setting(lambda: _home("XDG_CACHE_HOME", ".cache"), _path, "unpacked code; safe to delete")
    state_dir: Path = _setting(lambda: _home("XDG_STATE_HOME", ".local/state"), _path, "where a running mesh is noted")
    secret_key_file: str = _setting(
        "", _text, "path of the private key of secrets, which workers need; empty: `secret.key` in data_dir"
    )
    log_format: str = _setting("text", _one_of("text", "json"), "how workers log")
    origins: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def load(cls, flags: Mapping[str, object] | None = None, start: Path | None = None) -> Settings:
        """The settings as they stand for this process.

        Args:
            flags: what a command was given; `None` values count as not given.
            start: where the search for `mesh.toml` begins; the working directory by default.

        Raises:
            InvalidError: a value makes no sense; the text names the setting, the value, and where it stands.
        """
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for origin, source in _sources(flags or {}, start or Path.cwd()):
            for name, raw in source.items():
                if name not in values:
                    values[name] = _read(name, raw, origin)
                    origins[name] = origin
        settings = cls(**values, origins=origins)
        return settings if settings.nats_url else settings._with_running()

    def _with_running(self) -> Settings:
        running = running_mesh(self.state_dir)
        if running is None:
            return self
        origin = f"mesh up, process {running['pid']}"
        changes = {name: running[name] for name in ("nats_url", "container_url") if not getattr(self, name)}
        return dataclasses.replace(self, **changes, origins={**self.origins, **dict.fromkeys(changes, origin)})

    def with_server(self) -> Settings:
        """These settings, if they say where the server is.

        Raises:
            ConnectionError: they do not, and no `mesh up` of this user runs.
            AuthError: this is a container that was given no way to call.
        """
        if not self.nats_url and os.environ.get("MESH_IS_REMOTE"):
            raise AuthError(
                "functions on this worker cannot call the mesh: its server wants credentials, and the worker has no "
                "MESH_CONTAINER_URL (setting container_url) to give to containers"
            )
        if not self.nats_url:
            raise ConnectionError(NO_SERVER)
        return self

    def origin(self, name: str) -> str:
        """Where a value came from."""
        return self.origins.get(name, "default")

    @property
    def key_file(self) -> Path:
        """Where the private key of secrets is, or would be."""
        return Path(self.secret_key_file).expanduser() if self.secret_key_file else self.data_dir / "secret.key"

    @property
    def safe_url(self) -> str:
        """The server's address without its password, for texts."""
        return ",".join(_without_password(part.strip()) for part in self.nats_url.split(","))


def _without_password(url: str) -> str:
    # By hand: a parser takes a `/` or `#` in a password for the end of the host, and so shows the password.
    scheme, given, rest = url.partition("://")
    host = (rest if given else url).rpartition("@")[2]
    return f"{scheme if given else 'nats'}://{host}"


FIELDS = {f.name: f for f in dataclasses.fields(Settings) if f.name != "origins"}


def _read(name: str, raw: object, origin: str) -> Any:
    try:
        return FIELDS[name].metadata["read"](raw)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidError(f"{name} = {raw!r} ({origin}): {error}") from None


def _sources(flags: Mapping[str, object], start: Path) -> list[tuple[str, Mapping[str, object]]]:
    """Where values may come from, the strongest first."""
    variables = {name: os.environ[f"MESH_{name.upper()}"] for name in FIELDS if f"MESH_{name.upper()}" in os.environ}
    sources: list[tuple[str, Mapping[str, object]]] = [("flag", {k: v for k, v in flags.items() if v is not None})]
    sources += [(f"MESH_{name.upper()}", {name: value}) for name, value in variables.items()]
    nearest = next((path for folder in (start, *start.parents) if (path := folder / "mesh.toml").is_file()), None)
    personal = _home("XDG_CONFIG_HOME", ".config") / "mesh.toml"
    files = [file for file in (nearest, personal) if file is not None and file.is_file()]
    return [*sources, *((str(file), _read_toml(file)) for file in files)]


def _read_toml(path: Path) -> dict[str, object]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidError(f"{path} cannot be read: {error}") from None
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise InvalidError(f"{path}: no setting is called {unknown[0]!r}; there are {', '.join(FIELDS)}")
    return values


# --- the running `mesh up` of this user ------------------------------------------------------------------------------


def running_mesh(state_dir: Path) -> dict[str, Any] | None:
    """What the running `mesh up` of this user wrote of itself: nats_url, container_url, pid, sync; `None` if none."""
    try:
        values: dict[str, Any] = json.loads((state_dir / "up.json").read_text())
        os.kill(values["pid"], 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values


def note_running(state_dir: Path, values: Mapping[str, Any] | None) -> None:
    """Write down (or forget, with `None`) how this user's programs reach the running mesh. Holds its passwords."""
    path = state_dir / "up.json"
    if values is None:
        path.unlink(missing_ok=True)
        return
    state_dir.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(dict(values), file)
    fresh.replace(path)
