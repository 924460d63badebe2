"""`mesh secret`: what only the functions that name it get."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mesh import vault
from mesh.broker import Broker
from mesh.cli.options import Env, Json, Url, Yes, confirm, with_broker
from mesh.cli.render import ago, print_json, print_table, say
from mesh.exception import InvalidError
from mesh.records import SecretRecord
from mesh.secret import read_dotenv

app = typer.Typer(help="Store, see and delete secrets; change their key.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The secret's name.", metavar="NAME")]


@app.command()
def create(
    name: Name,
    values: Annotated[
        list[str] | None,
        typer.Argument(help="Variables; `KEY=-` asks for the value, or reads it from stdin.", metavar="[KEY=VALUE]..."),
    ] = None,
    from_dotenv: Annotated[
        Path | None, typer.Option("--from-dotenv", help="Take the variables of a .env file.")
    ] = None,
    from_json: Annotated[Path | None, typer.Option("--from-json", help="Take them from a JSON object.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace one of this name, with all its variables.")] = False,
    env: Env = None,
    url: Url = None,
    json: Json = False,
) -> None:
    """Store a secret: variables for the containers of functions that name it. Values are sealed on this machine."""
    variables = {**_of_file(from_dotenv, from_json), **dict(map(_variable, values or []))}
    with_broker(env, url, lambda broker: vault.create(broker, name, variables, replacing=force))
    if json:
        print_json({"name": name, "keys": sorted(variables)})
    else:
        say(f"[green]✓[/] stored {name} with {', '.join(sorted(variables))}; use it by mesh.Secret.from_name({name!r})")


def _of_file(dotenv: Path | None, json_file: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, read in ((dotenv, read_dotenv), (json_file, _read_json)):
        if path is not None:
            if not path.is_file():
                raise InvalidError(f"there is no file {path}")
            found |= read(path)
    return {variable: value for variable, value in found.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json_module.loads(path.read_text())
    except ValueError as error:
        raise InvalidError(f"{path} is no JSON: {type(error).__name__}") from None
    if not isinstance(values, dict):
        raise InvalidError(f"{path} must hold a JSON object of strings")
    return values


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not given:
        raise InvalidError("variables are given as KEY=VALUE, or KEY=- to be asked for the value")
    if value == "-":
        value = typer.prompt(name, hide_input=True) if sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
    return name, value


@app.command("list")
def list_secrets(env: Env = None, url: Url = None, json: Json = False) -> None:
    """List the secrets of an environment, and the names of their variables."""

    async def read(broker: Broker) -> list[SecretRecord]:
        return await broker.secrets.named()

    records = with_broker(env, url, read)
    if json:
        print_json([_facts(record) for record in records])
        return
    rows = [(r.name, ", ".join(sorted(r.sealed)), ago(r.made_at), r.made_by) for r in records]
    print_table(("Secret", "Variables", "Changed", "By"), rows, "there is no secret; `mesh secret create` makes one")


def _facts(record: SecretRecord) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(record).items() if name not in ("sealed", "public")}
    return {**kept, "keys": sorted(record.sealed)}


@app.command()
def delete(name: Name, env: Env = None, url: Url = None, yes: Yes = False, json: Json = False) -> None:
    """Forget a secret. Containers that run keep it; calls of functions that need it in another one wait."""
    confirm(f"Forget the secret {name!r}?", yes)
    with_broker(env, url, lambda broker: vault.delete(broker, name))
    if json:
        print_json({"name": name})
    else:
        say(f"[green]✓[/] {name} is forgotten")


@app.command()
def rotate(env: Env = None, url: Url = None, json: Json = False) -> None:
    """Change the key that secrets are sealed to, and seal all of them anew. Run it where the key file is.

    Workers with a copy of the file need the new one: until then, calls that need another container wait there.
    """

    async def change(broker: Broker) -> tuple[int, str]:
        key_file = broker.settings.key_file
        return await vault.rotate(broker, key_file), str(key_file)

    count, key_file = with_broker(env, url, change)
    if json:
        print_json({"sealed": count, "key_file": key_file})
    else:
        say(f"[green]✓[/] sealed {count:,} anew; copy {key_file} to every other worker")
