"""`mesh app`: what is deployed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mesh import deploy
from mesh.broker import Broker, translated
from mesh.cli.options import Env, Json, Url, Yes, confirm, with_broker
from mesh.cli.render import ago, print_json, print_table, say
from mesh.exception import NotFoundError
from mesh.records import AppHead, AppState

app = typer.Typer(help="See and stop what is deployed.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The app's name.", metavar="APP")]


def _facts(head: AppHead) -> dict[str, Any]:
    return {
        "app": head.app,
        "name": head.name,
        "state": head.state.value,
        "version": head.version,
        "functions": sorted(head.functions),
        "deployed_at": head.deployed_at,
        "deployed_by": head.deployed_by,
        "commit": head.commit,
        "tag": head.tag,
    }


@app.command("list")
def list_apps(
    env: Env = None,
    url: Url = None,
    json: Json = False,
    all_: Annotated[bool, typer.Option("--all", "-a", help="Also apps that were stopped.")] = False,
) -> None:
    """List the apps of an environment."""

    async def read(broker: Broker) -> list[AppHead]:
        async with translated("listing apps"):
            heads = await broker.registry.heads()
        return sorted(heads.values(), key=lambda head: -head.deployed_at)

    heads = [head for head in with_broker(env, url, read) if all_ or head.state is not AppState.STOPPED]
    if json:
        print_json([_facts(head) for head in heads])
        return
    rows = [
        (h.app, h.name if h.name != h.app else "", h.state.value, f"v{h.version}", ", ".join(sorted(h.functions)),
         ago(h.deployed_at), h.deployed_by, h.commit)
        for h in heads
    ]  # fmt: skip
    columns = ("App", "Name", "State", "Version", "Functions", "Deployed", "By", "Commit")
    print_table(columns, rows, "no app is deployed; `mesh deploy FILE` deploys one")


@app.command()
def history(name: Name, env: Env = None, url: Url = None, json: Json = False) -> None:
    """List the deployments of an app, newest first."""

    async def read(broker: Broker) -> list[AppHead]:
        async with translated(f"reading the history of {name}"):
            return await broker.registry.history(name)

    heads = with_broker(env, url, read)
    if not heads:
        raise NotFoundError(f"no app {name!r} was ever deployed here")
    if json:
        print_json([_facts(head) for head in heads])
        return
    rows = [(f"v{h.version}", h.state.value, ago(h.deployed_at), h.deployed_by, h.commit, h.tag) for h in heads]
    print_table(("Version", "State", "Deployed", "By", "Commit", "Tag"), rows, "")


@app.command()
def stop(name: Name, env: Env = None, url: Url = None, yes: Yes = False) -> None:
    """Stop an app: it takes no more calls, queued ones end failed with that reason, running ones finish."""
    confirm(f"Stop {name!r}? Its queued calls will fail.", yes)

    async def end(broker: Broker) -> None:
        if name.startswith("ap-"):
            await deploy.end_run(broker, name)
        else:
            async with translated(f"stopping {name}"):
                await deploy.stop_app(broker, name)

    with_broker(env, url, end)
    say(f"[green]✓[/] {name} is stopped")
