"""`mesh up`, `mesh worker`, `mesh worker list`, `mesh init`: the long-running side."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from mesh import background, vault
from mesh.broker import Broker, translated
from mesh.cli.log import output_shown, set_up_logging
from mesh.cli.options import Env, Json, Url, with_broker
from mesh.cli.render import ago, print_json, print_table, say
from mesh.config import Settings
from mesh.exception import InvalidError
from mesh.records import WorkerRecord

app = typer.Typer(invoke_without_command=True)

Containers = Annotated[int | None, typer.Option("--containers", help="Containers it may run at once.", min=1)]
Cpus = Annotated[float | None, typer.Option("--cpus", help="Cores that functions may claim; all by default.")]
Memory = Annotated[int | None, typer.Option("--memory", help="MiB that functions may claim; all by default.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="What functions may ask for, such as gpu=l4; repeatable.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Log only what is wrong, and no output of functions.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every call.")]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="text or json.")]


def _up(
    env: Env = None,
    listen: Annotated[str, typer.Option("--listen", help="Address to listen on for other machines.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port of the server; 0 for any free one.")] = None,
    web_host: Annotated[str, typer.Option("--web-host", help="Address of the gateway; 0.0.0.0: all.")] = "127.0.0.1",
    web_port: Annotated[int | None, typer.Option("--web-port", help="8700, or the next free one, by default.")] = None,
    containers: Containers = None,
    cpus: Cpus = None,
    memory: Memory = None,
    label: Labels = None,
    sync: Annotated[str | None, typer.Option("--sync", help="When to write to disk: always, 1s or 2m.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: LogFormat = None,
) -> None:
    """Run a mesh on this machine until Ctrl-C: a NATS server, a worker, and a gateway for web functions.

    Data is kept between runs.
    """
    from mesh.server import NatsServer
    from mesh.up import store_of, up
    from mesh.worker import Worker

    room = {"containers": containers, "cpus": cpus, "memory": memory, "labels": label or None}
    flags = {"environment": env, **room, "sync": sync, "log_format": log_format}
    settings = Settings.load(flags)
    set_up_logging(settings, quiet=quiet, verbose=verbose)

    def ready(server: NatsServer, worker: Worker) -> None:
        if settings.log_format == "json":
            return  # the worker's own line says that it is ready, and what is read by machines is JSON alone
        offer = f"{worker.offer.size.containers} containers (worker {worker.name})"
        say(f"[bold]mesh is up[/] at nats://{server.address} with {offer}")
        say(f"data in {store_of(settings)}, written to disk: {settings.sync}")
        if listen != "127.0.0.1":
            host = os.uname().nodename if listen == "0.0.0.0" else listen
            url = server.url.replace(server.address, f"{host}:{server.port}")
            say(f"on another machine: [bold]mesh worker --url {url}[/]")
        say("deploy with [bold]mesh deploy FILE[/]; Ctrl-C ends it")

    output = output_shown(settings, quiet=quiet)
    gateway = ["--host", web_host, *(["--port", str(web_port)] if web_port is not None else [])]
    if quiet or settings.log_format == "json":
        gateway.append("--quiet")
    raise typer.Exit(up(settings, listen=listen, port=port, on_ready=ready, on_output=output, gateway=gateway))


@app.callback()
def _worker(
    words: typer.Context,
    env: Env = None,
    url: Url = None,
    containers: Containers = None,
    cpus: Cpus = None,
    memory: Memory = None,
    label: Labels = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: LogFormat = None,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run everything deployed that fits this machine, until told to stop.

    The first SIGTERM or Ctrl-C takes nothing new and lets running calls finish; the second stops now.
    """
    if words.invoked_subcommand is not None:
        return
    from mesh.worker import Worker

    if sys.platform != "linux":
        raise InvalidError(f"mesh workers run on Linux; this is {sys.platform}. Calling functions works from anywhere")
    room = {"containers": containers, "cpus": cpus, "memory": memory, "labels": label or None}
    flags = {"environment": env, "nats_url": url, **room, "log_format": log_format}
    settings = Settings.load(flags).with_server()
    set_up_logging(settings, quiet=quiet, verbose=verbose)

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    async def work() -> int:
        return await Worker(settings, on_output=output_shown(settings, quiet=quiet)).run(ready)

    raise typer.Exit(background.run(work()))


@app.command("list")
def list_workers(env: Env = None, url: Url = None, json: Json = False) -> None:
    """List the workers that are alive, and what each of them does."""

    async def read(broker: Broker) -> list[WorkerRecord]:
        async with translated("listing workers"):
            return await broker.workers.all()

    workers = with_broker(env, url, read)
    if json:
        print_json([asdict(worker) for worker in workers])
        return
    rows = [
        (w.worker, w.host, str(w.pid), w.python, f"{w.used}/{w.containers}",
         f"{w.used_cpus:g}/{w.cpus:g}", f"{w.used_memory:,}/{w.memory:,} MiB",
         ",".join(f"{name}={value}" for name, value in w.labels.items()), ago(w.started),
         "draining" if w.draining else "", ", ".join(w.running), ", ".join(w.functions), _troubles(w))
        for w in workers
    ]  # fmt: skip
    columns = (
        *("Worker", "Host", "Pid", "Python", "Containers", "Cores", "Memory", "Labels"),
        *("Started", "State", "Running", "Functions", "Troubles"),
    )
    print_table(columns, rows, "no worker is running; start one with `mesh worker` (or `mesh up`)")


def _troubles(worker: WorkerRecord) -> str:
    """What keeps it from running everything."""
    unfit = [reason if function in reason else f"{function}: {reason}" for function, reason in worker.unfit.items()]
    return "; ".join([worker.trouble, *unfit] if worker.trouble else unfit)


def _init(env: Env = None, url: Url = None, json: Json = False) -> None:
    """Create what is missing of an environment on a server: its streams and buckets, and a key for its secrets.

    `mesh up` does this, too, and `worker` and `deploy` all but the key; do it by itself to choose sizes and times
    (`mesh config show`).
    """

    async def make(broker: Broker) -> tuple[list[str], str]:
        made, key_file = await broker.ensure(), broker.settings.key_file
        return made, str(key_file) if await vault.establish(broker, key_file) else ""

    made, key_file = with_broker(env, url, make)
    if json:
        print_json({"created": made, "key_file": key_file})
        return
    say(f"created {', '.join(made)}" if made else "everything is there already")
    if key_file:
        say(f"made the key of its secrets, [bold]{key_file}[/]: keep a copy, and give one to every other worker")


def register(root: typer.Typer) -> None:
    """Add the commands."""
    root.command("up")(_up)
    root.add_typer(app, name="worker")
    root.command("init")(_init)
