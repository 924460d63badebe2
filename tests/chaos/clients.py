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
from tests.chaos.kinds import CANCELLED, KINDS, Kind, payload, raised, told
from tests.chaos.ledger import Ledger

LANES = 24  # of which a third use the blocking face, each in a thread
_HOW = ("spawn", "spawn", "spawn", "remote", "leave")
_PAUSE = (0.0, 0.2)  # seconds between two calls of a lane
_CANCEL_AFTER = (0.0, 2.0)  # seconds

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
        arguments = (str(self._directory), nonce, n, *data)
        try:
            if how == "remote":
                await self._remote(nonce, kind, function, arguments, face)
                return
            call = await face(function.spawn)(*arguments)
        except ConnectionError as error:
            # With an id, it may have been accepted; without, the function was not even looked up.
            found = re.search(r"fc-\w{26}", str(error))
            if found:
                self._ledger.write("unsure", nonce, call=found[0], error=str(error))
            else:
                self._ledger.write("refused", nonce, error=str(error))
            return
        except Exception as error:
            self._ledger.write("broken", nonce, error=f"{type(error).__name__}: {error}", kind=kind.name)
            return
        self._ledger.write("accepted", nonce, call=call.object_id)
        if kind.cancelled:
            await self._cancel(nonce, call, face)
        if how == "spawn":
            await self._get(nonce, kind, call, face)

    async def _remote(
        self,
        nonce: str,
        kind: Kind,
        function: Function[..., Any],
        arguments: tuple[Any, ...],
        face: Callable[[Any], Face],
    ) -> None:
        """Call and wait; a call that is to be cancelled is by the end of its wait."""
        remote = function.remote.aio(*arguments) if kind.cancelled else face(function.remote)(*arguments)
        try:
            async with asyncio.timeout(self._chance.uniform(*_CANCEL_AFTER) if kind.cancelled else None):
                self._ledger.write("given", nonce, value=told(await remote))
        except TimeoutError:
            self._ledger.write("left", nonce)
        except ConnectionError:
            raise
        except Exception as error:
            self._caught(nonce, kind, error)

    async def _cancel(self, nonce: str, call: FunctionCall[Any], face: Callable[[Any], Face]) -> None:
        await asyncio.sleep(self._chance.uniform(*_CANCEL_AFTER))
        while True:
            try:
                await face(call.cancel)()
            except ConnectionError as error:
                self._ledger.write("interrupted", nonce, error=str(error))
                await asyncio.sleep(0.5)
            except Exception as error:
                self._ledger.write("broken", nonce, error=f"{type(error).__name__}: {error}", kind="cancel")
                return
            else:
                self._ledger.write("cancelled", nonce)
                return

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
                self._caught(nonce, kind, error)
                return
            else:
                self._ledger.write("given", nonce, value=told(value))
                return

    def _caught(self, nonce: str, kind: Kind, error: Exception) -> None:
        """What a call ended with; said too where nothing here explains it."""
        name = raised(type(error).__name__)
        if name != (CANCELLED if kind.cancelled else kind.error):
            self._ledger.write("broken", nonce, error=f"{type(error).__name__}: {error}", kind=kind.name)
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
