"""What a worker costs that has nothing to do, by how many functions are deployed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import functions
import machine
from rig import Rig, rig
from table import Row, row

_SETTLE = 5.0  # seconds after the first call in which its container is started and forgotten about


def rows(counts: Sequence[int], seconds: float) -> list[Row]:
    """One worker and its server, idle for `seconds`, for each number of functions in one app; and as many apps."""
    found = []
    for count in counts:
        found += [row(f"{count} functions: {what}", [value]) for what, value in _measure(count, 1, seconds).items()]
    most = max(counts)
    return found + [row(f"{most} apps: {what}", [value]) for what, value in _measure(1, most, seconds).items()]


def _measure(count: int, apps: int, seconds: float) -> dict[str, float]:
    with rig(monitored=True) as mesh:
        if apps == 1:
            module = mesh.load("one_app", functions.one_app("idle", count))
            module.app.deploy()
            work = module.work_0
        else:
            module = mesh.load("many_apps", functions.many_apps(apps))
            module.deploy()
            work = module.apps[0].registered_functions["work"]
        ready = mesh.start_worker()
        began = time.time()
        found = {"seconds until a worker is ready": ready, "and then until a call begins": work.remote() - began}
        time.sleep(_SETTLE)
        return {**found, **_idle(mesh, seconds)}


def _idle(mesh: Rig, seconds: float) -> dict[str, float]:
    assert mesh.worker is not None
    pids = {"worker": mesh.worker.pid, "server": mesh.server.pid}
    before, messages, began = {who: machine.usage(pid) for who, pid in pids.items()}, mesh.messages(), time.monotonic()
    time.sleep(seconds)
    after, sent = {who: machine.usage(pid) for who, pid in pids.items()}, mesh.messages()
    passed = time.monotonic() - began
    return {
        **{f"{who} CPU (% of a core)": 100 * (after[who].cpu - before[who].cpu) / passed for who in pids},
        **{f"{who} memory (MB)": after[who].memory / 1e6 for who in pids},
        "messages a second to the server": (sent[0] - messages[0]) / passed,
        "messages a second from it": (sent[1] - messages[1]) / passed,
    }
