"""Values without I/O: what a function is (FunctionSpec), how it is retried and scheduled, and what is allowed.

Every value checks itself when it is made, and its error states the legal range. Times are seconds, as floats.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import sys
import zoneinfo
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mesh.exception import InvalidError
from mesh.imagespec import ImageSpec
from mesh.labels import check_labels, parse_gpu
from mesh.parameters import Parameter
from mesh.secretref import SecretRef, check_env
from mesh.webspec import WebSpec

DAY = 86_400.0
MAX_RESULT_AGE = 7 * DAY  # how long Modal keeps the result of a spawn; the default of an environment here

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ENVIRONMENT = re.compile(r"[a-z0-9-]{1,32}")


def check_name(kind: str, name: object) -> str:
    """`name`, if it may name an app or a function (`kind` says which, for the error)."""
    if not isinstance(name, str):
        raise InvalidError(f"{kind} name must be a string, not {type(name).__name__}: {name!r}")
    if not _NAME.fullmatch(name):
        raise InvalidError(
            f"{kind} name {name!r} is not allowed: 1 to 64 characters out of letters, digits, dot, underscore, hyphen"
        )
    return name


def check_app_name(name: object) -> str:
    """`name`, if an app may be called so: `ap-…` is how apps of a single run are told apart on the wire."""
    checked = check_name("app", name)
    if checked.startswith("ap-"):
        raise InvalidError(f"app name {checked!r} is not allowed: names starting with 'ap-' are those of single runs")
    return checked


def check_environment(name: str) -> str:
    """`name`, if an environment may be called so."""
    if not _ENVIRONMENT.fullmatch(name):
        raise InvalidError(
            f"environment name {name!r} is not allowed: 1 to 32 characters out of small letters, digits, hyphen"
        )
    return name


def check_number(option: str, value: object, low: float, high: float, *, whole: bool = False) -> float:
    """`value`, if it is a number (a whole one, if asked) from `low` to `high`, both included."""
    kind = "a whole number" if whole else "a number"
    limit = f"from {low:g} to {high:g}" if high != math.inf else f"of at least {low:g}"
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right_type or not low <= value <= high or value == math.inf:  # type: ignore[operator]  # a number by now
        raise InvalidError(f"{option} must be {kind} {limit}, not {value!r}")
    return value  # type: ignore[return-value]


def check_whole(option: str, value: object, low: int, high: float) -> int:
    """`value`, if it is a whole number from `low` to `high`, both included."""
    return int(check_number(option, value, low, high, whole=True))


def check_concurrency(max_inputs: object, target_inputs: object) -> None:
    """Refuse what cannot be the number of inputs that a container runs at once, or is to run."""
    limit = check_whole("max_inputs", max_inputs, 1, math.inf)
    if target_inputs is not None and check_whole("target_inputs", target_inputs, 1, math.inf) > limit:
        raise InvalidError(f"target_inputs ({target_inputs}) must not be above max_inputs ({max_inputs})")


def check_batching(max_batch_size: object, wait_ms: object) -> None:
    """Refuse what cannot be the size of a batch, or the milliseconds it waits to be full."""
    check_whole("max_batch_size", max_batch_size, 1, 1000)
    check_whole("wait_ms", wait_ms, 0, 600_000)


class Retries:
    """How often, and after what delay, a failed input is tried again.

    The delay before retry n (from 1) is ``initial_delay * backoff_coefficient ** (n - 1)``, at most `max_delay`, at
    least `min_delay`. A cancelled call is never retried; a lost container is tried again outside this count.

    Args:
        max_retries: tries after the first one; 0 or more.
        backoff_coefficient: growth of the delay from one retry to the next; 1.0 to 10.0.
        initial_delay: seconds before the first retry; 0 to 60, as in Modal.
        max_delay: the longest delay in seconds; 1 to 604,800 (seven days; Modal allows 60).
        min_delay: the shortest delay in seconds; 0 to 60. Modal's floor of one second is the default.
        jitter: share of the delay (0.0 to 1.0) that is random, so that many retries do not come at once; what it takes
            away stops at `min_delay`.
        retry_on: exception classes that are retried; empty means all of them.
        abort_on: exception classes that are never retried; looked at before `retry_on`.

    Raises:
        InvalidError: a value outside its range; the text states the range.
    """

    __slots__ = (
        "abort_on",
        "backoff_coefficient",
        "initial_delay",
        "jitter",
        "max_delay",
        "max_retries",
        "min_delay",
        "retry_on",
    )

    def __init__(
        self,
        *,
        max_retries: int,
        backoff_coefficient: float = 2.0,
        initial_delay: float = 1.0,
        max_delay: float = 60.0,
        min_delay: float = 1.0,
        jitter: float = 0.0,
        retry_on: type[BaseException] | Sequence[type[BaseException] | str] = (),
        abort_on: type[BaseException] | Sequence[type[BaseException] | str] = (),
    ) -> None:
        self.max_retries = check_whole("Retries: max_retries", max_retries, 0, math.inf)
        self.backoff_coefficient = check_number("Retries: backoff_coefficient", backoff_coefficient, 1.0, 10.0)
        self.initial_delay = check_number("Retries: initial_delay", initial_delay, 0, 60)
        self.max_delay = check_number("Retries: max_delay", max_delay, 1, 7 * DAY)
        self.min_delay = check_number("Retries: min_delay", min_delay, 0, 60)
        self.jitter = check_number("Retries: jitter", jitter, 0.0, 1.0)
        self.retry_on = _exception_names("retry_on", retry_on)
        self.abort_on = _exception_names("abort_on", abort_on)

    def delay(self, retry: int, chance: float | None = None) -> float:
        """Seconds to wait before `retry` (from 1). `chance`, 0 to 1, stands in for the random number of the jitter."""
        try:
            growth = float(self.backoff_coefficient) ** (retry - 1)
        except OverflowError:  # after some hundred retries, which take hours only
            growth = sys.float_info.max
        share = random.random() if chance is None else chance
        delay = min(self.initial_delay * growth, self.max_delay) * (1 - self.jitter * share)
        return max(delay, self.min_delay)

    def covers(self, bases: Sequence[str]) -> bool:
        """Whether an exception is retried, told by the qualified names of its class and all its bases."""
        if any(name in self.abort_on for name in bases):
            return False
        return not self.retry_on or any(name in self.retry_on for name in bases)

    def with_main_as(self, module: str) -> Retries:
        """The same, for processes that import as `module` what runs as `__main__` here."""
        values = self.to_json()
        for option in ("retry_on", "abort_on"):
            values[option] = [re.sub(r"^__main__\.", f"{module}.", name) for name in values[option]]
        return Retries(**values)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Retries) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.max_retries, self.backoff_coefficient, self.initial_delay, self.max_delay))

    def __repr__(self) -> str:
        return f"Retries({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


def qualified_name(cls: type) -> str:
    """The name a class is known by across processes: `module.qualname`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _exception_names(option: str, value: object) -> tuple[str, ...]:
    classes = (value,) if isinstance(value, type) else value
    if isinstance(classes, str) or not isinstance(classes, Iterable):  # the characters of a text would match nothing
        raise InvalidError(f"Retries: {option} takes exception classes, not {value!r}")
    names: list[str] = []
    for cls in classes:
        if isinstance(cls, str):
            names.append(cls)
        elif isinstance(cls, type) and issubclass(cls, BaseException):
            names.append(qualified_name(cls))
        else:
            raise InvalidError(f"Retries: {option} takes exception classes, not {cls!r}")
    return tuple(names)


