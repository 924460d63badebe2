"""`mesh dead`: what failed for good, with its arguments."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import typer

from mesh import dead
from mesh.broker import Broker, Stored, translated
from mesh.cli.options import (
    AppName,
    Env,
    ErrorText,
    FunctionName,
    Json,
    Since,
    Until,
    Url,
    Yes,
    confirm,
    parse_filter,
    with_broker,
)
from mesh.cli.render import (
    ExitCode,
    ago,
    as_json,
    exit_code,
    print_facts,
    print_json,
    print_table,
    say,
    say_error,
)
from mesh.dead import Letter
from mesh.exception import Error, InvalidError, NotFoundError
from mesh.protocol import Format, format_time
from mesh.status import Filter, find_status

app = typer.Typer(help="See, send again and forget what failed for good.", no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="Ids of calls, or numbers of letters.", metavar="[CALL]...")]
Again = Annotated[bool, typer.Option("--again", help="Also what was sent again before.")]
Found = list[tuple[Letter, Stored]]

_TOGETHER = 64  # letters that are worked on at once


@app.command("list")
def list_letters(
    env: Env = None,
    url: Url = None,
    json: Json = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="How many at most.")] = 50,
    app_name: AppName = "",
    function: FunctionName = "",
    error: ErrorText = "",
    since: Since = "",
    until: Until = "",
) -> None:
    """List what failed for good, newest first."""
    wanted = parse_filter(app_name, function, error, since, until)
    found = with_broker(env, url, lambda broker: _select(broker, [], wanted, limit + 1))
    letters, cut = [letter for letter, _ in found[:limit]], len(found) > limit
    if json:
        print_json({"letters": [_facts(letter) for letter in letters], "cut": cut})
        return
    rows = [
        (letter.name, f"{letter.app}.{letter.function}" if letter.app else "(no call)", letter.state, ago(letter.died),
         letter.requeued_as, letter.error)
        for letter in letters
    ]  # fmt: skip
    print_table(("Call", "Function", "State", "Died", "Sent again as", "Error"), rows, "no dead letters")
    if cut:
        say_error(f"only the newest {limit} are shown; --limit shows more", "note")


def _facts(letter: Letter) -> dict[str, Any]:
    return as_json(letter)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A call's id, or a letter's number.", metavar="CALL")],
    env: Env = None,
    url: Url = None,
    json: Json = False,
) -> None:
    """Show a dead letter: why it died, and its arguments as far as they are text."""
    found = with_broker(env, url, lambda broker: _select(broker, [name], Filter()))
    if json:
        print_json([{**_facts(letter), "headers": dict(stored.headers)} for letter, stored in found])
        return
    for letter, stored in found:
        print_facts(
            {
                "call": letter.call,
                "letter": str(letter.number),
                "function": f"{letter.app}.{letter.function}" if letter.app else "",
                "state": letter.state,
                "error": letter.error,
                "died": format_time(letter.died),
                "sent again as": letter.requeued_as,
                "subject": letter.subject,
                "arguments": _arguments(letter, stored),
            }
        )


def _arguments(letter: Letter, stored: Stored) -> str:
    if stored.headers.get("Mesh-Format", Format.JSON) == Format.JSON and 0 < len(stored.body) <= 4096:
        return stored.body.decode("utf-8", "replace")
    where = f", in the object {letter.blob}" if letter.blob else ""
    return letter.preview or f"{letter.size:,} bytes ({stored.headers.get('Mesh-Format', 'json')}{where})"


@app.command()
def requeue(
    names: Names = None,
    env: Env = None,
    url: Url = None,
    json: Json = False,
    app_name: AppName = "",
    function: FunctionName = "",
    error: ErrorText = "",
    since: Since = "",
    until: Until = "",
    all_: Annotated[bool, typer.Option("--all", help="Everything there is.")] = False,
    again: Again = False,
    yes: Yes = False,
) -> None:
    """Send dead letters again, each as a new call; the letters stay, marked."""
    wanted = parse_filter(app_name, function, error, since, until)
    _check_choice(names, wanted, all_)
    send_again(names or [], wanted, env, url, json, again=again, yes=yes)


def send_again(
    names: Sequence[str], wanted: Filter, env: str | None, url: str | None, json: bool, *, again: bool, yes: bool
) -> None:
    """Send the letters again that are named, or that match: for `mesh dead requeue` and `mesh call retry`."""
    found = with_broker(env, url, lambda broker: _select(broker, names, wanted))
    if not names and not again:
        found = [(letter, stored) for letter, stored in found if letter.call and not letter.requeued_as]
    if not names:
        confirm(f"Send {_count(found)} again?", yes)

    async def one(broker: Broker, letter: Letter, stored: Stored) -> dict[str, str]:
        return {"call": letter.name, "new_call": await dead.requeue(broker, letter, stored, again=again)}

    _report(with_broker(env, url, lambda broker: _each(broker, found, one)), "sent again", json)


@app.command()
def purge(
    names: Names = None,
    env: Env = None,
    url: Url = None,
    json: Json = False,
    app_name: AppName = "",
    function: FunctionName = "",
    error: ErrorText = "",
    since: Since = "",
    until: Until = "",
    all_: Annotated[bool, typer.Option("--all", help="Everything there is.")] = False,
    yes: Yes = False,
) -> None:
    """Forget dead letters, and with them their arguments."""
    wanted = parse_filter(app_name, function, error, since, until)
    _check_choice(names, wanted, all_)
    found = with_broker(env, url, lambda broker: _select(broker, names or [], wanted))
    confirm(f"Forget {_count(found)} and their arguments?", yes)

    async def one(broker: Broker, letter: Letter, stored: Stored) -> dict[str, str]:
        await dead.purge(broker, letter)
        return {"call": letter.name}

    _report(with_broker(env, url, lambda broker: _each(broker, found, one)), "forgotten", json)


def _check_choice(names: Sequence[str] | None, wanted: Filter, everything: bool) -> None:
    if not names and wanted == Filter() and not everything:
        raise InvalidError("say which: ids, --app, --function, --error, --since, --until, or --all")


def _count(found: Found) -> str:
    return f"{len(found):,} dead letter{'' if len(found) == 1 else 's'}"


async def _select(broker: Broker, names: Sequence[str], wanted: Filter, limit: int | None = None) -> Found:
    """The letters that are named, or else those that match."""
    async with translated("reading dead letters"):
        if not names:
            found: Found = []
            async for pair in dead.letters(broker, wanted):
                found.append(pair)
                if len(found) == limit:
                    break
            return found
        return [pair for name in names for pair in await _named(broker, name)]


async def _named(broker: Broker, name: str) -> Found:
    found = await dead.find(broker, name)
    if not found:
        status = await find_status(broker, name) if name.startswith("fc-") else None
        known = f"; the call is {status.state}, and only what failed for good keeps its arguments" if status else ""
        raise NotFoundError(f"there is no dead letter {name!r}{known}")
    return found


async def _each(
    broker: Broker, found: Found, work: Callable[[Broker, Letter, Stored], Awaitable[dict[str, str]]]
) -> list[dict[str, str] | tuple[str, Error]]:
    """Do something with each of these, many at once; an error takes the place of what it came to."""
    room = asyncio.Semaphore(_TOGETHER)

    async def one(letter: Letter, stored: Stored) -> dict[str, str] | tuple[str, Error]:
        async with room:
            try:
                async with translated(f"working on {letter.name}"):
                    return await work(broker, letter, stored)
            except Error as error:
                return letter.name, error

    return await asyncio.gather(*(one(letter, stored) for letter, stored in found))


def _report(done: Sequence[dict[str, str] | tuple[str, Error]], word: str, json: bool) -> None:
    """Say what was done and what was not; the exit code is that of the first error."""
    good = [entry for entry in done if isinstance(entry, dict)]
    bad = [entry for entry in done if isinstance(entry, tuple)]
    if json:
        print_json([*good, *({"call": name, "error": str(error)} for name, error in bad)])
    else:
        print_table(("Call", "New call"), [tuple(entry.values()) for entry in good if len(entry) > 1], "")
        say(f"[green]✓[/] {len(good):,} {word}" if good or not bad else f"none {word}")
        for _, error in bad:
            say_error(str(error))
    if bad:
        raise typer.Exit(exit_code(bad[0][1]) or ExitCode.FAILED)
