"""Figures over time as an SVG: panels above each other, each with stacked steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT, _TOP, _PANEL, _GAP, _BOTTOM = 900, 60, 20, 78, 150, 34, 44
_STYLE = 'font-family="sans-serif" font-size="12" fill="#333"'
_COLORS = ("#3b6fb5", "#e0913a", "#5a9c5a", "#a05aa0")


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: what it shows, and its series, stacked, each with its name."""

    title: str
    series: Sequence[tuple[str, Sequence[float]]]


def chart(title: str, times: Sequence[float], panels: Sequence[Panel], marks: Sequence[tuple[float, str]]) -> str:
    """The SVG. `marks` are moments with what begins there."""
    height = _TOP + len(panels) * (_PANEL + _GAP) - _GAP + _BOTTOM
    last = times[-1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {_STYLE}>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    bottom = height - _BOTTOM
    for number, (moment, name) in enumerate(marks):
        x, y = _x(moment, last), 42 + 13 * (number % 2)
        parts.append(f'<path d="M{x} 34V{bottom}" stroke="#bbb" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{y}" fill="#777">{escape(name)}</text>')
    for number, panel in enumerate(panels):
        parts += _panel(panel, times, _TOP + number * (_PANEL + _GAP))
    parts += [
        f'<text x="{_x(second, last)}" y="{bottom + 18}" text-anchor="middle">{second}</text>'
        for second in range(0, int(last) + 1, 10)
    ]
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 34}" text-anchor="end">seconds</text></svg>')
    return "\n".join(parts) + "\n"


def _x(moment: float, last: float) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * moment / last, 1)


def _panel(panel: Panel, times: Sequence[float], top: int) -> list[str]:
    sums = [0.0] * len(times)
    layers: list[tuple[list[float], list[float]]] = []
    for _, values in panel.series:
        above = [low + value for low, value in zip(sums, values, strict=True)]
        layers.append((sums, above))
        sums = above
    highest = max(max(sums), 1.0)
    base = top + _PANEL

    def y(value: float) -> float:
        return round(base - _PANEL * value / highest, 1)

    parts = [f'<text x="{_LEFT}" y="{top - 4}" font-weight="bold">{escape(panel.title)}</text>']
    for value in sorted({0.0, highest / 2, highest}):
        parts.append(f'<path d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    for number, (low, high) in enumerate(layers):
        color = _COLORS[number % len(_COLORS)]
        forth = _steps(times, [y(value) for value in high])
        back = _steps(times, [y(value) for value in low])[::-1]
        points = " ".join(f"{x},{value}" for x, value in [*forth, *back])
        parts.append(f'<polygon points="{points}" fill="{color}" fill-opacity="0.75"/>')
        if len(layers) > 1:
            name, x = panel.series[number][0], _WIDTH - _RIGHT - 70 * (len(layers) - number)
            parts.append(f'<text x="{x}" y="{top - 4}" fill="{color}">{escape(name)}</text>')
    return parts


def _steps(times: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Each value holds until the next one."""
    points: list[tuple[float, float]] = []
    for moment, value in zip(times, values, strict=True):
        x = _x(moment, times[-1])
        if points and points[-1][1] != value:
            points.append((x, points[-1][1]))
        points.append((x, value))
    same = [points[n - 1][1] == points[n][1] == points[n + 1][1] for n in range(1, len(points) - 1)]
    return [point for point, left_out in zip(points, [False, *same, False], strict=True) if not left_out]
