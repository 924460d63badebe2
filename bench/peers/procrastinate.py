"""Procrastinate on PostgreSQL. It keeps no results: the function writes them into a table that the client polls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from procrastinate import App, JobContext, PsycopgConnector
from psycopg.types.json import Json

from peers.peer import LEASE, URL, Failed, TogetherPeer
from peers.work import work_async

_POLL = 0.01
_TABLE = "create table answers (job bigint primary key, value jsonb)"
_KEEP = "insert into answers values (%(job)s, %(value)s) on conflict do nothing"
_READ = """
select j.id, j.status, a.value from procrastinate_jobs j left join answers a on a.job = j.id
where j.id = any(%(jobs)s) and j.status in ('succeeded', 'failed')
"""

_BEATS = {"update_heartbeat_interval": 1.0, "stalled_worker_timeout": float(LEASE)} if LEASE else {}

app = App(connector=PsycopgConnector(conninfo=URL), worker_defaults=_BEATS)


@app.task(name="work", queue="peers", pass_context=True)
async def work(context: JobContext, kind: str, value: Any) -> None:
    found = await work_async(kind, value)
    await app.connector.execute_query_async(_KEEP, job=context.job.id, value=Json(found))


if LEASE:  # its documentation has this for users to write

    @app.periodic(cron="* * * * * */2")
    @app.task(queue="peers")
    async def retry_stalled(timestamp: int) -> None:
        for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=LEASE):
            await app.job_manager.retry_job(job)


class Client(TogetherPeer):
    async def open(self) -> None:
        await app.open_async()
        await app.schema_manager.apply_schema_async()
        await app.connector.execute_query_async(_TABLE)

    async def close(self) -> None:
        await app.close_async()

    async def submit(self, kind: str, value: Any) -> Any:
        return await work.defer_async(kind=kind, value=value)

    async def submit_many(self, kind: str, values: Sequence[Any]) -> list[Any]:
        return await work.batch_defer_async(*({"kind": kind, "value": value} for value in values))

    async def results(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        found: dict[int, Any] = {}
        until = time.monotonic() + timeout
        while len(found) < len(handles):
            waiting = [handle for handle in handles if handle not in found]
            for row in await app.connector.execute_query_all_async(_READ, jobs=waiting):
                found[row["id"]] = row["value"] if row["status"] == "succeeded" else Failed()
            if time.monotonic() > until:
                raise TimeoutError
            if len(found) < len(handles):
                await asyncio.sleep(_POLL)
        return [found[handle] for handle in handles]
