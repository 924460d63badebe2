"""What deploying many functions costs: one app that has them all, and an app for each."""

from __future__ import annotations

import time
from collections.abc import Callable

import functions
from rig import Rig, rig
from table import Row, row


def rows(count: int) -> list[Row]:
    """Deploy `count` functions as one app, and as `count` apps; again without a change, and with another source."""
    with rig(monitored=True) as mesh:
        module = mesh.load("one_app", functions.one_app("one", count))
        what = f"{count} functions in one app"
        found = _cost(mesh, what, module.app.deploy)
        found += _cost(mesh, f"{what}, unchanged", module.app.deploy)
        module = mesh.load("one_app", functions.one_app("one", count) + "\n# another source\n")
        found += _cost(mesh, f"{what}, source changed", module.app.deploy)
    with rig(monitored=True) as mesh:
        module = mesh.load("many_apps", functions.many_apps(count))
        what = f"{count} apps of one function"
        found += _cost(mesh, what, module.deploy)
        found += _cost(mesh, f"{what}, unchanged", module.deploy)
    return found


def _cost(mesh: Rig, what: str, deploy: Callable[[], object]) -> list[Row]:
    (messages, _), stored, began = mesh.messages(), mesh.stored(), time.monotonic()
    deploy()
    taken, (sent, _) = time.monotonic() - began, mesh.messages()
    return [
        row(f"{what}: seconds", [taken]),
        row(f"{what}: messages to the server", [sent - messages]),
        row(f"{what}: stored (kB)", [(mesh.stored() - stored) / 1e3]),
    ]
