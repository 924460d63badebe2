"""How figures are shown: a small table under a line about the machine, and the same as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import machine


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: the median of what was measured, the lowest and the highest, and what it is beside something else."""

    what: str
    median: float
    low: float
    high: float
    ratio: float | None = None


def row(what: str, values: Sequence[float], ratios: Sequence[float] = ()) -> Row:
    ratio = statistics.median(ratios) if ratios else None
    return Row(what, statistics.median(values), min(values), max(values), ratio)


def show(title: str, rows: Sequence[Row], file: Path | None) -> None:
    """Print a table; write it to `file` as JSON, too, where one is given."""
    about = machine.about()
    print(title)
    print(" · ".join(f"{name} {value}" for name, value in about.items()))
    width = max(len(one.what) for one in rows)
    for one in rows:
        spread = "" if one.low == one.high else f"({one.low:,.2f} – {one.high:,.2f})"
        ratio = "" if one.ratio is None else f"{one.ratio:.2f} × raw"
        print(f"{one.what:<{width}} {one.median:>12,.2f}   {spread:<24} {ratio}".rstrip())
    if file is not None:
        file.write_text(json.dumps({"title": title, "about": about, "rows": [asdict(one) for one in rows]}, indent=1))