def parse_retries(value: object) -> Retries | None:
    """`retries=` as the decorators take it: a whole number means that many tries more, one second apart."""
    if value is None or isinstance(value, Retries):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidError(f"retries must be a whole number of at least 0, a mesh.Retries or None, not {value!r}")
    count = check_whole("retries", value, 0, math.inf)
    return Retries(max_retries=count, backoff_coefficient=1.0, initial_delay=1.0) if count else None


_CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_CRON_NAMES = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "day of week": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}
_CRON_PART = re.compile(r"(\*|\w+(?:-\w+)?)(?:/(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Cron:
    """Runs a function at the times of a five-field cron line, in a time zone.

    Args:
        cron_string: minute, hour, day of month, month, day of week; `*`, lists, ranges, steps and English names.
        timezone: an IANA name such as `Europe/Berlin`; UTC by default.

    Raises:
        InvalidError: not five fields, a value out of range, or no such zone.
    """

    cron_string: str
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        fields = self.cron_string.split()
        if len(fields) != len(_CRON_FIELDS):
            raise InvalidError(
                f"Cron({self.cron_string!r}) needs five fields: minute, hour, day of month, month, day of week"
            )
        for text, (field, low, high) in zip(fields, _CRON_FIELDS, strict=True):
            for part in text.split(","):
                self._check_part(part, field, low, high)
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # OSError: a directory of zones, a name too long
            raise InvalidError(
                f"Cron: no time zone {self.timezone!r}; use an IANA name such as 'Europe/Berlin'"
            ) from None

    def _check_part(self, part: str, field: str, low: int, high: int) -> None:
        match = _CRON_PART.fullmatch(part)
        values = [-1] if match is None else [_cron_value(v, field) for v in match[1].split("-") if v != "*"]
        step_fits = match is not None and (match[2] is None or 0 < int(match[2]) <= high)
        if values != sorted(values) or not step_fits or any(not low <= v <= high for v in values):
            raise InvalidError(f"Cron({self.cron_string!r}): {part!r} is no {field}; {low} to {high}, *, a-b, */n")


def _cron_value(text: str, field: str) -> int:
    """The number of a cron value; -1, which fits no field, for what is none."""
    names = _CRON_NAMES.get(field, [])
    if text.lower() in names:
        return names.index(text.lower()) + (1 if field == "month" else 0)
    return int(text) if text.isdigit() else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """Runs a function every so often, counted from its deploy. Parts add up; together they must be above zero."""

    years: int = 0
    months: int = 0
    weeks: int = 0
    days: int = 0
    hours: int = 0
    minutes: int = 0
    seconds: float = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_number(f"Period: {field.name}", value, 0, math.inf, whole=field.name != "seconds")
        if not any(getattr(self, field.name) for field in dataclasses.fields(self)):
            raise InvalidError("Period() needs at least one part above zero, for example Period(minutes=5)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """What a method of a class has for itself; everything else is the class's.

    Attributes:
        is_generator: it yields. web: how it answers HTTP requests; `None` where it does not.
    """

    is_generator: bool = False
    web: WebSpec | None = None

    def to_json(self) -> dict[str, Any]:
        generator = {"is_generator": True} if self.is_generator else {}
        return generator if self.web is None else {**generator, "web": self.web.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MethodSpec:
        web = WebSpec.from_json(values["web"]) if "web" in values else None
        return cls(is_generator=values.get("is_generator", False), web=web)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """What the mesh must know of a function to run it: the options of `@app.function`, checked.

    Attributes:
        timeout: seconds one try may run, 1 to 86,400; queueing and start-up do not count.
        startup_timeout: seconds for imports and set-up of a container; `None` means `timeout`.
        retries: how failures are tried again; `None` means they are not.
        min_containers, max_containers, buffer_containers: bounds of the pool; `max_containers=None` means no bound.
        scaledown_window: seconds an idle container is kept.
        single_use_containers: a container runs one input, then ends.
        max_uses: inputs a container runs before another takes its place; `None` means any number.
        recycle_memory: MiB; another takes the place of a container that holds more after an input; `None`: no matter.
        max_inputs: inputs a container runs at once. target_inputs: inputs it is to run at once, which decides how many
            containers are wanted; `None` means `max_inputs`.
        max_batch_size: inputs that one run takes together; `None` means that there are no batches.
        wait_ms: milliseconds that the first input of a batch waits for others.
        cpu: cores a container claims of its worker; `None` means no claim.
        memory: MiB a container claims, and it and what it starts may use; it is killed above that. `None`: no limit.
        gpu: GPUs of which its worker must have one, by label: `l4`, or `l4:2,a10g`. labels: others it must have.
        result_ttl: seconds the result is kept, at most the environment's own; `None` means that.
        keep_result: `False` stores a success without its value, for an hour.
        detach: a `remote` goes on when its client dies.
        env: variables set in the container. secrets: where others come from; of two with one name the later counts, and
            `env` last.
        methods: of a class, by name; `None` for a function. parameters: of a class that declares any, or nothing to
            construct it with; `None` for one with an `__init__` of its own, and for a function.
        web: how it answers HTTP requests; `None` where it does not, and for a class, whose methods say it.
    """

    name: str
    timeout: float = 300.0
    startup_timeout: float | None = None
    retries: Retries | None = None
    min_containers: int = 0
    max_containers: int | None = None
    buffer_containers: int = 0
    scaledown_window: float = 60.0
    single_use_containers: bool = False
    max_inputs: int = 1
    target_inputs: int | None = None
    max_batch_size: int | None = None
    wait_ms: int = 0
    cpu: float | None = None
    memory: int | None = None
    result_ttl: float | None = None
    keep_result: bool = True
    detach: bool = False
    is_generator: bool = False
    env: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    max_uses: int | None = None
    recycle_memory: int | None = None
    gpu: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    methods: Mapping[str, MethodSpec] | None = None
    parameters: Mapping[str, Parameter] | None = None
    secrets: tuple[SecretRef, ...] = ()
    web: WebSpec | None = None
    image: ImageSpec | None = None

    def __post_init__(self) -> None:
        check_name("function", self.name)
        if "." in self.name:
            raise InvalidError(f"function name {self.name!r} is not allowed: only methods have a dot, Class.method")
        check_number("timeout", self.timeout, 1, DAY)
        if self.startup_timeout is not None:
            check_number("startup_timeout", self.startup_timeout, 1, DAY)
        if self.retries is not None and self.is_generator:
            raise InvalidError(f"retries cannot be used on the generator function {self.name!r}")
        if self.detach and self.is_generator:
            raise InvalidError(
                f"detach cannot be used on the generator function {self.name!r}: only its caller reads it"
            )
        self._check_containers()
        self._check_inputs()
        self._check_results()
        if self.web is not None:
            self._check_web()
        check_env(self.env)
        parse_gpu(self.gpu)
        check_labels("labels", self.labels)

    def _check_containers(self) -> None:
        check_whole("min_containers", self.min_containers, 0, math.inf)
        check_whole("buffer_containers", self.buffer_containers, 0, math.inf)
        check_number("scaledown_window", self.scaledown_window, 1, DAY)
        if self.max_containers is not None:
            check_whole("max_containers", self.max_containers, 1, math.inf)
            if self.min_containers > self.max_containers:
                raise InvalidError(
                    f"min_containers ({self.min_containers}) must not be above max_containers ({self.max_containers})"
                )
        if self.max_uses is not None:
            check_whole("max_uses", self.max_uses, 1, math.inf)
        if self.recycle_memory is not None:
            check_whole("recycle_memory", self.recycle_memory, 16, math.inf)
        if self.cpu is not None:
            check_number("cpu", self.cpu, 0.01, 1024)
        if self.memory is not None:
            check_whole("memory", self.memory, 16, math.inf)

    def _check_inputs(self) -> None:
        check_concurrency(self.max_inputs, self.target_inputs)
        if self.single_use_containers and self.max_inputs > 1:
            raise InvalidError(
                f"single_use_containers and max_inputs={self.max_inputs} exclude each other: a container that runs one "
                "input, then ends, never has several"
            )
        if self.max_batch_size is not None:
            check_batching(self.max_batch_size, self.wait_ms)
            if self.is_generator:
                raise InvalidError(f"the generator function {self.name!r} cannot be batched")

    def _check_results(self) -> None:
        if self.result_ttl is not None:
            check_number("result_ttl", self.result_ttl, 60, MAX_RESULT_AGE)
        for option in ("single_use_containers", "keep_result", "detach", "is_generator"):
            if not isinstance(getattr(self, option), bool):
                raise InvalidError(f"{option} must be True or False, not {getattr(self, option)!r}")

    def _check_web(self) -> None:
        refused = {
            "retries": self.retries,
            "is_generator": self.is_generator,
            "@mesh.batched()": self.max_batch_size,
        }
        for option, value in refused.items():
            if value:
                raise InvalidError(f"{option} cannot be used on the web function {self.name!r}: it answers requests")

    @property
    def batch_size(self) -> int:
        """Inputs that one run takes at most."""
        return self.max_batch_size or 1

    @property
    def inputs_wanted(self) -> int:
        """Inputs that a container is to have, running: the number of containers is chosen for that."""
        return (self.target_inputs or self.max_inputs) * self.batch_size

    @property
    def start_limit(self) -> float:
        """Seconds a container may take to start."""
        return self.timeout if self.startup_timeout is None else self.startup_timeout

    @property
    def may_yield(self) -> bool:
        """Whether it is a generator, or a class that has one among its methods."""
        return self.is_generator or any(method.is_generator for method in (self.methods or {}).values())

    @property
    def webs(self) -> dict[str, WebSpec]:
        """What of it answers HTTP requests, by its name: the function itself, or methods of the class."""
        if self.web is not None:
            return {self.name: self.web}
        methods = (self.methods or {}).items()
        return {f"{self.name}.{name}": method.web for name, method in methods if method.web is not None}

    def yields(self, method: str = "") -> bool:
        """Whether the function, or a method of the class, is a generator."""
        return self.methods[method].is_generator if self.methods is not None else self.is_generator

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that a new option changes no existing record or version."""
        values: dict[str, Any] = {"name": self.name}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            default = {} if field.name in ("env", "labels") else field.default
            if value != default:
                values[field.name] = option_to_json(field.name, value)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FunctionSpec:
        """The inverse of `to_json`; options of newer versions are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        options = {name: value for name, value in values.items() if name in known}
        if options.get("retries") is not None:
            retries = options["retries"]
            options["retries"] = Retries(**{name: retries[name] for name in Retries.__slots__ if name in retries})
        if options.get("image") is not None:
            options["image"] = ImageSpec.from_json(options["image"])
        if "secrets" in options:
            options["secrets"] = tuple(SecretRef.from_json(secret) for secret in options["secrets"])
        if options.get("web") is not None:
            options["web"] = WebSpec.from_json(options["web"])
        for name, kind in _PARTS.items():
            if options.get(name) is not None:
                options[name] = {key: kind.from_json(part) for key, part in options[name].items()}
        return cls(**options)


_PARTS: dict[str, type[MethodSpec] | type[Parameter]] = {"methods": MethodSpec, "parameters": Parameter}


def option_to_json(option: str, value: Any) -> Any:
    """An option of a spec as records have it."""
    if option == "secrets":
        return [secret.to_json() for secret in value]
    if option in _PARTS:
        return {name: part.to_json() for name, part in value.items()}
    return value.to_json() if isinstance(value, Retries | WebSpec | ImageSpec) else value
