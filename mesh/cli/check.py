"""`mesh check`: is everything as it should be?"""

from __future__ import annotations

import sys
from dataclasses import asdict

import typer

from mesh.check import Report, check
from mesh.cli.options import Env, Json, Url, with_broker
from mesh.cli.render import ExitCode, print_facts, print_json, say_error


def _check(env: Env = None, url: Url = None, json: Json = False) -> None:
    """See whether the server, the environment, its queue and its workers are as they should be.

    Ends with 0 if so, 1 if something is wrong (each is said), 3 if there is no such environment, 6 if the server cannot
    be reached, 7 if it refuses or is too old. That no worker runs is only noted.
    """
    report = with_broker(env, url, check)
    if json:
        print_json({"ok": not report.problems, **asdict(report)})
    else:
        _show(report)
    if report.problems:
        raise typer.Exit(ExitCode.FAILED)


def _show(report: Report) -> None:
    workers = [worker for worker in report.workers if not worker.draining]
    print_facts(
        {
            "server": report.server,
            "environment": report.environment,
            "durability": report.durability,
            "workers": f"{len(workers)}, {sum(w.used for w in workers)} of {sum(w.containers for w in workers)} "
            "containers in use",
        }
    )
    sys.stdout.writelines(f"{level}\n" for level in report.levels)
    for note in report.notes:
        say_error(note, "note")
    for problem in report.problems:
        say_error(problem, "problem")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(_check)
