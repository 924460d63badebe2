"""The page in the documentation, its pictures, and three lines of the README: made of the results and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from peers.chaos import LEASE, PATIENCE, RATE, SECONDS
from peers.figures import RATES, SUSTAINED
from peers.plots import Bars, bars, lines
from peers.results import Results
from peers.roster import BY_NAME, DURABILITY, ROSTER, Entry
from peers.summary import BUSY, FIGURE, FIGURES, SYNCS, Spread, ahead, busy, found, number, three_lines

README = Path(__file__).resolve().parent.parent.parent / "README.md"
_MARKED = re.compile(r"(?<=<!-- peers -->\n).*?(?=<!-- /peers -->)", re.DOTALL)
_WHEN = {"second": "on disk within a second", "always": "on disk before the answer"}


def write(results: Results) -> None:
    """Everything beside the results; the README's lines only of the results that are the checkout's own."""
    page = results.file.with_suffix(".md")
    page.write_text(written(results))
    for name, picture in pictures(results).items():
        results.file.with_name(name).write_text(picture)
    print(f"wrote {page}")
    if results.file.resolve().parent == README.parent / "docs":
        README.write_text(with_lines(README.read_text(), results))


def with_lines(readme: str, results: Results) -> str:
    """The README with its three lines as the results have them."""
    return _MARKED.sub("\n".join(three_lines(results)) + "\n", readme)


def written(results: Results) -> str:
    """The page."""
    parts = [
        "# mesh beside other queues",
        (
            "Written by `python3 dev bench --peers`; do not edit it. `python3 dev bench --peers --report` writes it "
            "again from [benchmarks.json](benchmarks.json), which has every value. Why what mesh itself costs is what "
            "it is: [performance.md](performance.md)."
        ),
        *_about(results),
        *_section(results, "second"),
        *_kinds(results),
        *_open_loops(results),
        *_costs(results),
        *_killed(results),
        *_section(results, "always"),
        *_behind(results),
        *_absent(results),
        *_settings(results),
    ]
    return "\n\n".join(parts) + "\n"


# --- parts of the page -----------------------------------------------------------------------------------------------


def _about(results: Results) -> list[str]:
    last = results.runs[-1]
    sizes = last["sizes"]
    runs = ", ".join(
        f"{run['date']}, commit {run['commit']}, load {run['load']} at its start, "
        + (f"{run['minutes']:g} minutes" if run["minutes"] is not None else "broken off")
        for run in results.runs
    )
    rounds = sorted({count for done in results.rounds.values() for count in done.values()}) or [0]
    taken = "–".join(dict.fromkeys(str(count) for count in (rounds[0], rounds[-1])))
    return [
        (
            f"Measured on {last['cpu']}, Python {last['python']}: {runs}. Each value is the median of its rounds "
            f"({taken}), all peers in each round, in another order each time, and in brackets are the lowest and the "
            "highest. Every round has a fresh server, two worker processes, and one client process, on the same "
            f"machine; nothing is pinned to a core. Each figure is short: {sizes['rate']:g} s of calls after a "
            f"warm-up, {sizes['round_trip']:g} s of single calls, {sizes['open_loop']:g} s for each fixed rate, "
            f"{sizes['submit']:g} s of submissions. So differences of a tenth say nothing, and a longer run is "
            "`--scale 5`."
        ),
        *([f"**{BUSY}**"] if busy(results) else []),
        (
            "**▲** is better than mesh by more than a twentieth. *JetStream itself* is no queue but the limit of "
            "what mesh is built on. Dask keeps nothing on disk, and stands outside the comparison. Every result is "
            "read and checked in every figure but the submissions."
        ),
        "![Calls a second and round trips](benchmarks-bars.svg)",
    ]


def _section(results: Results, durability: str) -> list[str]:
    names = ("submit one", "submit bulk", "end to end", "round trip p50", "round trip p95", "round trip p99")
    return [
        f"## Speed, {_WHEN[durability]}",
        (
            "Calls that do nothing. Submissions are made with no worker there; end to end is from the first submission "
            "of many to the last result read; round trips are one at a time."
        ),
        _table(results, durability, names),
    ]


def _kinds(results: Results) -> list[str]:
    return [
        "## What calls do",
        (
            f"End to end, {_WHEN['second']}. Calls that sleep show how many run at once (last column), which is a "
            "setting; calls of 1 ms of CPU are at most 1,000 a second and core."
        ),
        _table(results, "second", ("cpu kind", "sleep", "big", "failing"), ("at once", _at_once)),
    ]


def _open_loops(results: Results) -> list[str]:
    def at(rate: int) -> tuple[str, Callable[[str], str]]:
        return f"at {rate:,}/s", lambda name: _pair(results, name, rate)

    return [
        "## At fixed rates",
        (
            "Calls come at a fixed rate, whatever becomes of them: milliseconds from the moment a call was due to its "
            f"result, p50 / p99. A rate is sustained if its p95 is at most {SUSTAINED:g} ms; the first one that is not "
            "is the last one tried."
        ),
        _table(results, "second", ("knee",), *(at(rate) for rate in RATES)),
        "![p99 at fixed rates](benchmarks-open-loop.svg)",
    ]


def _costs(results: Results) -> list[str]:
    return [
        "## What it costs",
        (
            "CPU in seconds for 1,000 calls that do nothing, of server, workers and client together; memory of all "
            "processes of the two workers after that, shared pages by their share; how much the server's folder grew "
            "for a call that waits, and for one that has ended and whose result is kept. A log that is rewritten from "
            "time to time, as Redis has, is counted as it stood; of PostgreSQL the write-ahead log is not."
        ),
        _table(results, "second", ("cpu", "cpu of workers", "memory", "bytes queued", "bytes ended")),
    ]


def _killed(results: Results) -> list[str]:
    header = ["", "accepted", "refused", "lost", "ran twice", "longest wait"]
    rows = []
    for entry in ROSTER:
        one = results.chaos.get(f"{entry.name}/second")
        if one is not None:
            names = ("accepted", "refused", "lost", "doubled", "wait")
            rows.append([entry.title, *(number(one[name]) for name in names)])
    return [
        "## When things are killed",
        (
            f"Once for each peer, {RATE} calls a second of 30 ms for {SECONDS:g} s: after 1 s one of two workers is "
            "killed with all its processes, and started again half a second later; after 2.5 s the server is killed, "
            "and started again at once with what it had; a worker that ends by itself is started again, as a "
            f"supervisor would. A lease is set to {LEASE} s where there is such a setting. A submission that raised "
            f"was refused, and counts no further. Lost: accepted, and no result could be read until {PATIENCE:g} s "
            "after the last submission. The longest wait is from a call's acceptance to the end of its first run, in "
            "seconds, of those not lost. One run has few calls in flight at the moment of a kill: that nothing was "
            "lost here does not prove that nothing is."
        ),
        _grid(header, rows),
    ]


def _behind(results: Results) -> list[str]:
    """Each reason once, under it every figure it stands behind."""
    by_reason: dict[str, list[str]] = {}
    for figure in FIGURES:
        for durability in DURABILITY:
            better = ahead(results, durability, figure.name)
            ours = found(results, "mesh", durability, figure.name)
            if better and ours is not None:
                names = ", ".join(f"{entry.title} {number(value)}" for entry, value in better)
                text = f"    - {figure.label}, {_WHEN[durability]}: {names}; mesh {number(ours.median)} {figure.unit}"
                by_reason.setdefault(figure.why, []).append(text)
    said = [line for why, those in by_reason.items() for line in (f"- {why}:", *those)]
    if not said:
        return ["## Where others are ahead, and why", "Nowhere in these tables."]
    introduction = f"By more than a twentieth, with what mesh pays for there. {SYNCS}"
    return ["## Where others are ahead, and why", introduction, "\n".join(said)]


def _absent(results: Results) -> list[str]:
    said = []
    for key, why in results.missing.items():
        said.append(f"- {_called(key)} did not take part: {why}")
    for key, figures in results.broken.items():
        said += [f"- {_called(key)}, {name}: {why}" for name, why in figures.items()]
    return ["## What could not be measured", "\n".join(said)] if said else []


def _settings(results: Results) -> list[str]:
    header = ["", "version", "durability", "calls at once", "settings"]
    rows = []
    for entry in ROSTER:
        if entry.name in results.versions:
            kept = ", ".join(f"`{how[entry.store]}`" for how in DURABILITY.values() if entry.store in how)
            rows.append([entry.title, results.versions[entry.name], kept, _at_once(entry.name), entry.settings])
    return ["## Settings", _grid(header, rows)]


def _called(key: str) -> str:
    name, _, durability = key.partition("/")
    return f"{BY_NAME[name].title} ({DURABILITY[durability][BY_NAME[name].store]})"


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(results: Results, durability: str, names: Sequence[str], *more: tuple[str, Callable[[str], str]]) -> str:
    """A row for each peer that was measured, a column for each figure, and more columns made of a peer's name."""
    header = [
        "",
        *(f"{FIGURE[name].title} ({FIGURE[name].unit})" for name in names),
        *(title for title, _ in more),
    ]
    rows = []
    for entry in ROSTER:
        cells = [_cell(results, entry, durability, name) for name in names]
        if any(cells):
            how = DURABILITY[durability][entry.store]
            rows.append(
                [f"{entry.title} (`{how}`)", *(cell or "–" for cell in cells), *(f(entry.name) for _, f in more)]
            )
    return _grid(header, rows)


