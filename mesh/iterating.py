"""Reading the outputs of a call of several inputs in their order, in whatever process: many at a time where they are
there, and waiting for the first that is not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, TypeVar

from mesh import context
from mesh.exception import NotFoundError

if TYPE_CHECKING:
    from mesh.broker import Broker
    from mesh.call import FunctionCall
    from mesh.protocol import Result

R = TypeVar("R")

_WINDOW = 250  # results read at once
_LOOK_AGAIN = 1.0  # seconds between looks whether an input is still to be submitted, or there are no more
_SUBMITTED_LOOK = 30.0  # the same where all are submitted


async def outputs_of(call: FunctionCall[R], start: int, end: int | None) -> AsyncGenerator[list[R], None]:
    """The values from `start` to before `end`, some at a time.

    Raises:
        Exception: what an input raised, after the values before it.
    """
    broker = await call._broker()
    at = start
    while end is None or at < end:
        results = await _some(call, broker, at, at + _WINDOW if end is None else min(end, at + _WINDOW))
        if not results:
            return
        values: list[R] = []
        for result in results:
            try:
                values.append(await call._value(broker, result))
            except Exception:
                if values:
                    yield values
                raise
            if result.blob is not None:  # the next may be as large
                yield values
                values = []
        if values:
            yield values
        at += len(results)


async def _some(call: FunctionCall[R], broker: Broker, first: int, end: int) -> list[Result]:
    """The results from one on that are there without a gap, at least one; none behind the last input."""
    from mesh.broker import translated

    async with translated(f"reading the results of {call.object_id}"):
        keys = [call._key(index) for index in range(first, end)]
        found = await broker.results.answers(keys)
    results: list[Result] = []
    for key in keys:
        if key not in found:
            break
        results.append(found[key])
    if not results:
        waited = await _wait(call, broker, first)
        return [] if waited is None else [waited]
    return results


async def _wait(call: FunctionCall[R], broker: Broker, index: int) -> Result | None:
    """The result of an input, once it is there; `None` if the call has no such input."""
    waiter = await broker.results.expect(call._key(index))
    try:
        with context.waiting_in_mesh():
            while True:
                found, missing = await _look(call, broker, index)
                if found is not None:
                    return found
                record = await broker.several.get(call.object_id)  # after the look: its count is final
                if record is not None and record.count is not None and index >= record.count:
                    return None
                if missing is not None:
                    raise missing
                submitted = record is None or record.count is not None
                found = await waiter.wait(_SUBMITTED_LOOK if submitted else _LOOK_AGAIN)
                if found is not None:
                    return found
    finally:
        waiter.close()


async def _look(call: FunctionCall[R], broker: Broker, index: int) -> tuple[Result | None, NotFoundError | None]:
    """The result of an input if it is there, or why it cannot come."""
    try:
        return await call._look_quietly(broker, index), None
    except NotFoundError as error:
        return None, error
