"""Who takes part: how each peer is installed and started, and which settings it was given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One peer.

    Args:
        name: on the command line, of its module here and its environment. store: what it keeps calls in: `nats`,
            `redis`, `postgres`, or `dask`, which keeps them in the memory of its scheduler.
        packages: what is installed for it; nothing where it runs in the environment of the checkout.
        command: starts workers; `{processes}` of them where one command can start several, else one.
        at_once: calls that each of its processes runs at a time. settings: what it was told, for readers.
        pure: it runs no code, so that only what does nothing can be measured.
    """

    name: str
    title: str
    store: str
    packages: tuple[str, ...]
    command: str
    at_once: int
    settings: str
    pure: bool = False
    distribution: str = ""

    @property
    def environment(self) -> str:
        """The name of its virtual environment."""
        return self.packages[0].partition("[")[0] if self.packages else ""

    def workers(self, apart: bool) -> list[str]:
        """The commands that start two worker processes: one for each if they are to die apart."""
        if "{processes}" in self.command and not apart:
            return [self.command.replace("{processes}", "2").replace("{number}", "1")]
        return [self.command.replace("{processes}", "1").replace("{number}", str(number)) for number in (1, 2)]


ROSTER = (
    Entry(
        "mesh",
        "mesh",
        "nats",
        (),
        "python -m mesh worker --quiet --containers {processes}",
        10,
        "`@mesh.concurrent(max_inputs=10)` on an async function, one `mesh worker --containers 2`; results kept for "
        "seven days; a call is acknowledged when its result is stored; bulk is `spawn_map`, end to end are 1,000 "
        "`spawn` and `get` under way at a time",
        distribution="nats-mesh",
    ),
    Entry(
        "raw",
        "JetStream itself",
        "nats",
        (),
        "python {bench}/raw_limit.py --worker {url}",
        1,
        "not a queue: publish, pull, conditional result, ack and push with nats-py, and no user code; the limit of "
        "what mesh is built on",
        pure=True,
        distribution="nats-py",
    ),
    Entry(
        "celery",
        "Celery",
        "redis",
        ("celery[redis]",),
        "celery -A peers.celery worker --pool prefork --concurrency {processes} --loglevel WARNING --without-gossip "
        "--without-mingle -n worker{number}@localhost",
        1,
        "prefork, `task_acks_late`, `task_reject_on_worker_lost`, `worker_prefetch_multiplier=64` (its guide: 50 to "
        "150 for short tasks; the default is 4), JSON, Redis results; it has no bulk submission (a `group` was slower)",
    ),
    Entry(
        "dramatiq",
        "Dramatiq",
        "redis",
        ("dramatiq[redis]",),
        "dramatiq peers.dramatiq --processes {processes} --threads 10",
        10,
        "ten threads a process (default 8), the Results middleware on Redis, `max_retries=0`, waiting by `block=True`; "
        "it has no bulk submission",
    ),
    Entry(
        "arq",
        "arq",
        "redis",
        ("arq", "uvloop"),
        "arq peers.arq.WorkerSettings",
        10,
        "`max_jobs=10` (default), `poll_delay=0.01` for workers and for `Job.result` (default 0.5 s each), pickle; 20 "
        "submissions under way at a time for bulk",
    ),
    Entry(
        "saq",
        "SAQ",
        "redis",
        ("saq[redis,hiredis]", "typing-extensions", "uvloop"),
        "saq peers.saq.settings --workers {processes}",
        10,
        "`concurrency=10` (default), hiredis, waiting as its `map` does, but every 10 ms (default 0.5 s), since "
        "`refresh(until_complete=…)` misses jobs that end before it listens; 20 submissions under way at a time for "
        "bulk, as its queue limits itself",
    ),
    Entry(
        "huey",
        "Huey",
        "redis",
        ("huey", "redis"),
        "huey_consumer peers.huey.huey --workers 10 --worker-type thread --quiet",
        10,
        "two consumers with ten threads each, `notify_result=True` instead of polling for results; bulk is `task.map`, "
        "one by one underneath; a task leaves Redis when a consumer takes it",
    ),
    Entry(
        "taskiq_redis",
        "taskiq on Redis",
        "redis",
        ("taskiq", "taskiq-redis", "taskiq-nats", "uvloop"),
        "taskiq worker peers.taskiq_redis:broker --workers {processes} --max-async-tasks 10 --log-level ERROR",
        10,
        "`RedisStreamBroker` (the one that acknowledges), acknowledged when the result is saved, `check_interval=0.01` "
        "for waiting (default 0.2 s); 20 submissions under way at a time for bulk",
        distribution="taskiq-redis",
    ),
    Entry(
        "taskiq_nats",
        "taskiq on NATS",
        "nats",
        ("taskiq", "taskiq-redis", "taskiq-nats", "uvloop"),
        "taskiq worker peers.taskiq_nats:broker --workers {processes} --max-async-tasks 10 --log-level ERROR",
        10,
        "`PullBasedJetStreamBroker` on a work queue, results in `NATSObjectStoreResultBackend`, `check_interval=0.01`, "
        "asked again where reading one that is being written raises; 20 submissions under way at a time for bulk",
        distribution="taskiq-nats",
    ),
    Entry(
        "rq",
        "RQ",
        "redis",
        ("rq",),
        "rq worker --worker-class rq.worker.SimpleWorker --url {url} --quiet peers",
        1,
        "`SimpleWorker` (the default forks a process for every call), waiting by `latest_result(timeout=…)`; bulk is "
        "`enqueue_many`",
    ),
    Entry(
        "streaq",
        "streaq",
        "redis",
        ("streaq", "uvloop"),
        "streaq run peers.streaq:worker --workers {processes}",
        10,
        "`concurrency=10` (default 16), uvloop; bulk is `enqueue_many`; waiting by `Task.result`, which here takes a "
        "tenth of a second even for a result that is there, 50 at a time",
    ),
    Entry(
        "procrastinate",
        "Procrastinate",
        "postgres",
        ("procrastinate", "psycopg[binary,pool]", "uvloop"),
        "procrastinate --app peers.procrastinate.app worker --concurrency 10",
        10,
        "LISTEN/NOTIFY for workers; it keeps no results, so the function writes them into a table of its own, which "
        "the client polls every 10 ms; bulk is `batch_defer_async`; calls of lost workers are retried by a periodic "
        "task, as its documentation has users write one (only when things are killed)",
    ),
    Entry(
        "dask",
        "Dask",
        "dask",
        ("distributed",),
        "dask worker {url} --nworkers {processes} --nthreads 10 --no-dashboard",
        10,
        "a scheduler and its workers; nothing is ever on disk, and submitting only hands over to a thread of the "
        "client, so its submissions are not comparable; bulk is `Client.map`",
        distribution="distributed",
    ),
)
BY_NAME = {entry.name: entry for entry in ROSTER}

