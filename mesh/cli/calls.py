"""`mesh call`: what was called, and what became of it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mesh import client
from mesh.broker import Broker, translated
from mesh.cli.options import Env, Json, Url, with_broker
from mesh.cli.render import (
    ago,
    as_json,
    duration,
    exit_code,
    print_facts,
    print_json,
    print_table,
    say_error,
    say_exception,
)
from mesh.config import Settings
from mesh.exception import InvalidError, NotFoundError, NotReadyError
from mesh.protocol import State, format_time, is_call_id
from mesh.sdk import FunctionCall
from mesh.status import CallStatus, Filter, find_status, recent

app = typer.Typer(help="See calls and their results.", no_args_is_help=True)

CallId = Annotated[str, typer.Argument(help="The call's id, fc-….", metavar="CALL")]


@app.command("list")
def list_calls(
    env: Env = None,
    url: Url = None,
    json: Json = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="How many at most.")] = 50,
    app_name: Annotated[str, typer.Option("--app", help="Only of this app.")] = "",
    function: Annotated[str, typer.Option("--function", help="Only of this function.")] = "",
    state: Annotated[str, typer.Option("--state", help=f"Only in this state: {', '.join(State)}.")] = "",
) -> None:
    """List the newest calls."""
    if state and state not in list(State):
        raise InvalidError(f"--state {state!r}: there are {', '.join(State)}")
    wanted = Filter(app=app_name, function=function, state=state)

    async def read(broker: Broker) -> tuple[list[CallStatus], bool]:
        async with translated("listing calls"):
            return await recent(broker, limit, wanted)

    found, cut = with_broker(env, url, read)
    if json:
        print_json({"calls": [_facts(status) for status in found], "cut": cut})
        return
    rows = [
        (s.call, f"{s.app}.{s.function}", s.state.value, ago(s.created), duration(s.started, s.finished),
         str(s.attempts), s.worker, s.last_error or s.preview)
        for s in found
    ]  # fmt: skip
    columns = ("Call", "Function", "State", "Created", "Took", "Tries", "Worker", "Error or arguments")
    print_table(columns, rows, "no calls")
    if cut:
        say_error(f"only the newest {len(found)} are shown; --limit shows more", "note")


def _facts(status: CallStatus) -> dict[str, Any]:
    return {**as_json(status), "state": status.state.value}


@app.command()
def show(call: CallId, env: Env = None, url: Url = None, json: Json = False) -> None:
    """Show what is known of a call."""
    _check_id(call)

    async def read(broker: Broker) -> CallStatus | None:
        async with translated(f"looking for {call}"):
            return await find_status(broker, call)

    status = with_broker(env, url, read)
    if status is None:
        raise NotFoundError(f"there is no call {call}: it was never made here, or its result is gone")
    if json:
        print_json(_facts(status))
        return
    print_facts(
        {
            "call": status.call,
            "function": f"{status.app}.{status.function}",
            "state": status.state.value,
            "tries": str(status.attempts),
            "created": format_time(status.created),
            "started": format_time(status.started) if status.started else "",
            "finished": format_time(status.finished) if status.finished else "",
            "took": duration(status.started, status.finished) if status.finished else "",
            "worker": status.worker,
            "arguments": status.preview,
            "last error": status.last_error,
            "waiting for": status.waiting_for,
        }
    )


@app.command()
def get(
    call: CallId,
    env: Env = None,
    url: Url = None,
    json: Json = False,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds to wait; 0 looks once.")] = None,
) -> None:
    """Wait for the value of a call, and print it: its `repr`, or JSON."""
    _check_id(call)
    client.use_settings(Settings.load({"environment": env, "nats_url": url}))
    handle = FunctionCall.from_id(call)
    try:
        value = handle.get(timeout=timeout)
    except NotReadyError:
        raise  # the call's own errors may be of any type, this one is the wait's
    except Exception as error:  # noqa: BLE001 - whatever the function raised
        say_exception(error)
        raise typer.Exit(exit_code(error)) from None
    if json:
        print_json(value)
    else:
        sys.stdout.write(f"{value if isinstance(value, str) else repr(value)}\n")


def _check_id(call: str) -> None:
    if not is_call_id(call):
        raise NotFoundError(f"there is no call {call!r}: a call's id is fc- and 26 characters")
