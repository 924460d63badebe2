"""The `mesh` command: parse, one call, print. One file a noun; what a command does is done elsewhere."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn

import typer

import mesh
from mesh.cli import apps, calls, check, configuration, dead, run, secrets, web, workers
from mesh.cli.render import ExitCode, exit_code, say_error
from mesh.exception import Error, NotReadyError, ServerWarning

app = typer.Typer(
    name="mesh",
    help="A self-hosted, Modal-shaped job queue on NATS JetStream.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.register(app)
workers.register(app)
web.register(app)
check.register(app)
app.add_typer(apps.app, name="app")
app.add_typer(calls.app, name="call")
app.add_typer(dead.app, name="dead")
app.add_typer(secrets.app, name="secret")
app.add_typer(configuration.app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mesh {mesh.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version, and exit.", is_eager=True, callback=_print_version
    ),
) -> None: ...


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """What the mesh wants its user to know, in a line; other warnings of Python stay as they are."""
    if issubclass(category, ServerWarning):
        say_error(str(message), "note")
    else:
        sys.stderr.write(f"{category.__name__}: {message}\n")


def main() -> NoReturn:
    """Run a command; every way it can end has an exit code of its own."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # fewer parameters than Python passes by name
    try:
        app(standalone_mode=True)
        code = ExitCode.DONE
    except (Error, NotReadyError) as error:
        say_error(str(error))
        code = exit_code(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:  # `mesh call list | head`
        sys.stderr.close()
        code = ExitCode.DONE
    sys.exit(code)
