"""`python -m tests.chaos`: one run, its figures, and what is wrong with it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import signal
import sys
from pathlib import Path

from tests.chaos.check import Report, too_tame
from tests.chaos.fleet import SYNC
from tests.chaos.run import Run


def figures(report: Report, seed: int, seconds: float) -> list[str]:
    """What a run came to, for people."""
    faults = ", ".join(f"{fault} {count}" for fault, count in sorted(report.faults.items()))
    extra = ", ".join(f"{fault} {count}" for fault, count in sorted(report.extra.items()))
    ended = {state: report.states.get(state, 0) for state in ("succeeded", "failed", "timed_out", "cancelled")}
    return [
        f"seed {seed}, {seconds:g} s of faults, written to disk: {SYNC}",
        f"submitted         {report.submitted:,} ({report.unsure} without an answer, {report.refused} refused)",
        f"accepted          {report.accepted:,}",
        *(f"{state:17} {count:,}" for state, count in ended.items()),
        f"lost              {report.lost}",
        f"doubled results   {report.doubled}",
        f"executions        {report.executions:,}",
        f"extra executions  {sum(report.extra.values())} ({extra or 'none'}), unexplained {report.unexplained}",
        f"most at once      {', '.join(f'{name} {most}' for name, most in report.most_at_once.items())}",
        f"gets interrupted  {report.interrupted}",
        f"longest stall     {report.longest_stall:.1f} s",
        f"faults            {sum(report.faults.values())} ({faults})",
    ]


def as_json(report: Report, seed: int, seconds: float) -> str:
    """The same for programs."""
    values = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return json.dumps({"seed": seed, "seconds": seconds, "sync": SYNC, **values}, indent=2) + "\n"


def main() -> int:
    """Returns 0 if nothing is wrong, else 1; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dev chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="of faults; 300 by default")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of what goes wrong, and when")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = Run(options.seed, options.seconds)
    print(f"seed {options.seed}, in {run.directory}", file=sys.stderr)
    try:
        report = run.run()
    except KeyboardInterrupt:
        print("interrupted; everything has been ended", file=sys.stderr)
        return 130
    report.wrong += [("", text) for text in too_tame(report, options.seconds)]
    print("\n".join(figures(report, options.seed, options.seconds)))
    if options.json:
        options.json.write_text(as_json(report, options.seed, options.seconds))
    if report.wrong:
        print("\n".join(run.explained(report)))
        print(f"wrong: {len(report.wrong)}; again with --seed {options.seed}; logs in {run.directory}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
