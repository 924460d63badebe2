"""How a function answers HTTP requests, as it is recorded, and the names by which it is found on the web. No I/O."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mesh.exception import InvalidError

DEV = "-dev"  # what names of an app of a single run end with on the web: it hides no deployed one

_LONGEST = 63  # characters of a label of a host's name
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_DOMAIN = re.compile(rf"{_LABEL.pattern}(?:\.{_LABEL.pattern})+")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSpec:
    """How a function, or a method of a class, answers requests.

    Attributes:
        kind: `asgi`, `wsgi`, `fastapi` or `server`.
        label: the first part of the host's name that means it; empty for one made of its app's name and its own.
        domains: whole names of hosts that mean it, too.
        protected: only who shows a proxy token is let in.
    """

    kind: str
    label: str = ""
    domains: tuple[str, ...] = ()
    protected: bool = False

    def hosts(self, app: str, name: str, function: str) -> list[str]:
        """What of a host's name means it: a label, and whole names. Those of an app of a single run end with `-dev`.

        Args:
            app: its app's name on the wire. name: the one for people.
        """
        if app.startswith("ap-"):
            return [_shortened((self.label or f"{name}-{function}") + DEV)]
        return [_shortened(self.label or f"{app}-{function}"), *self.domains]

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WebSpec:
        known = {name: values[name] for name in ("kind", "label", "protected") if name in values}
        return cls(**known, domains=tuple(values.get("domains", ())))


def _shortened(text: str) -> str:
    """A label out of names: small letters, digits and hyphens; the end of one that is too long is a digest."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(label) <= _LONGEST:
        return label
    return f"{label[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_label(decorator: str, label: object) -> str:
    """`label`, if a host's name may begin with it."""
    if label is None:
        return ""
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise InvalidError(
            f"{decorator}: label must be 1 to 63 small letters, digits and hyphens, none of these at an end, not "
            f"{label!r}"
        )
    return label


def check_domains(decorator: str, domains: object) -> tuple[str, ...]:
    """`domains`, if they are names of hosts."""
    if domains is None:
        return ()
    found = () if isinstance(domains, str) or not isinstance(domains, Iterable) else tuple(domains)
    if not found or not all(isinstance(domain, str) and _DOMAIN.fullmatch(domain) for domain in found):
        raise InvalidError(
            f"{decorator}: custom_domains must be a list of names such as ['jobs.example.com'], in small letters, not "
            f"{domains!r}"
        )
    return found
