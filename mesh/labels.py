"""What a worker is said to have, `gpu=l4` or `zone=a`, and what a function asks of it. Values without I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mesh.exception import InvalidError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_GPU = re.compile(r"([a-z0-9][a-z0-9._-]*)!?(?::([1-9][0-9]{0,2}))?")
ANY_GPU = "any"


def check_labels(option: str, labels: object) -> dict[str, str]:
    """`labels`, if they can be labels: names and values of 1 to 63 letters, digits, dots, slashes, hyphens."""
    if not isinstance(labels, Mapping):
        raise InvalidError(f"{option} must be a dict of names and values such as {{'zone': 'a'}}, not {labels!r}")
    for part in [*labels.keys(), *labels.values()]:
        if not isinstance(part, str) or not _NAME.fullmatch(part):
            raise InvalidError(
                f"{option}: {part!r} is not allowed: 1 to 63 characters out of letters, digits, dot, underscore, "
                "slash, hyphen, a letter or digit first"
            )
    return dict(labels)


def parse_labels(value: object) -> dict[str, str]:
    """Labels as settings give them: a table, or `name=value` one after the other, in a list or with commas.

    Raises:
        ValueError: they are none.
    """
    if isinstance(value, Mapping):
        pairs = dict(value)
    else:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, Iterable):
            raise ValueError("must be name=value, several with commas")
        texts = [text for part in parts if (text := str(part).strip())]
        if any("=" not in text for text in texts):
            raise ValueError("must be name=value, several with commas")
        pairs = {name.strip(): own.strip() for name, _, own in (text.partition("=") for text in texts)}
    try:
        return check_labels("labels", pairs)
    except InvalidError as error:
        raise ValueError(str(error)) from None


def parse_gpu(value: object) -> str | None:
    """`gpu=` as Modal takes it, as one text: `"L4"`, `"l4:2"`, or a list of which any will do → `l4:2,a10g`.

    Raises:
        InvalidError: it names no GPU.
    """
    if value is None or value == []:
        return None
    wanted = value.split(",") if isinstance(value, str) else value
    if not isinstance(wanted, Iterable):
        raise InvalidError(f"gpu must be a name such as 'l4' or 'l4:2', or a list of them, not {value!r}")
    names = []
    for one in wanted:
        match = _GPU.fullmatch(one.strip().lower()) if isinstance(one, str) else None
        if match is None:
            raise InvalidError(f"gpu: {one!r} names no GPU: write 'l4', 'l4:2' for two of them, or a list of these")
        names.append(match[1] if match[2] in (None, "1") else f"{match[1]}:{match[2]}")
    return ",".join(names)


def lacking(gpu: str | None, labels: Mapping[str, str], offered: Mapping[str, str]) -> str:
    """What a worker with these labels lacks for a function; empty if nothing.

    A GPU is what the label `gpu` names; several of them in one machine are said by `gpu.count`.
    """
    for name, value in labels.items():
        if offered.get(name) != value:
            return f"the label {name}={value}"
    if gpu is None or any(_has_gpu(one, offered) for one in gpu.split(",")):
        return ""
    return " or ".join(_gpu_labels(one) for one in gpu.split(","))


def _has_gpu(wanted: str, offered: Mapping[str, str]) -> bool:
    name, _, count = wanted.partition(":")
    own = offered.get("gpu", "").lower()
    number = offered.get("gpu.count", "1")
    return bool(own) and name in (own, ANY_GPU) and number.isdigit() and int(number) >= int(count or 1)


def _gpu_labels(wanted: str) -> str:
    name, _, count = wanted.partition(":")
    return f"the label gpu={name}{f' with gpu.count={count} or more' if count else ''}"
