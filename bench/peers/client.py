"""Measures one peer, in the peer's environment: `python -m peers.client MODULE`. Standard library only.

Reads a question a line, JSON as `{"do": "rate", "kind": "noop", "seconds": 1}`, and answers each with one line. Between
them the driver looks at what the processes have cost.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from peers.peer import Failed, Peer
from peers.work import argument, expected

PATIENCE = 30.0  # seconds until a result that does not come ends the measurement
_CHUNK = 1000


class Client:
    """What is measured, each method one figure."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.numbers = itertools.count(1)

    # --- getting ready -----------------------------------------------------------------------------------------------

    async def ready(self, workers: int) -> dict[str, Any]:
        """Wait until so many processes have run calls."""
        seen: set[int] = set()
        until = time.monotonic() + PATIENCE
        while len(seen) < workers and time.monotonic() < until:
            handles = [await self.peer.submit("who", 0) for _ in range(40)]
            seen.update(await self.peer.results(handles, PATIENCE))
        return {"workers": len(seen)}

    # --- figures -----------------------------------------------------------------------------------------------------

    async def submit_one(self, seconds: float) -> dict[str, Any]:
        """Submissions a second, one after the other."""
        began, count = time.perf_counter(), 0
        while (taken := time.perf_counter() - began) < seconds:
            await self.peer.submit("noop", next(self.numbers))
            count += 1
        return {"rate": count / taken, "count": count}

    async def submit_bulk(self, seconds: float) -> dict[str, Any]:
        """The same, a thousand at a time."""
        began, count = time.perf_counter(), 0
        while (taken := time.perf_counter() - began) < seconds:
            await self.peer.submit_many("noop", list(itertools.islice(self.numbers, _CHUNK)))
            count += _CHUNK
        return {"rate": count / taken, "count": count}

    async def rate(self, kind: str, seconds: float) -> dict[str, Any]:
        """Calls a second from the first submission to the last result, many under way, every result checked.

        How many fill the time is found out by running some, ever more; the last run counts.
        """
        count, total = 20, 20
        await self._burst(kind, count)  # warms up, and is dropped
        while True:
            taken = await self._burst(kind, count)
            total += count
            if taken >= 0.6 * seconds:
                return {"rate": count / taken, "count": count, "total": total}
            count = max(count + 1, min(10 * count, int(count / taken * seconds)))

    async def _burst(self, kind: str, count: int) -> float:
        values = [argument(kind, number) for number in itertools.islice(self.numbers, count)]
        began = time.perf_counter()
        outcomes = await self.peer.run_many(kind, values, PATIENCE)
        taken = time.perf_counter() - began
        check(kind, values, outcomes)
        return taken

    async def round_trips(self, seconds: float, most: int) -> dict[str, Any]:
        """Milliseconds from a submission to its result, one at a time."""
        taken: list[float] = []
        until = time.perf_counter() + seconds
        while len(taken) < 20 or (time.perf_counter() < until and len(taken) < most):
            value = next(self.numbers)
            began = time.perf_counter()
            outcome = await self.peer.outcome(await self.peer.submit("noop", value), PATIENCE)
            taken.append(1e3 * (time.perf_counter() - began))
            check("noop", [value], [outcome])
        return quantiles(taken)

    async def open_loop(self, rate: int, seconds: float) -> dict[str, Any]:
        """Milliseconds from the moment a call was due to its result, at a fixed rate whatever comes of it."""
        count = int(rate * seconds)
        values = list(itertools.islice(self.numbers, count))
        began = time.perf_counter() + 0.01
        due = [began + number / rate for number in range(count)]
        outcomes, ended = await (self._threads if self.peer.blocking else self._tasks)(values, due)
        check("noop", values, outcomes)
        achieved = count / (max(ended) - began)
        return {"achieved": achieved, **quantiles([1e3 * (end - at) for end, at in zip(ended, due, strict=True)])}

    async def _tasks(self, values: Sequence[Any], due: Sequence[float]) -> tuple[list[Any], list[float]]:
        """A task for each call."""

        async def one(value: Any) -> tuple[Any, float]:
            outcome = await self.peer.outcome(await self.peer.submit("noop", value), PATIENCE)
            return outcome, time.perf_counter()

        tasks = []
        for value, moment in zip(values, due, strict=True):
            if (wait := moment - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(value)))
        done = await asyncio.gather(*tasks)
        return [outcome for outcome, _ in done], [end for _, end in done]

    async def _threads(self, values: Sequence[Any], due: Sequence[float]) -> tuple[list[Any], list[float]]:
        """A thread that submits, and this one, which reads results in the order of their submission."""
        handles: list[Any] = []

        async def submit() -> None:
            for value, moment in zip(values, due, strict=True):
                if (wait := moment - time.perf_counter()) > 0:
                    time.sleep(wait)  # noqa: ASYNC251 - nothing else is on this loop
                handles.append(await self.peer.submit("noop", value))

        submitting = threading.Thread(target=asyncio.run, args=(submit(),))
        submitting.start()
        outcomes, ended = [], []
        for number in range(len(values)):
            while len(handles) <= number:
                if not submitting.is_alive() and len(handles) <= number:
                    raise RuntimeError("submitting ended early; see above")
                time.sleep(0.0005)  # noqa: ASYNC251
            outcomes.append(await self.peer.outcome(handles[number], PATIENCE))
            ended.append(time.perf_counter())
        submitting.join()
        return outcomes, ended

    # --- while things are killed -------------------------------------------------------------------------------------

    async def chaos(self, ledger: str, rate: int, seconds: float, patience: float) -> dict[str, Any]:
        """Submit at a fixed rate while the driver kills, then look for every result for as long as `patience`."""
        accepted: dict[int, tuple[Any, float]] = {}
        refused = 0
        began = time.time()
        for number in range(int(rate * seconds)):
            if (wait := began + number / rate - time.time()) > 0:
                await asyncio.sleep(wait)
            try:
                accepted[number] = (
                    await asyncio.wait_for(self.peer.submit("ledger", [ledger, number]), 5),
                    time.time(),
                )
            except Exception:  # noqa: BLE001 - whatever the peer raises, the caller was told no
                refused += 1
        until = time.time() + patience
        lost = [
            number for number, (handle, _) in accepted.items() if not await self._ends(handle, [ledger, number], until)
        ]
        submitted = {number: at for number, (_, at) in accepted.items()}
        return {"accepted": submitted, "refused": refused, "lost": lost}

    async def _ends(self, handle: Any, value: Any, until: float) -> bool:
        """Whether its result can be read, asking again after errors and after a while, as a patient caller would: what
        tells of results may have been lost with the server, where the results were not."""
        while True:
            left = max(0.1, min(3.0, until - time.time()))
            try:
                return bool(await asyncio.wait_for(self.peer.result(handle, left), left + 5) == value)
            except Exception:  # noqa: BLE001 - a lost connection, or no result yet
                if time.time() >= until:
                    return False
                await asyncio.sleep(0.2)


