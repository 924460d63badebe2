"""How many calls a second one worker runs, by its containers: calls that do nothing, and calls that sleep for 10 ms."""

from __future__ import annotations

from collections.abc import Sequence

import uvloop
from calls import deployed, end_to_end
from rig import rig
from table import Row, row


def rows(counts: Sequence[int], calls: int) -> list[Row]:
    """Every result read and checked, 2,000 calls under way."""
    found = []
    for count in counts:
        with rig() as mesh:
            module = deployed(mesh)
            mesh.start_worker(count)
            for function, number in ((module.noop, calls), (module.sleep, min(calls, 100 * count * 5))):
                uvloop.run(end_to_end(function, 300))  # warm: containers started, runs known to be short
                rate = uvloop.run(end_to_end(function, number))
                found.append(row(f"{function.name}, {count} containers (calls/s)", [rate]))
    return found
