"""What is measured of a peer in one round, and one round of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peers.roster import Contestant
from peers.stage import Broken, Gone, Stage, stage

RATES = (200, 500, 1000, 2000, 4000)
"""Calls a second of the open loops."""

SUSTAINED = 100.0
"""A rate is sustained if 95 of 100 calls have their result within so many milliseconds of when they were due."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long things are measured, in seconds."""

    submit: float = 0.4
    rate: float = 0.7
    round_trip: float = 0.5
    open_loop: float = 0.5


Values = dict[str, float]


def _noop(at: Stage, sizes: Sizes) -> Values:
    """End to end, and what that cost."""
    before, stored = at.cpu(), at.store.size()
    found = at.ask(do="rate", kind="noop", seconds=sizes.rate)
    spent = {name: value - before[name] for name, value in at.cpu().items()}
    thousands = found["total"] / 1000
    return {
        "end to end": found["rate"],
        "cpu": sum(spent.values()) / thousands,
        "cpu of workers": spent["workers"] / thousands,
        "memory": at.memory(),
        "bytes ended": max(0.0, at.store.size() - stored) / found["total"],
    }


def _round_trip(at: Stage, sizes: Sizes) -> Values:
    found = at.ask(do="round_trips", seconds=sizes.round_trip, most=1000)
    return {f"round trip {name}": found[name] for name in ("p50", "p95", "p99")}


def _kind(kind: str) -> Callable[[Stage, Sizes], Values]:
    name = "cpu kind" if kind == "cpu" else kind
    return lambda at, sizes: {name: at.ask(do="rate", kind=kind, seconds=sizes.rate)["rate"]}


def _open_loop(at: Stage, sizes: Sizes) -> Values:
    """Ever higher rates until one is not sustained."""
    values: Values = {"knee": 0.0}
    for rate in RATES:
        found = at.ask(do="open_loop", rate=rate, seconds=sizes.open_loop)
        values[f"open p50 at {rate}"], values[f"open p99 at {rate}"] = found["p50"], found["p99"]
        if found["p95"] > SUSTAINED:
            break
        values["knee"] = float(rate)
    return values


def _submit(at: Stage, sizes: Sizes) -> Values:
    """With no worker there, so that nothing else uses the processors."""
    at.stop_workers()
    one = at.ask(do="submit_one", seconds=sizes.submit)
    stored = at.store.size()
    bulk = at.ask(do="submit_bulk", seconds=sizes.submit)
    queued = max(0.0, at.store.size() - stored) / bulk["count"]
    return {"submit one": one["rate"], "submit bulk": bulk["rate"], "bytes queued": queued}


FIGURES: dict[str, Callable[[Stage, Sizes], Values]] = {
    "end_to_end": _noop,
    "round_trip": _round_trip,
    "cpu": _kind("cpu"),
    "sleep": _kind("sleep"),
    "big": _kind("big"),
    "failing": _kind("failing"),
    "open_loop": _open_loop,
    "submit": _submit,
}
"""In the order they are measured: submissions last, since they leave a full queue."""

OF_RAW = ("end_to_end", "round_trip", "big", "open_loop", "submit")
OF_ALWAYS = ("end_to_end", "round_trip", "submit")
"""What waiting for the disk changes."""


def wanted(contestant: Contestant, asked: list[str]) -> list[str]:
    """The figures of a contestant, of those asked for."""
    allowed = set(FIGURES)
    if contestant.entry.pure:
        allowed &= set(OF_RAW)
    if contestant.durability == "always":
        allowed &= set(OF_ALWAYS)
    return [name for name in FIGURES if name in asked and name in allowed]


def one_round(
    contestant: Contestant, environment: Path, names: list[str], sizes: Sizes
) -> Iterator[tuple[str, Values | Broken]]:
    """Each figure with what was found, or why it could not be."""
    with stage(contestant, environment) as at:
        at.start_workers()
        for name in names:
            try:
                yield name, FIGURES[name](at, sizes)
            except Gone:
                raise
            except Broken as broken:
                yield name, broken
