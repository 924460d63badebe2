"""Measures the mesh on this machine: `python3 dev bench`.

    python3 dev bench [--sync MODE] [--rounds N] [--calls N]   calls, beside the raw limit of JetStream; `--document`
                                                               writes what came of it into docs/performance.md
    python3 dev bench --cold                                   from a call to the first line of user code
    python3 dev bench --idle                                   a worker with 500 functions that has nothing to do
    python3 dev bench --deploy                                 deploying 500 functions
    python3 dev bench --containers                             calls a second, with 1, 2 and 4 containers
    python3 dev bench --scaling                                containers that follow a load, drawn as docs/scaling.svg
    python3 dev bench --web                                    requests through a gateway, beside uvicorn alone
    python3 dev bench --reload                                 from a save to the new answer, under `mesh serve`
    python3 dev bench --million [--count N] [--sync MODE]      a call of a million inputs, and what others see meanwhile
    python3 dev bench --peers [--help]                         beside other queues, written to docs/benchmarks.md

Each prints one table under a line about the machine, and writes it to `--json FILE`, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import calls
import cold
import containers
import deploys
import idle
import machine
import million
import scaling
import table
import web
from table import Row

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"


def measured(options: argparse.Namespace) -> tuple[str, list[Row]]:
    """What was asked for: a title, and its rows."""
    if options.cold:
        title = f"cold start: {options.starts} calls one by one, and {options.worker_starts} starts of the worker"
        return title, cold.rows(options.starts, options.worker_starts)
    if options.idle:
        return f"idle for {options.seconds:g} s", idle.rows([1, options.functions], options.seconds)
    if options.deploy:
        return f"deploying {options.functions} functions", deploys.rows(options.functions)
    if options.containers:
        return "calls a second by containers", containers.rows([1, 2, 4], options.calls)
    if options.web:
        return f"web functions: {options.rounds} rounds", web.rows(options.rounds, options.calls)
    if options.reload:
        return "changes of the source under `mesh serve`", web.reload_rows(10)
    if options.million:
        title = f"a call of {options.count:,} inputs, {options.sync}"
        return title, million.rows(options.sync.partition(",")[0], options.count)
    if options.scaling:
        return "containers that follow a load", scaling.rows(options.picture)
    return beside_the_raw_limit(options)


def beside_the_raw_limit(options: argparse.Namespace) -> tuple[str, list[Row]]:
    """Calls in each durability, perhaps also for the document."""
    title = f"calls, medians of {options.rounds} rounds of {options.calls:,}"
    found = {sync: calls.rounds(sync, options.rounds, options.calls) for sync in options.sync.split(",")}
    if options.document:
        about = " · ".join(f"{name} {value}" for name, value in machine.about().items())
        command = f"`python3 dev bench --rounds {options.rounds} --calls {options.calls} --sync {options.sync}`"
        lines = [f"{command}: medians, with the lowest and the highest. {about}.", "", *calls.budget(found)]
        table.put(DOCUMENT, "budget", lines)
    return title, [row for sync in found for row in calls.rows(sync, found[sync])]


def main() -> None:
    if "--peers" in sys.argv:
        from peers.main import main as beside_peers

        beside_peers([argument for argument in sys.argv[1:] if argument != "--peers"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    for name in ("cold", "idle", "deploy", "containers", "scaling", "web", "reload", "million"):
        which.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--sync", default="1s,always", help="when the server writes to disk: 1s, 2m, always")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--count", type=int, default=1_000_000, help="of --million: its inputs")
    parser.add_argument("--document", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--functions", type=int, default=500, help="of --idle and --deploy")
    parser.add_argument("--seconds", type=float, default=60, help="of --idle: a minute has one of everything in it")
    parser.add_argument("--starts", type=int, default=100, help="of --cold")
    parser.add_argument("--worker-starts", type=int, default=10, help="of --cold")
    picture = Path(__file__).parent.parent / "docs" / "scaling.svg"
    parser.add_argument("--picture", type=Path, metavar="FILE", default=picture, help="of --scaling")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    options = parser.parse_args()
    title, rows = measured(options)
    table.show(title, rows, options.json)


if __name__ == "__main__":
    main()
