"""`mesh gateway` and `mesh serve`: web functions on HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from collections.abc import Generator
from typing import Annotated

import typer

from mesh import background, client, context
from mesh._sync import bridge
from mesh.app import App
from mesh.broker import Broker, translated
from mesh.cli.entry import Reference, find_app
from mesh.cli.log import set_up_logging
from mesh.cli.options import Env, Json, Url, with_broker
from mesh.cli.render import print_json, print_table, say, say_error
from mesh.cli.run import AsModule, Ref, gateway_for_app, import_errors, say_app, usable_server
from mesh.config import Settings, parse_size
from mesh.exception import Error, InvalidError, NotFoundError
from mesh.source import Source


def _gateway(
    env: Env = None,
    url: Url = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="8700, or the next free one, by default.")] = None,
    max_body: Annotated[str, typer.Option("--max-body", help="What a request may bring.")] = "4G",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log only what is wrong, and no requests.")] = False,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Put the web functions of an environment on HTTP, at /<app>/<function>/, until told to stop.

    SIGTERM or Ctrl-C lets requests under way end first. Workers need no open port: it speaks to them over NATS.
    """
    from mesh.gateway import address_of, bind, serve

    settings = Settings.load({"environment": env, "nats_url": url}).with_server()
    try:
        limit = parse_size(max_body)
    except ValueError:
        raise InvalidError(f"--max-body must be a size such as 100M, not {max_body!r}") from None
    set_up_logging(settings, quiet=quiet, verbose=False)
    listening = bind(host, port)

    def ready() -> None:
        if not quiet:
            say(f"[bold]web functions are at[/] {address_of(listening)}/<app>/<function>")
        if ready_fd is not None:
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    async def work() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        broker = await Broker.open(settings, role="gateway")
        try:
            async with translated("starting the gateway"):
                await broker.ensure()
                await serve(
                    *(broker, listening, stop),
                    max_body=limit,
                    grace=settings.grace,
                    access_log=not quiet,
                    ready=ready,
                )
        finally:
            await broker.close()

    background.run(work())


tokens = typer.Typer(help="Tokens that open web functions with requires_proxy_auth=True.", no_args_is_help=True)


@tokens.command()
def create(env: Env = None, url: Url = None, json: Json = False) -> None:
    """Make a token. Its secret is shown this once: only a digest of it is kept."""
    from mesh.places import digest_of, new_token  # with starlette, which takes its time

    key, secret = new_token()
    with_broker(env, url, lambda broker: broker.web.add_token(key, digest_of(secret)))
    if json:
        print_json({"key": key, "secret": secret})
    else:
        say(f"[green]✓[/] send these headers:\nMesh-Key: {key}\nMesh-Secret: {secret}")


@tokens.command("list")
def list_tokens(env: Env = None, url: Url = None, json: Json = False) -> None:
    """List the keys of tokens."""
    keys = sorted(with_broker(env, url, lambda broker: broker.web.tokens()))
    if json:
        print_json([{"key": key} for key in keys])
    else:
        print_table(("Key",), [(key,) for key in keys], "there is no token; `mesh proxy-token create` makes one")


@tokens.command()
def delete(
    key: Annotated[str, typer.Argument(help="Its key.", metavar="KEY")], env: Env = None, url: Url = None
) -> None:
    """Forget a token: within five seconds it opens nothing any more."""
    if not with_broker(env, url, lambda broker: broker.web.remove_token(key)):
        raise NotFoundError(f"there is no proxy token {key!r}; `mesh proxy-token list` shows those that there are")
    say(f"[green]✓[/] {key} is forgotten")


def _serve(
    ref: Ref,
    env: Env = None,
    url: Url = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name of the app, for people.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="End after so many seconds.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Put the time before each line of output.")] = False,
    as_module: AsModule = False,
) -> None:
    """Run an app with web functions until Ctrl-C, and run it anew whenever its source changes.

    The file and the local modules it imports are watched. Where the new source cannot be imported, the error is shown,
    and the last version that could goes on.
    """
    reference = Reference.parse(ref, is_module=as_module)
    settings = Settings.load({"environment": env, "nats_url": url})
    context.show_times(timestamps)
    source = Source(reference.load)
    with import_errors():
        app = find_app(source.load(), reference.name)
    with usable_server(settings, quiet=False) as usable:
        client.use_settings(usable)
        with context.enable_output(), app.run(name=name), gateway_for_app(app):
            say(f"[green]✓[/] {app.description} is on the mesh as {app.app_id}; Ctrl-C ends it")
            say_app(app)
            wire, deadline = str(app.app_id), math.inf if timeout is None else time.monotonic() + timeout
            with contextlib.suppress(KeyboardInterrupt), _ended_by_sigterm():
                while source.changed(deadline):
                    _run_anew(source, reference, name, wire)
    say(f"[green]✓[/] {app.description} is off the mesh")


def _run_anew(source: Source, reference: Reference, name: str | None, wire: str) -> None:
    """Put the changed source in the place of what runs, if it can be imported."""
    began = time.monotonic()
    try:
        with import_errors():
            app = find_app(source.load(), reference.name)
        bridge().run(_replace(app, name, wire))
    except typer.Exit:
        say("[yellow]![/] the last good version goes on")
    except Error as error:
        say_error(str(error))
        say("[yellow]![/] the last good version goes on")
    else:
        say(f"[green]✓[/] {app.description} runs anew ({time.monotonic() - began:.2f} s)")
        say_app(app)


async def _replace(app: App, name: str | None, wire: str) -> None:
    await app.start_run(await client.broker(), name or app.description, wire)


@contextlib.contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """SIGTERM ends the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def register(root: typer.Typer) -> None:
    """Add the commands."""
    root.command("gateway")(_gateway)
    root.add_typer(tokens, name="proxy-token")
    root.command("serve")(_serve)
