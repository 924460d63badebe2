"""What was measured, kept in a file after every step, so that a run that was broken off can go on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIGITS = 4


@dataclass(slots=True)
class Results:
    """Values by contestant and figure, one for each round.

    Args:
        runs: about each start of the command that added something: machine, versions, sizes. rounds: how many each
            figure of a contestant has behind it. missing: contestants that do not take part, and why. broken: figures
            that could not be measured, and why.
    """

    file: Path
    runs: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, dict[str, int]] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    chaos: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    broken: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Results:
        return cls(file, **json.loads(file.read_text()))

    def add(self, key: str, values: dict[str, float]) -> None:
        """One round of some figures of a contestant."""
        kept = self.values.setdefault(key, {})
        for name, value in values.items():
            kept.setdefault(name, []).append(float(f"{value:.{DIGITS}g}"))

    def save(self) -> None:
        """Whole or not at all."""
        names = ("runs", "versions", "rounds", "values", "chaos", "missing", "broken")
        parts = [f'"{name}": {json.dumps(getattr(self, name))}' for name in names]
        new = self.file.with_suffix(".new")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text("{" + ",\n".join(parts) + "}\n")
        new.replace(self.file)
