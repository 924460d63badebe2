"""`mesh run` and `mesh deploy`: a user's file onto the mesh, for once or to stay."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from mesh import client, context
from mesh._sync import bridge
from mesh.app import App, LocalEntrypoint
from mesh.cli.entry import Reference, Runnable, find_app, find_runnable, parse_flags
from mesh.cli.options import Env, Url
from mesh.cli.render import ExitCode, exit_code, say, say_error, say_exception
from mesh.config import NO_SERVER, Settings
from mesh.deploy import Deployment, ImportFailed
from mesh.exception import ConflictError, ConnectionError, Error, InvalidError, ServiceError, UnimplementedError
from mesh.place import path_of, web_url
from mesh.spec import FunctionSpec

Ref = Annotated[str, typer.Argument(help="file.py, or file.py::name.", metavar="REF")]
AsModule = Annotated[bool, typer.Option("-m", help="REF is a module, such as package.module.")]


def _run(
    words: typer.Context,
    ref: Ref,
    env: Env = None,
    url: Url = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name of the app, for people.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only output and errors.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave the app running when this ends.")] = False,
    write_result: Annotated[Path | None, typer.Option("--write-result", "-w", help="Write the value here.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Put the time before each line of output.")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", hidden=True)] = False,
    as_module: AsModule = False,
) -> None:
    """Run a function of a file: its local entrypoint here, everything it calls on the mesh.

    Options of `run` stand before REF; what follows it are flags made from the function's parameters.
    """
    if interactive:
        raise UnimplementedError("mesh run --interactive is not built yet")
    reference = Reference.parse(ref, is_module=as_module)
    with import_errors():
        module = reference.load()
    app, runnable = find_runnable(module, reference.name)
    if not isinstance(runnable, LocalEntrypoint) and runnable.is_generator:
        raise InvalidError(
            f"{runnable.name!r} is a generator function, which `mesh run` cannot run: iterate over "
            f"{runnable.name}.remote_gen(…) in a local entrypoint, and run that"
        )
    args, kwargs = parse_flags(runnable, f"mesh run {ref}", words.args)
    settings = Settings.load({"environment": env, "nats_url": url})
    context.show_times(timestamps)
    with usable_server(settings, quiet) as usable:
        client.use_settings(usable)
        value = _run_on_mesh(app, runnable, args, kwargs, name=name, quiet=quiet, detach=detach)
    if write_result is not None:
        _write(write_result, value)


def _run_on_mesh(
    app: App,
    runnable: Runnable,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    name: str | None,
    quiet: bool,
    detach: bool,
) -> Any:
    """Put the app on the mesh, run what was asked for, and take it off again."""
    began = time.monotonic()
    with context.enable_output(), app.run(name=name, detach=detach), gateway_for_app(app):
        if not quiet:
            say(f"[green]✓[/] {app.description} is on the mesh as {app.app_id} ({time.monotonic() - began:.2f} s)")
            say_app(app)
        try:
            value = _call(runnable, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the user's code raised
            _say_user_error(error)
            raise typer.Exit(exit_code(error)) from None
    if not quiet:
        say(f"[green]✓[/] {app.description} completed")
    return value


def gateway_for_app(app: App) -> contextlib.AbstractContextManager[None]:
    """A gateway while an app runs that has web functions, where none is running."""
    from mesh.up import gateway_for

    if not app.registered_web_endpoints:
        return contextlib.nullcontext()

    async def gateways() -> list[str]:
        return await (await client.broker()).web.gateways()

    return gateway_for(client.settings(), running=bool(bridge().run(gateways())))


def say_app(app: App) -> None:
    """Show what an app that runs has."""
    for name, function in sorted(app.registered_functions.items()):
        if function.spec.web is None:
            say(f"[dim]├[/] function {name}")
    for name, cls in sorted(app.registered_classes.items()):
        say(f"[dim]├[/] class {name} [dim]({', '.join(cls.spec.methods or ())})[/]")
    functions, classes = app.registered_functions.values(), app.registered_classes.values()
    for spec in (*(f.spec for f in functions), *(c.spec for c in classes)):
        _say_webs(str(app.app_id), app.description, spec)


def _say_webs(app: str, name: str, spec: FunctionSpec) -> None:
    """Show where on the web a function is, or what of a class is."""
    for function, web in spec.webs.items():
        own = web.hosts(app, name, function) if web.label or web.domains else []
        hosts = f" [dim](or, by name, {', '.join(own)})[/]" if own else ""
        say(f"[dim]├[/] web function {function} → [bold]{_web_url(app, name, function)}[/]{hosts}")


def _call(runnable: Runnable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(runnable, LocalEntrypoint):
        return runnable.remote(*args, **kwargs)
    value = runnable(*args, **kwargs)
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def _say_user_error(error: Exception) -> None:
    """The traceback from the user's first frame on; what mesh itself says needs none."""
    frames = error.__traceback__
    while frames is not None and not _is_users(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    if frames is None or (isinstance(error, Error) and not getattr(error, "__notes__", None)):
        say_exception(error)
    else:
        sys.stderr.write("".join(traceback.TracebackException(type(error), error, frames).format()))


def _is_users(filename: str) -> bool:
    from mesh.bundle import is_local

    return not filename.startswith("<") and is_local(Path(filename))


def _write(path: Path, value: Any) -> None:
    if not isinstance(value, str | bytes):
        raise InvalidError(f"--write-result takes a str or bytes, and the function returned {type(value).__name__}")
    path.write_bytes(value.encode() if isinstance(value, str) else value)


@contextlib.contextmanager
def usable_server(settings: Settings, quiet: bool) -> Generator[Settings]:
    """The mesh that is configured or running; else one for the length of this run, on this user's own data."""
    from mesh.up import for_one_run, store_of

    if settings.nats_url:
        yield settings
        return
    if not quiet:
        say(f"[dim]no mesh is running: starting one for this run (data in {store_of(settings)})[/]")
    with for_one_run(settings) as local:
        try:
            yield local
        finally:
            bridge().run(client.close())


@contextlib.contextmanager
def import_errors() -> Generator[None]:
    """What a user's module raised is shown from their own code on; it is their failure, not a wrong use."""
    try:
        yield
    except ImportFailed as error:
        if error.__cause__ is not None:
            _say_import_error(error.__cause__)
        say_error(str(error))
        raise typer.Exit(ExitCode.FAILED) from None


def _say_import_error(cause: BaseException) -> None:
    frames = cause.__traceback__
    while frames is not None and not _is_users(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    sys.stderr.write("".join(traceback.TracebackException(type(cause), cause, frames).format()))


def _deploy(
    ref: Ref,
    env: Env = None,
    url: Url = None,
    name: Annotated[str | None, typer.Option("--name", help="Deploy under this name.")] = None,
    tag: Annotated[str, typer.Option("--tag", help="Kept with the version.")] = "",
    strategy: Annotated[str, typer.Option("--strategy", help="rolling, or recreate.")] = "rolling",
    as_module: AsModule = False,
) -> None:
    """Deploy an app: from now on its functions are found by name, and workers run this code."""
    began = time.monotonic()
    reference = Reference.parse(ref, is_module=as_module)
    with import_errors():
        module = reference.load()
    app = find_app(module, reference.name)
    settings = Settings.load({"environment": env, "nats_url": url})
    if not settings.nats_url:
        raise ConnectionError(NO_SERVER)
    client.use_settings(settings)
    try:
        deployment = bridge().run(app.deploy_as(name, env, tag, strategy))
    except ConflictError as error:
        say_error(str(error))
        raise typer.Exit(ExitCode.REFUSED) from None
    _say_deployment(deployment, time.monotonic() - began)


def _say_deployment(deployment: Deployment, seconds: float) -> None:
    head = deployment.head
    for record in deployment.records:
        how = f"by value, for Python {record.code.python} only" if record.code.by_value else record.code.module
        kind = "function" if record.spec.methods is None else "class"
        say(f"[dim]├[/] {kind} {record.spec.name} [dim]({how}, {record.version[:12]})[/]")
        _say_webs(head.app, head.name, record.spec)
    for gone in deployment.removed:
        say(f"[dim]├[/] [yellow]removed {gone}[/]: it takes no more calls, its queued ones fail")
    if deployment.changed:
        say(f"[green]✓[/] {head.name} is deployed as version {head.version} in {seconds:.2f} s")
    else:
        say(f"[green]✓[/] {head.name} has not changed: version {head.version} stays ({seconds:.2f} s)")


def _web_url(app: str, name: str, function: str) -> str:
    """Where a web function is; what to do where no gateway runs."""

    async def read() -> str:
        return await web_url(await client.broker(), app, function)

    try:
        return bridge().run(read())
    except ServiceError as error:
        return f"{path_of(app, name, function)}, below the address of a gateway ({error})"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    run_settings = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command("run", context_settings=run_settings)(_run)
    app.command("deploy")(_deploy)
