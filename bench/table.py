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


def spread(values: Sequence[float]) -> str:
    """The median, and in brackets the lowest and the highest, to three figures."""
    texts = [
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (statistics.median(values), min(values), max(values))
    ]
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]}–{texts[2]})"


def put(file: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines into a document, between two marks that stay there."""
    begin, end = f"<!-- {name}: made by the command -->", f"<!-- end of {name} -->"
    before, found, rest = file.read_text().partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{file} has no place for {name}: it needs the lines {begin!r} and {end!r}")
    file.write_text("\n".join([before + begin, "", *lines, end]) + rest.partition(end)[2])


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
