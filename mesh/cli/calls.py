"""`mesh call`: what was called, and what became of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mesh import client
from mesh.broker import Broker, translated
from mesh.call import FunctionCall
from mesh.cancel import cancel_call
from mesh.cli import dead
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
    ago,
    as_json,
    duration,
    exit_code,
    print_facts,
    print_json,
    print_table,
    say,
    say_error,
    say_exception,
)
from mesh.config import Settings
from mesh.exception import InvalidError, NotFoundError, NotReadyError
from mesh.protocol import CancelRequest, State, format_time, is_call_id
from mesh.status import CallStatus, Filter, find_call, recent, unfinished

app = typer.Typer(help="See calls and their results, cancel them, make them anew.", no_args_is_help=True)

_TOGETHER = 1024  # calls that are cancelled at once; most of the time each waits for workers that do not have it

CallId = Annotated[str, typer.Argument(help="The call's id, fc-….", metavar="CALL")]


@app.command("list")
def list_calls(
    env: Env = None,
    url: Url = None,
    json: Json = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="How many at most.")] = 50,
    app_name: AppName = "",
    function: FunctionName = "",
    state: Annotated[str, typer.Option("--state", help=f"Only in this state: {', '.join(State)}.")] = "",
    error: ErrorText = "",
    since: Since = "",
    until: Until = "",
) -> None:
    """List the newest calls."""
    wanted = parse_filter(app_name, function, error, since, until, state)

    async def read(broker: Broker) -> tuple[list[CallStatus], bool]:
        async with translated("listing calls"):
            return await recent(broker, limit, wanted)

    found, cut = with_broker(env, url, read)
    if json:
        print_json({"calls": [_facts(status) for status in found], "cut": cut})
        return
    rows = [
        (s.call, f"{s.app}.{s.function}", s.state.value, ago(s.created), duration(s.started, s.finished),
         str(s.attempts or ""), s.worker, _inputs(s) if s.inputs > 1 else s.last_error or s.preview)
        for s in found
    ]  # fmt: skip
    columns = ("Call", "Function", "State", "Created", "Took", "Tries", "Worker", "Error or arguments")
    print_table(columns, rows, "no calls")
    if len(found) == limit and cut:
        say_error(f"only the newest {limit} are shown; --limit shows more", "note")
    elif cut:
        say_error("a call made in the midst of one of many inputs may be missing here; its id finds it", "note")


def _facts(status: CallStatus) -> dict[str, Any]:
    return {**as_json(status), "state": status.state.value, "done": status.done}


@app.command()
@app.command("status", hidden=True)
def show(call: CallId, env: Env = None, url: Url = None, json: Json = False) -> None:
    """Show what is known of a call."""
    _check_id(call)

    async def read(broker: Broker) -> CallStatus | None:
        async with translated(f"looking for {call}"):
            return await find_call(broker, call)

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
            "inputs": _inputs(status).replace(" inputs", "", 1) if status.inputs != 1 else "",
            "state": status.state.value,
            "tries": str(status.attempts or ""),
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


def _inputs(status: CallStatus) -> str:
    counts = {"outstanding": status.outstanding, "failed": status.failed, "cancelled": status.cancelled}
    parts = [f"{status.done:,} done", *(f"{count:,} {name}" for name, count in counts.items() if count)]
    return f"{status.inputs:,} inputs{', and more coming' if status.submitting else ''}: {', '.join(parts)}"


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


@app.command()
def cancel(
    names: Annotated[list[str] | None, typer.Argument(help="Ids of calls.", metavar="[CALL]...")] = None,
    env: Env = None,
    url: Url = None,
    json: Json = False,
    app_name: AppName = "",
    function: FunctionName = "",
    error: ErrorText = "",
    since: Since = "",
    until: Until = "",
    terminate: Annotated[bool, typer.Option("--terminate", help="Kill their containers at once.")] = False,
    yes: Yes = False,
) -> None:
    """End calls: those named, or all that match. Returns once nothing of them runs."""
    wanted = parse_filter(app_name, function, error, since, until)
    if not names and wanted == Filter():
        raise InvalidError("say which: ids, --app, --function, --error, --since, or --until")
    for name in names or []:
        _check_id(name)

    async def matching(broker: Broker) -> list[str]:
        async with translated("looking for calls"):
            return [status.call async for status in unfinished(broker, wanted)]

    calls = names or with_broker(env, url, matching)
    if not names:
        confirm(f"Cancel {len(calls):,} call{'' if len(calls) == 1 else 's'}?", yes)
    request = CancelRequest(reason="by mesh call cancel", terminate=terminate)
    states = with_broker(env, url, lambda broker: _cancel_all(broker, calls, request))
    _report_cancelled(dict(zip(calls, states, strict=True)), json)


async def _cancel_all(broker: Broker, calls: Sequence[str], request: CancelRequest) -> list[State | None]:
    room = asyncio.Semaphore(_TOGETHER)

    async def one(call: str) -> State | None:
        async with room, translated(f"cancelling {call}"):
            return await cancel_call(broker, call, request=request)

    return await asyncio.gather(*map(one, calls))


def _report_cancelled(states: dict[str, State | None], json: bool) -> None:
    unknown = [call for call, state in states.items() if state is None]
    if json:
        print_json([{"call": call, "state": state.value if state else None} for call, state in states.items()])
    else:
        cancelled = sum(state is State.CANCELLED for state in states.values())
        say(f"[green]✓[/] {cancelled:,} cancelled")
        for call, state in states.items():
            if state not in (None, State.CANCELLED):
                say_error(f"{call} had ended before: it is {state}", "note")
    if unknown:
        raise NotFoundError(f"there is no call {', '.join(unknown)}: never made here, or its result is gone")


@app.command()
def retry(
    names: Annotated[list[str] | None, typer.Argument(help="Ids of calls.", metavar="[CALL]...")] = None,
    env: Env = None,
    url: Url = None,
    json: Json = False,
    app_name: AppName = "",
    function: FunctionName = "",
    error: ErrorText = "",
    since: Since = "",
    until: Until = "",
    again: dead.Again = False,
    yes: Yes = False,
) -> None:
    """Make failed calls anew, with their arguments: those named, or all that match. The old results stay."""
    wanted = parse_filter(app_name, function, error, since, until)
    if not names and wanted == Filter():
        raise InvalidError("say which: ids, --app, --function, --error, --since, or --until")
    for name in names or []:
        _check_id(name)
    dead.send_again(names or [], wanted, env, url, json, again=again, yes=yes)


def _check_id(call: str) -> None:
    if not is_call_id(call):
        raise NotFoundError(f"there is no call {call!r}: a call's id is fc- and 26 characters")