def _cell(results: Results, entry: Entry, durability: str, name: str) -> str:
    one = found(results, entry.name, durability, name)
    if one is None:
        return ""
    mark = " ▲" if entry in [other for other, _ in ahead(results, durability, name)] else ""
    return f"{number(one.median)}{mark} {_range(one)}".strip()


def _range(one: Spread) -> str:
    return "" if one.low == one.high else f"({number(one.low)}–{number(one.high)})"


def _pair(results: Results, name: str, rate: int) -> str:
    both = [found(results, name, "second", f"open {percent} at {rate}") for percent in ("p50", "p99")]
    return " / ".join(number(one.median) for one in both if one is not None) or "–"


def _at_once(name: str) -> str:
    entry = BY_NAME[name]
    return "–" if entry.pure else f"2 × {entry.at_once}"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines_of = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines_of)


# --- pictures --------------------------------------------------------------------------------------------------------


def pictures(results: Results) -> dict[str, str]:
    """By their file names."""
    wanted = (
        ("end to end", "second", "end to end (calls/s), within a second"),
        ("end to end", "always", "end to end (calls/s), before the answer"),
        ("round trip p50", "second", "round trip p50 (ms), within a second"),
    )
    panels = [
        Bars(title, values, BY_NAME["mesh"].title)
        for name, durability, title in wanted
        if (values := _bars(results, name, durability))
    ]
    series = [
        (entry.title, points)
        for entry in ROSTER
        if (
            points := [
                (float(rate), max(0.1, one.median))
                for rate in RATES
                if (one := found(results, entry.name, "second", f"open p99 at {rate}")) is not None
            ]
        )
    ]
    drawn = {"benchmarks-bars.svg": bars(panels)} if panels else {}
    if series:
        title = "p99 of calls at a fixed rate (ms), each until it does not keep up"
        drawn["benchmarks-open-loop.svg"] = lines(title, "calls a second", series)
    return drawn


def _bars(results: Results, name: str, durability: str) -> list[tuple[str, float, float, float]]:
    """Every peer that has a figure, the best one first."""
    values = [
        (entry.title, one.median, one.low, one.high)
        for entry in ROSTER
        if (one := found(results, entry.name, durability, name)) is not None
    ]
    return sorted(values, key=lambda one: one[1], reverse=FIGURE[name].more_is_better)
