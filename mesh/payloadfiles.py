"""Large payloads on a worker's machine: files, on their way into containers and out of them.

The worker moves them some chunks at a time, and never holds one. A container maps the file of its arguments into its
memory, and writes that of its result.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from mesh.broker import Broker
from mesh.frames import result_name
from mesh.payload import Blob
from mesh.settle import Held, Settler


class PayloadFiles:
    """The files of one worker. `folder` is on the disk its containers work on, since results are moved there."""

    def __init__(self, broker: Broker, settler: Settler, folder: Path) -> None:
        self._broker = broker
        self._settler = settler
        self._folder = folder
        self._numbers = itertools.count(1)

    async def fetch(self, blob: Blob) -> Path:
        """Bring the arguments of an input here, as a file.

        Raises:
            NotFoundError, DataLossError: they are not stored any more, or are not what was.
            OSError: there is no room for them on this machine.
        """
        path = self._new_path()
        try:
            await self._settler.insist(lambda: self._get(blob, path))
        except BaseException:
            self._remove(path)
            raise
        return path

    async def _get(self, blob: Blob, path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            await self._broker.blobs.get(blob, file.write)

    def claim(self, directory: Path, seq: int) -> Path:
        """Take the file in which a container has left a large result, before its directory goes with it.

        Raises:
            OSError: it is not there.
        """
        path = self._new_path()
        (directory / result_name(seq)).rename(path)
        return path

    def drop(self, held: Held, result: Path | None) -> None:
        """Nobody needs the files of an input any more; a container may go on with what it has mapped."""
        if held.fetching is not None:
            held.fetching.cancel()
        for path in (held.arguments, result):
            if path is not None:
                self._remove(path)

    def _new_path(self) -> Path:
        return self._folder / f"payload-{next(self._numbers)}"

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
