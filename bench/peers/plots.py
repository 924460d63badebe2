"""Pictures of the figures, as SVG: bars, and lines over rates on logarithmic scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = 'font-family="sans-serif" font-size="12" fill="#333"'
_COLORS = (
    "#3b6fb5",
    "#e0913a",
    "#5a9c5a",
    "#a05aa0",
    "#c0504d",
    "#4bacc6",
    "#8a6d3b",
    "#777",
    "#b0b04f",
    "#333",
    "#6a51a3",
    "#d6616b",
    "#637939",
)
_OURS, _OTHERS = "#3b6fb5", "#b9c4d3"


@dataclass(frozen=True, slots=True)
class Bars:
    """One panel: a value and its lowest and highest for each name, the best one first. `ours`: the one that stands "
    "out."""

    title: str
    values: Sequence[tuple[str, float, float, float]]
    ours: str


def bars(panels: Sequence[Bars]) -> str:
    """Panels beside each other."""
    width, left, row, top = 330, 120, 20, 36
    height = top + row * max(len(panel.values) for panel in panels) + 16
    parts = [_begin(width * len(panels), height)]
    for number, panel in enumerate(panels):
        x = width * number + left
        room = width - left - 66
        most = max(value for _, value, _, _ in panel.values) or 1.0
        parts.append(f'<text x="{x - left + 12}" y="20" font-weight="bold">{escape(panel.title)}</text>')
        for place, (name, value, low, high) in enumerate(panel.values):
            y = top + row * place
            color = _OURS if name == panel.ours else _OTHERS
            end = room * value / most
            parts.append(f'<text x="{x - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{x}" y="{y}" width="{end:.1f}" height="14" fill="{color}"/>')
            span = f"M{x + room * low / most:.1f} {y + 7}H{x + room * min(high, most) / most:.1f}"
            parts.append(f'<path d="{span}" stroke="#333" stroke-width="1.5"/>')
            parts.append(f'<text x="{x + room + 4}" y="{y + 11}">{value:,.4g}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def lines(title: str, across: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """One panel; both scales are logarithmic, since both go over orders of magnitude."""
    width, height, left, right, top, bottom = 860, 420, 60, 150, 40, 44
    xs = sorted({x for _, points in series for x, _ in points})
    ys = [y for _, points in series for _, y in points]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        along = (math.log10(x) - math.log10(xs[0])) / ((math.log10(xs[-1]) - math.log10(xs[0])) or 1.0)
        up = (math.log10(y) - low) / (high - low or 1)
        return round(left + along * (width - left - right), 1), round(height - bottom - up * (height - top - bottom), 1)

    parts = [_begin(width, height), f'<text x="{left}" y="22" font-weight="bold">{escape(title)}</text>']
    for power in range(low, high + 1):
        _, y = place(xs[0], 10.0**power)
        parts.append(f'<path d="M{left} {y}H{width - right}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for x in xs:
        parts.append(f'<text x="{place(x, 10.0**low)[0]}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{escape(across)}</text>')
    for number, (name, points) in enumerate(series):
        color = _COLORS[number % len(_COLORS)]
        where = [place(x, y) for x, y in points]
        drawn = " ".join(f"{x},{y}" for x, y in where)
        wide = 3 if number == 0 else 1.5
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="{wide}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in where]
        y = top + 18 * number
        parts.append(f'<path d="M{width - right + 12} {y}h18" stroke="{color}" stroke-width="{wide}"/>')
        parts.append(f'<text x="{width - right + 36}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _begin(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {_STYLE}>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    )
