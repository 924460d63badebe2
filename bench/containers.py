"""How many calls a second one worker runs, by its containers and by how many inputs each of them runs at once."""

from __future__ import annotations

from collections.abc import Sequence

import machine
import uvloop
from calls import deployed, end_to_end
from rig import rig
from table import Row, row

_WARM = 300  # calls before: containers are started, runs known to be short


def rows(counts: Sequence[int], calls: int) -> list[Row]:
    """Calls that do nothing, and calls that sleep for 10 ms: one at a time, or 50 in a container. Every result is read
    and checked; 2,000 calls are under way. What a call costs the worker in CPU says more where others use it, too."""
    found = []
    for count in counts:
        with rig() as mesh:
            module = deployed(mesh)
            mesh.start_worker(count)
            assert mesh.worker is not None
            for function, number in (
                (module.noop, calls),
                (module.sleep, calls * count // 20),
                (module.sleep_in_threads, calls),
                (module.sleep_in_tasks, calls),
            ):
                uvloop.run(end_to_end(function, _WARM))
                before = machine.usage(mesh.worker.pid).cpu
                rate = uvloop.run(end_to_end(function, number))
                taken = machine.usage(mesh.worker.pid).cpu - before
                what = f"{function.name}, containers: {count}"
                found += [
                    row(f"{what} (calls/s)", [rate]),
                    row(f"{what}, CPU of the worker (µs)", [1e6 * taken / number]),
                ]
    return found
