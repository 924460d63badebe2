"""A client: a process with many lanes, each of which makes one call after another until the process is told to stop.

`python -m tests.chaos.clients NAME SEED DIRECTORY`, with the settings in its environment.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import signal
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mesh import Function, FunctionCall
from mesh.exception import ConnectionError, NotReadyError
from tests.chaos.kinds import KINDS, Kind, payload, raised, told
from tests.chaos.ledger import Ledger

LANES = 24  # of which a third use the blocking face, each in a thread
_HOW = ("spawn", "spawn", "spawn", "remote", "leave")
_PAUSE = (0.0, 0.2)  # seconds between two calls of a lane

Face = Callable[..., Coroutine[Any, Any, Any]]


class Client:
    """Makes calls, and writes down what becomes of them."""

    def __init__(self, name: str, seed: int, directory: Path) -> None:
        self._name = name
        self._directory = directory
        self._ledger = Ledger(directory / f"ledger-{name}")
        self._chance = random.Random(f"{seed} {name}")
        self._numbers = itertools.count(1)
        self._deck: list[Kind] = []
        self._stopping = asyncio.Event()
        self._threads = ThreadPoolExecutor(LANES // 3)

    async def run(self) -> None:
        """Until SIGTERM; then every lane finishes the call it is at."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopping.set)
        await asyncio.gather(*(self._lane(_blocking(self._threads) if n % 3 == 0 else _aio) for n in range(LANES)))

    async def _lane(self, face: Callable[[Any], Face]) -> None:
        while not self._stopping.is_set():
            await self._one(self._draw(), face)
            await asyncio.sleep(self._chance.uniform(*_PAUSE))

    def _draw(self) -> Kind:
        """The next kind, from a shuffled deck that holds each as often as its share says."""
        if not self._deck:
            self._deck = [kind for kind in KINDS.values() for _ in range(kind.share)]
            self._chance.shuffle(self._deck)
        return self._deck.pop()

    async def _one(self, kind: Kind, face: Callable[[Any], Face]) -> None:
        nonce, n = f"{self._name}-{next(self._numbers)}", self._chance.randrange(1_000_000)
        how = self._chance.choice(_HOW)
        data = (payload(n),) if kind.name == "large" else ()
        self._ledger.write("try", nonce, kind=kind.name, n=n, how=how)
        function: Function[..., Any] = Function.from_name("chaos", kind.name)
        submit = face(function.remote if how == "remote" else function.spawn)
        try:
            answer = await submit(str(self._directory), nonce, n, *data)
        except ConnectionError as error:
            # With an id, it may have been accepted; without, the function was not even looked up.
            found = re.search(r"fc-\w{26}", str(error))
            if found:
                self._ledger.write("unsure", nonce, call=found[0], error=str(error))
            else:
                self._ledger.write("refused", nonce, error=str(error))
            return
        except Exception as error:
            self._caught(nonce, kind, error, of_submission=how != "remote")
            return
        if how == "remote":
            self._ledger.write("given", nonce, value=told(answer))
            return
        self._ledger.write("accepted", nonce, call=answer.object_id)
        if how == "spawn":
            await self._get(nonce, kind, answer, face)

    async def _get(self, nonce: str, kind: Kind, call: FunctionCall[Any], face: Callable[[Any], Face]) -> None:
        """Wait for the value: without end, or a few seconds at a time; by this handle, or by the id."""
        if self._chance.random() < 0.3:
            call = FunctionCall.from_id(call.object_id)
        timeout = self._chance.choice((None, None, 2.0))
        while True:
            try:
                value = await face(call.get)(timeout)
            except NotReadyError:
                continue
            except ConnectionError as error:
                self._ledger.write("interrupted", nonce, error=str(error))
                await asyncio.sleep(0.5)
            except Exception as error:
                self._caught(nonce, kind, error, of_submission=False)
                return
            else:
                self._ledger.write("given", nonce, value=told(value))
                return

    def _caught(self, nonce: str, kind: Kind, error: Exception, *, of_submission: bool) -> None:
        """What a call ended with, or an error that nothing here explains."""
        name = raised(type(error).__name__)
        if of_submission or name != kind.error:
            self._ledger.write("broken", nonce, error=f"{type(error).__name__}: {error}", kind=kind.name)
        if not of_submission:
            self._ledger.write("given", nonce, value=name)


def _aio(method: Any) -> Face:
    return method.aio  # type: ignore[no-any-return]


def _blocking(threads: ThreadPoolExecutor) -> Callable[[Any], Face]:
    def face(method: Any) -> Face:
        async def call(*arguments: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(threads, method, *arguments)

        return call

    return face


if __name__ == "__main__":
    asyncio.run(Client(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])).run())
