"""`mesh config`: what is set, and where it was set."""

from __future__ import annotations

import typer

from mesh.cli.options import Env, Json, Url
from mesh.cli.render import print_json, print_table
from mesh.config import FIELDS, Settings

app = typer.Typer(help="See the settings.", no_args_is_help=True)


@app.callback()
def _config() -> None:
    """See the settings."""


@app.command()
def show(env: Env = None, url: Url = None, json: Json = False) -> None:
    """Print each setting, its value, and where that came from. Passwords are left out."""
    settings = Settings.load({"environment": env, "nats_url": url})
    values = {name: str(getattr(settings, name)) for name in FIELDS}
    values["nats_url"] = settings.safe_url if settings.nats_url else ""
    values["container_url"] = "(set)" if settings.container_url else ""
    if json:
        print_json({name: {"value": value, "origin": settings.origin(name)} for name, value in values.items()})
        return
    rows = [(name, value, settings.origin(name), FIELDS[name].metadata["doc"]) for name, value in values.items()]
    print_table(("Setting", "Value", "From", "What it is"), rows, "")
