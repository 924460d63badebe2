"""`python3 dev bench --peers`: mesh beside the queues a user would pick instead.

    python3 dev bench --peers                                    everything: about 20 minutes on two quiet cores
    python3 dev bench --peers --only mesh,celery --rounds 1      some of it
    python3 dev bench --peers --figures end_to_end,chaos         some figures
    python3 dev bench --peers --resume                           go on with a run that was broken off
    python3 dev bench --peers --report                           write the report again from what was measured

Measured values are kept in `--results` after every step. The report and its pictures are written beside that file, and
three lines into README.md where it is the checkout's own. Peers are installed once, into `--cache`.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine

from peers import chaos, report
from peers.environments import prepare, version
from peers.figures import FIGURES, Sizes, one_round, wanted
from peers.results import Results
from peers.roster import DURABILITY, ROSTER, Contestant, contestants
from peers.stage import Broken
from peers.stores import STORES, Missing

ROOT = Path(__file__).resolve().parent.parent.parent


class Run:
    """One start of the command."""

    def __init__(self, results: Results, cache: Path, sizes: Sizes, names: list[str]) -> None:
        self.results = results
        self.cache = cache
        self.sizes = sizes
        self.names = names
        self.places: dict[str, Path] = {}
        self.began = time.monotonic()

    def installed(self, contestant: Contestant) -> bool:
        """Bring a peer here; whoever cannot come is written down."""
        entry, results = contestant.entry, self.results
        try:
            place = self.places[entry.name] = prepare(entry, self.cache)
            store = STORES[entry.store](self.cache / "none", contestant.durability, place)
            results.versions[entry.name] = f"{version(entry, place)}, {store.version()}"
        except Missing as missing:
            results.missing[contestant.key] = str(missing)
            self.say(contestant, f"missing: {missing}")
            return False
        results.missing.pop(contestant.key, None)
        return True

    def lacking(self, contestant: Contestant, rounds: int) -> list[str]:
        """The figures of a contestant that have fewer rounds behind them, and can be measured."""
        key, results = contestant.key, self.results
        done, broken = results.rounds.get(key, {}), results.broken.get(key, {})
        return [
            name
            for name in wanted(contestant, self.names)
            if done.get(name, 0) < rounds and not {name, "start"} & {*broken}
        ]

    def measure(self, contestant: Contestant, names: list[str]) -> None:
        """One round of some figures. What breaks once is not tried again."""
        key, results = contestant.key, self.results
        broken, done, line = results.broken.setdefault(key, {}), results.rounds.setdefault(key, {}), []
        try:
            for name, found in one_round(contestant, self.places[contestant.entry.name], names, self.sizes):
                if isinstance(found, Broken):
                    broken[name] = str(found)
                    line.append(f"{name} broken: {found}")
                    continue
                results.add(key, found)
                done[name] = done.get(name, 0) + 1
                line.append(" ".join(f"{what} {value:,.4g}" for what, value in found.items()))
        except (Broken, RuntimeError) as gone:
            broken[names[len(line)] if line else "start"] = str(gone)
            line.append(f"gone: {gone}")
        self.say(contestant, " · ".join(line))
        results.save()

    def kill(self, contestant: Contestant) -> None:
        """The chaos of a contestant."""
        try:
            found = chaos.run(contestant, self.places[contestant.entry.name])
            self.results.chaos[contestant.key] = {name: float(f"{value:.4g}") for name, value in found.items()}
            self.say(contestant, f"chaos {found}")
        except (Broken, RuntimeError) as broken:
            self.results.broken.setdefault(contestant.key, {})["chaos"] = str(broken)
            self.say(contestant, f"chaos broken: {broken}")
        self.results.save()

    def say(self, contestant: Contestant, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.0f} s] {contestant.key}: {text}", flush=True)


def measured(options: argparse.Namespace) -> Results:
    """Everything that is asked for and not there yet, rounds interleaved."""
    sizes = Sizes(*(options.scale * value for value in asdict(Sizes()).values()))
    results = Results.load(options.results) if options.resume and options.results.exists() else Results(options.results)
    results.runs.append(about(options, sizes))
    run = Run(results, options.cache, sizes, options.figures)
    taking_part = [one for one in contestants(options.only, options.durability) if run.installed(one)]
    results.save()
    for number in range(options.rounds):
        for contestant in random.Random(number).sample(taking_part, len(taking_part)):
            if names := run.lacking(contestant, number + 1):
                run.measure(contestant, names)
    if "chaos" in options.figures:
        for contestant in taking_part:
            known = contestant.key in results.chaos or "chaos" in results.broken.get(contestant.key, {})
            if contestant.durability == "second" and not contestant.entry.pure and not known:
                run.kill(contestant)
    results.runs[-1]["minutes"] = round((time.monotonic() - run.began) / 60, 1)
    results.save()
    return results


def about(options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """What readers have to know of a run."""
    found = machine.about()
    return {
        **{name: found[name] for name in ("cpu", "load", "python", "commit")},
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "sizes": asdict(sizes),
        "minutes": None,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dev bench --peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def listed(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    names = [*FIGURES, "chaos"]
    everybody = [entry.name for entry in ROSTER]
    parser.add_argument("--only", type=listed, default=everybody, metavar="PEERS", help=", ".join(everybody))
    parser.add_argument("--figures", type=listed, default=names, metavar="FIGURES", help=", ".join(names))
    parser.add_argument(
        "--durability", type=listed, default=list(DURABILITY), metavar="WHICH", help=", ".join(DURABILITY)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="measure everything so many times as long")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "benchmarks.json", metavar="FILE")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "peers", metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="keep what --results has, and measure what it lacks")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.figures if name not in names]
    if unknown:
        parser.error(f"no figure {unknown[0]!r}: there are {', '.join(names)}")
    try:
        contestants(options.only, options.durability)
    except ValueError as error:
        parser.error(str(error))
    results = Results.load(options.results) if options.report else measured(options)
    report.write(results)
