"""What the values say: medians, who is ahead of whom, and sentences that follow from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peers.results import Results
from peers.roster import BY_NAME, ROSTER, Entry

MARGIN = 1.05
"""What differs by less counts as level."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One column. `name`: in the results. `why`: what mesh pays for, where somebody is ahead of it."""

    name: str
    title: str
    unit: str
    why: str
    more_is_better: bool = True

    @property
    def label(self) -> str:
        """Its title where it stands alone."""
        return {"cpu": "CPU for 1,000 calls", "cpu of workers": "CPU of the workers for 1,000 calls"}.get(
            self.name, f"round trip {self.title}" if self.title.startswith("p9") else self.title
        )

    def better(self, one: float, other: float) -> bool:
        """By enough to be worth a word."""
        return one > other * MARGIN if self.more_is_better else one * MARGIN < other


_ONE = (
    "A submission of mesh returns when the server has stored it, under a condition that makes a repeated one harmless, "
    "and with what a call needs to be found and cancelled by its id alone"
)
_THROUGH = (
    "A call of mesh goes from the worker to a container, a process of its own that can be interrupted and killed, and "
    "back; its result is stored under a condition, so that the first one counts, before the call is acknowledged"
)
_DISK = "JetStream keeps each call and each result as a message with its headers, and drops what ended by whole blocks"

SYNCS = (
    "Where stores write before they answer, JetStream waits for the disk for every message, or every batch of them, "
    "and Redis once for all commands that it has read from all its clients in one turn of its loop."
)

QUIET = 1.0
"""The load average of a machine that nobody else uses, at most."""

BUSY = (
    "Others used the machine while this was measured: it shows that everything runs, and what costs memory, CPU and "
    "disk; it does not show who is faster."
)

FIGURES = (
    Figure("submit one", "submit, one by one", "calls/s", _ONE),
    Figure("submit bulk", "submit in bulk", "calls/s", _ONE + "; each call of a bulk is one message of its own"),
    Figure("end to end", "end to end", "calls/s", _THROUGH),
    Figure("round trip p50", "round trip p50", "ms", _THROUGH, False),
    Figure("round trip p95", "p95", "ms", _THROUGH, False),
    Figure("round trip p99", "p99", "ms", _THROUGH, False),
    Figure("cpu", "cpu", "s", _THROUGH + ". CPU is counted of server, workers and client together", False),
    Figure("cpu of workers", "of which workers", "s", _THROUGH, False),
    Figure(
        "memory",
        "memory of the workers",
        "MB",
        "A worker of mesh is more processes: the worker itself, one that containers are forked from, and the "
        "containers",
        False,
    ),
    Figure("bytes queued", "on disk, a queued call", "B", _DISK, False),
    Figure("bytes ended", "on disk, a call that ended", "B", _DISK, False),
    Figure("cpu kind", "1 ms of CPU", "calls/s", _THROUGH),
    Figure("sleep", "100 ms of sleep", "calls/s", _THROUGH),
    Figure("big", "100 KB in and out", "calls/s", _THROUGH + "; both ways the payload is on the server's disk"),
    Figure(
        "failing",
        "one in 100 fails",
        "calls/s",
        _THROUGH + "; and what failed is kept, with its arguments, as a dead letter",
    ),
    Figure("knee", "highest rate sustained", "calls/s", _THROUGH),
)
FIGURE = {figure.name: figure for figure in FIGURES}


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some rounds, the lowest and the highest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def found(results: Results, name: str, durability: str, figure: str) -> Spread | None:
    """What a peer came to, if it was measured."""
    values = results.values.get(f"{name}/{durability}", {}).get(figure)
    return spread(values) if values else None


def rivals(results: Results, durability: str, figure: str) -> list[tuple[Entry, float]]:
    """The peers that have a figure, the best one first: queues that keep calls on disk, and not mesh."""
    known = FIGURE[figure]
    those = [
        (entry, one.median)
        for entry in ROSTER
        if not entry.pure and entry.name != "mesh" and entry.store != "dask"
        if (one := found(results, entry.name, durability, figure)) is not None
    ]
    return sorted(those, key=lambda pair: pair[1], reverse=known.more_is_better)


def ahead(results: Results, durability: str, figure: str) -> list[tuple[Entry, float]]:
    """Those of them that are better than mesh."""
    ours = found(results, "mesh", durability, figure)
    if ours is None:
        return []
    known = FIGURE[figure]
    return [(entry, value) for entry, value in rivals(results, durability, figure) if known.better(value, ours.median)]


def busy(results: Results) -> bool:
    """Whether others used the machine when a run began."""
    return any(float(run["load"].split()[0]) > QUIET for run in results.runs)


# --- sentences -------------------------------------------------------------------------------------------------------

_OF_README = ("end to end", "submit bulk", "submit one", "round trip p50", "knee", "cpu", "memory", "big")


def three_lines(results: Results) -> list[str]:
    """Where mesh is ahead, where it is not, and what came of killing things: for the README."""
    first, level, behind = [], [], []
    for name in _OF_README:
        others, ours = rivals(results, "second", name), found(results, "mesh", "second", name)
        if not others or ours is None:
            continue
        figure, [(best, value), *_] = FIGURE[name], others
        text = f"{figure.label} ({number(ours.median)} {figure.unit}; {best.title} {number(value)})"
        if figure.better(ours.median, value):
            first.append(text)
        else:
            (behind if figure.better(value, ours.median) else level).append(text)
    count = len({name.partition("/")[0] for name in results.values} - {"mesh", "raw", "dask"})
    tied = f" Level with the best of them: {listed(level)}." if level else ""
    return [
        f"- Ahead of the {count} other queues measured: {listed(first) or 'nowhere'}.{tied}",
        f"- Behind the best of them: {listed(behind) or 'nowhere'}.",
        f"- {chaos_line(results)}",
        *([f"- {BUSY}"] if busy(results) else []),
    ]


def chaos_line(results: Results) -> str:
    """What was lost, in one sentence."""
    ours = results.chaos.get("mesh/second")
    if ours is None:
        return "What is lost when things are killed was not measured."
    others = {
        BY_NAME[key.partition("/")[0]]: value["lost"] for key, value in results.chaos.items() if key != "mesh/second"
    }
    none = [entry.title for entry, lost in others.items() if not lost]
    some = [f"{entry.title} {number(lost)}" for entry, lost in others.items() if lost]
    text = (
        f"A worker and the server killed under load: mesh lost {number(ours['lost'])} of {number(ours['accepted'])} "
        f"calls and ran {number(ours['doubled'])} twice"
    )
    text += (
        f"; {listed(none)} lost none either"
        if none and not ours["lost"]
        else f"; {listed(none)} lost none"
        if none
        else ""
    )
    return text + (f"; lost by others: {listed(some)}." if some else ".")


def listed(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
