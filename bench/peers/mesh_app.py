"""What mesh's workers run."""

from __future__ import annotations

from typing import Any

import mesh
from peers.work import work_async

app = mesh.App("peers")


@app.function(min_containers=2)
@mesh.concurrent(max_inputs=10)
async def work(kind: str, value: Any) -> Any:
    return await work_async(kind, value)