def check(kind: str, values: Sequence[Any], outcomes: Sequence[Any]) -> None:
    """Raises ValueError where a result is not what it has to be."""
    for value, outcome in zip(values, outcomes, strict=True):
        wanted = expected(kind, value)
        right = isinstance(outcome, Failed) if wanted is ValueError else outcome == wanted
        if not right:
            raise ValueError(f"{kind} of {str(value)[-20:]!r} came to {str(outcome)[-200:]!r}")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"p{percent}": ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] for percent in (50, 95, 99)
    } | {"count": len(ordered)}


async def serve(module: str, answer: Callable[[str], None]) -> None:
    """Answer questions until there are no more."""
    client = Client(importlib.import_module(f"peers.{module}").Client())
    await client.peer.open()
    answer("{}")
    while line := await asyncio.to_thread(sys.stdin.readline):
        question = json.loads(line)
        ask = getattr(client, question.pop("do"))
        try:
            answer(json.dumps(await ask(**question)))
        except Exception:  # noqa: BLE001 - told to the driver, which writes it into the table
            answer(json.dumps({"error": traceback.format_exc(limit=-3)}))
    await client.peer.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w", buffering=1)  # ours alone: what libraries print goes to the log
    os.dup2(2, 1)
    run(serve(sys.argv[1], lambda line: print(line, file=out)))
    os._exit(0)  # threads of clients that do not end
