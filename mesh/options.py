"""Options as users write them, read into those of a `FunctionSpec`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mesh.exception import DeprecationError, InvalidError
from mesh.image import Image
from mesh.imagespec import ImageSpec
from mesh.labels import parse_gpu
from mesh.secret import Secret
from mesh.secretref import SecretRef
from mesh.spec import DAY, Retries, check_number, check_whole, parse_retries

_warned: set[str] = set()

# Options that only a cloud has: taken, so that code written for Modal runs, and told once that they do nothing here.
_CLOUD_OPTIONS = (
    "block_network",
    "cloud",
    "enable_memory_snapshot",
    "ephemeral_disk",
    "experimental_options",
    "i6pn",
    "nonpreemptible",
    "proxy",
    "region",
    "restrict_modal_access",
    "routing_region",
)

_RENAMED_OPTIONS = {
    "concurrency_limit": "max_containers",
    "container_idle_timeout": "scaledown_window",
    "keep_warm": "min_containers",
    "allow_concurrent_inputs": "@mesh.concurrent(max_inputs=…)",
    "interactive": "",
    "mounts": "image.add_local_dir(…)",
}

_SPEC_OPTIONS = (
    *("timeout", "startup_timeout", "retries", "cpu", "memory", "gpu", "labels", "env", "secrets", "image"),
    *("min_containers", "max_containers", "buffer_containers", "scaledown_window", "single_use_containers"),
    *("recycle_memory", "result_ttl", "keep_result", "detach"),
)


def read_options(decorator: str, given: Mapping[str, Any], old: Mapping[str, object]) -> dict[str, Any]:
    """What was given to `@app.function` or `@app.cls`; options that are `None` are left out.

    Args:
        given: by name. old: what else was given, which is nothing, or an option that had another name once.

    Raises:
        InvalidError: a value that cannot be one. DeprecationError, TypeError: an old option, or none at all.
    """
    _refuse_old(decorator, old)
    _warn_of_cloud_options(given)
    check_number("timeout", given["timeout"], 1, DAY)  # here, where `None` is not left out
    options = parse_options({name: given[name] for name in _SPEC_OPTIONS})
    if (max_inputs := given["max_inputs"]) is not None:
        check_whole("max_inputs", max_inputs, 1, math.inf)
        if max_inputs == 1:
            warnings.warn("max_inputs=1 is old; use single_use_containers=True", DeprecationWarning, stacklevel=3)
            options["single_use_containers"] = True
        else:
            options["max_uses"] = max_inputs
    return options


def read_variant_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given to `with_options`."""
    _warn_of_cloud_options(given)
    options = parse_options({name: value for name, value in given.items() if name in _SPEC_OPTIONS})
    # What is left out stays as it is, so no retries must be said.
    return {**options, "retries": Retries(max_retries=0)} if given.get("retries") == 0 else options


def parse_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a spec takes them; those that are `None` are left out.

    Raises:
        InvalidError: a value that cannot be one.
    """
    read = {name: _READERS[name](value) if name in _READERS else value for name, value in given.items()}
    return {name: value for name, value in read.items() if value is not None}


def _limit(value: Any) -> Any:
    """Of Modal's pair, request and limit, the limit counts."""
    return value[1] if isinstance(value, tuple) else value


def _variables(value: Mapping[str, str | None] | None) -> dict[str, str] | None:
    return None if value is None else {key: text for key, text in value.items() if text is not None}


def _secrets(value: Any) -> tuple[SecretRef, ...] | None:
    given: list[Any] = [value] if isinstance(value, Secret) else list(value or ())
    for secret in given:
        if not isinstance(secret, Secret):
            raise InvalidError(f"secrets must be a list of mesh.Secret, and {secret!r} is none")
    return tuple(secret.ref for secret in given) or None


def _image(value: Any) -> ImageSpec | None:
    if value is not None and not isinstance(value, Image):
        raise InvalidError(f"image must be a mesh.Image, not {value!r}")
    return None if value is None else value.spec


_READERS: dict[str, Callable[[Any], Any]] = {
    "retries": parse_retries,
    "gpu": parse_gpu,
    "cpu": _limit,
    "memory": _limit,
    "env": _variables,
    "secrets": _secrets,
    "image": _image,
}


def _refuse_old(decorator: str, old: Mapping[str, object]) -> None:
    for option in old:
        if option in _RENAMED_OPTIONS:
            new = _RENAMED_OPTIONS[option]
            raise DeprecationError(f"{option} is gone{f'; use {new}' if new else ''}")
        raise TypeError(f"{decorator}() has no option {option!r}")


def _warn_of_cloud_options(given: Mapping[str, object]) -> None:
    for option in _CLOUD_OPTIONS:
        if given.get(option) and option not in _warned:
            _warned.add(option)
            warnings.warn(f"{option}= does nothing here: only Modal's cloud has it", UserWarning, stacklevel=4)
