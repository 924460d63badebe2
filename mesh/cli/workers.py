"""`mesh up`, `mesh worker`, `mesh init`: the long-running side."""

from __future__ import annotations

import json as jsonlib
import logging
import os
import sys
import time
from typing import Annotated

import typer

from mesh import background
from mesh.cli.options import Env, Json, Url, with_broker
from mesh.cli.render import print_json, say
from mesh.config import Settings
from mesh.exception import InvalidError


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return jsonlib.dumps(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
                **({"error": self.formatException(record.exc_info)} if record.exc_info else {}),
            }
        )


def set_up_logging(settings: Settings, *, quiet: bool, verbose: bool) -> None:
    """Log to stderr, one line an event."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handler.setFormatter(_JsonLines() if settings.log_format == "json" else text)
    root = logging.getLogger("mesh")
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def show_output(function: str, where: str, stream: int, text: str) -> None:
    """What a function printed, with the input it belongs to."""
    out = sys.stdout if stream == 1 else sys.stderr
    out.writelines(f"{where} {function} | {line}\n" for line in text.splitlines())
    out.flush()


Containers = Annotated[int | None, typer.Option("--containers", help="Containers it may run at once.", min=1)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Log only what is wrong, and no output of functions.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every call.")]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="text or json.")]


def _up(
    env: Env = None,
    listen: Annotated[str, typer.Option("--listen", help="Address to listen on for other machines.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port of the server; 0 for any free one.")] = None,
    containers: Containers = None,
    sync: Annotated[str | None, typer.Option("--sync", help="When to write to disk: always, 1s or 2m.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: LogFormat = None,
) -> None:
    """Run a mesh on this machine: a NATS server and a worker, until Ctrl-C. Data is kept between runs."""
    from mesh.server import NatsServer
    from mesh.up import store_of, up
    from mesh.worker import Worker

    flags = {"environment": env, "containers": containers, "sync": sync, "log_format": log_format}
    settings = Settings.load(flags)
    set_up_logging(settings, quiet=quiet, verbose=verbose)

    def ready(server: NatsServer, worker: Worker) -> None:
        say(f"[bold]mesh is up[/] at nats://{server.address} with {worker.capacity} containers (worker {worker.name})")
        say(f"data in {store_of(settings)}, written to disk: {settings.sync}")
        if listen != "127.0.0.1":
            host = os.uname().nodename if listen == "0.0.0.0" else listen
            url = server.url.replace(server.address, f"{host}:{server.port}")
            say(f"on another machine: [bold]mesh worker --url {url}[/]")
        say("deploy with [bold]mesh deploy FILE[/]; Ctrl-C ends it")

    output = None if quiet else show_output
    raise typer.Exit(up(settings, listen=listen, port=port, on_ready=ready, on_output=output))


def _worker(
    env: Env = None,
    url: Url = None,
    containers: Containers = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: LogFormat = None,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run everything deployed that fits this machine, until told to stop.

    The first SIGTERM or Ctrl-C takes nothing new and lets running calls finish; the second stops now.
    """
    from mesh.worker import Worker

    if sys.platform != "linux":
        raise InvalidError(f"mesh workers run on Linux; this is {sys.platform}. Calling functions works from anywhere")
    flags = {"environment": env, "nats_url": url, "containers": containers, "log_format": log_format}
    settings = Settings.load(flags).with_server()
    set_up_logging(settings, quiet=quiet, verbose=verbose)

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    async def work() -> int:
        return await Worker(settings, on_output=None if quiet else show_output).run(ready)

    raise typer.Exit(background.run(work()))


def _init(env: Env = None, url: Url = None, json: Json = False) -> None:
    """Create what is missing of an environment on a server: its streams and buckets.

    `mesh up`, `worker` and `deploy` do this, too; do it by itself to choose sizes and times (`mesh config show`).
    """
    made = with_broker(env, url, lambda broker: broker.ensure())
    if json:
        print_json({"created": made})
    elif made:
        say(f"created {', '.join(made)}")
    else:
        say("everything is there already")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("up")(_up)
    app.command("worker")(_worker)
    app.command("init")(_init)