DURABILITY = {
    "second": {
        "nats": "sync 1s",
        "redis": "appendfsync everysec",
        "postgres": "synchronous_commit off",
        "dask": "memory only",
    },
    "always": {"nats": "sync always", "redis": "appendfsync always", "postgres": "synchronous_commit on"},
}
"""When what was accepted is on the disk, by what each store calls it: within about a second, or before the answer."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A peer with one durability; its key in the results."""

    entry: Entry
    durability: str

    @property
    def key(self) -> str:
        return f"{self.entry.name}/{self.durability}"

    @property
    def setting(self) -> str:
        """What its store was told."""
        return DURABILITY[self.durability][self.entry.store]


def contestants(peers: list[str], durabilities: list[str]) -> list[Contestant]:
    """Those that are asked for; what keeps nothing on disk does not take part where the disk is waited for.

    Raises:
        ValueError: there is no such peer or durability.
    """
    for what, asked, known in (("peer", peers, list(BY_NAME)), ("durability", durabilities, list(DURABILITY))):
        unknown = [one for one in asked if one not in known]
        if unknown:
            raise ValueError(f"no {what} {unknown[0]!r}: there are {', '.join(known)}")
    return [
        Contestant(BY_NAME[name], durability)
        for durability in durabilities
        for name in peers
        if BY_NAME[name].store in DURABILITY[durability]
    ]
