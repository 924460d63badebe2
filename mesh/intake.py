"""From a delivered lease to an input that may run: the way in of a pool.

What is no input is put aside, what was delivered before is examined, what cannot be run any more ends here; the rest
waits for a container.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from mesh import execution
from mesh.broker import Lease
from mesh.examine import Finding
from mesh.exception import DataLossError, Error, InternalFailure, NotFoundError
from mesh.judge import Execution, Kind, cancelled
from mesh.payload import Blob
from mesh.protocol import Failure, failure, method_of
from mesh.settle import Held

if TYPE_CHECKING:
    from mesh.pool import Pool
    from mesh.worker import Worker

logger = logging.getLogger("mesh.worker")

_TOO_EARLY = 0.001  # seconds that do not count: a clock's, and a timer's


class Intake:
    """Takes the deliveries of one pool.

    Attributes:
        waiting: inputs that no container has, the one to run next first.
        pending: inputs left in the queue when the last one was delivered.
    """

    def __init__(self, worker: Worker, pool: Pool) -> None:
        self.waiting: deque[Held] = deque()
        self.pending = 0
        self._worker = worker
        self._pool = pool
        self._impossible: list[Held] = []
        self._opened: Held | None = None

    def on_lease(self, lease: Lease) -> None:
        """An input was delivered."""
        self.pending = lease.pending
        held = self._worker.known(lease)
        if held is not None:
            self._worker.background.spawn(self._worker.settler.adopt(held, lease, self._worker.name))
            return
        held = Held(lease)
        self._worker.hold(held)
        if lease.address is None:
            self._worker.background.spawn(self._quarantine(held))
        elif lease.refusal is not None:
            refused = failure(type(lease.refusal), str(lease.refusal))
            self._pool.settle(held, Execution(kind=Kind.REFUSED, failure=refused))
        elif lease.address.call in self._worker.ends:
            self._worker.background.spawn(self._refuse(held))
        elif self._worker.examiner.needed(lease):
            self._worker.examiner.examine(held, self._on_examined)
        else:
            held.marked = not held.generates
            self.accept(held)

    async def _quarantine(self, held: Held) -> None:
        """A message that is no input of anybody."""
        logger.warning("put aside %s: %s", held.lease.subject, held.lease.refusal)
        try:
            await self._worker.settler.quarantine(held.lease)
        finally:
            self._worker.release(held)
            self._pool.feed()

    async def _refuse(self, held: Held) -> None:
        """An input of a call that was cancelled as a whole, which has ended with that."""
        try:
            await self._worker.settler.drop(held)
        finally:
            self._worker.release(held)
            self._pool.feed()

    def _on_examined(self, held: Held, finding: Finding) -> None:
        if finding is Finding.ENDED:
            self._worker.release(held)
            self._pool.feed()
        elif finding is Finding.ELSEWHERE:
            later = Execution(kind=Kind.RETURNED, text="another worker holds it", delay=self._worker.ack_wait)
            self._pool.settle(held, later)
        elif held.generates and (lost := held.log.begun) is not None:
            gone = failure(InternalFailure, execution.HALF_WAY.format(f"worker {lost.worker} lost"))
            self._pool.settle(held, Execution(kind=Kind.REFUSED, failure=gone))
        elif not held.generates and len(held.log.crashes(held.number)) >= self._worker.settings.crash_budget:
            self._pool.settle(held, Execution(kind=Kind.CRASHED))
        else:
            self.accept(held)

    def accept(self, held: Held) -> None:
        """An input that may run, if nothing speaks against it; else it ends here."""
        assert held.lease.input is not None
        deadline = held.lease.input.deadline
        if held.cancelled:
            self._pool.settle(held, cancelled(held.cancelled))
        elif deadline is not None and time.time() > deadline:
            expired = Execution(kind=Kind.EXPIRED, text="expired: its deadline passed before it was started")
            self._pool.settle(held, expired)
        elif self._why_impossible(held) is not None:
            self._impossible.append(held)
            if len(self._impossible) == 1:
                self._worker.background.spawn(self._fail_impossible())
        elif self._pool.closed:
            self._pool.settle(held, cancelled("its app has ended"))
        elif self._worker.draining:
            self._pool.settle(held, Execution(kind=Kind.RETURNED, text="the worker is stopping"))
        elif self._pool.turns_away(held):
            self._pool.settle(held, Execution(kind=Kind.NOT_STARTED, text=self._pool.start_error))
        else:
            self._wait(held)
        self._pool.feed()

    def _wait(self, held: Held) -> None:
        """It waits for a container; meanwhile its large arguments are brought here."""
        self.waiting.append(held)
        blob = held.lease.input.blob if held.lease.input is not None else None
        if blob is not None and held.fetching is None:
            held.away = True
            held.fetching = self._worker.background.spawn(self._fetch(held, blob))

    async def _fetch(self, held: Held, blob: Blob) -> None:
        try:
            held.arguments = await self._worker.payloads.fetch(blob)
        except (NotFoundError, DataLossError) as error:
            await self._without_arguments(held, error)
        except OSError as error:
            text = f"worker {self._worker.name} has no room for its arguments of {blob.size:,} bytes: {error}"
            logger.warning("%s goes back: %s", held.key, text)
            self._leave(held, Execution(kind=Kind.RETURNED, text=text, delay=self._worker.ack_wait))
        else:
            held.away = False
            self._pool.feed()

    async def _without_arguments(self, held: Held, error: Error) -> None:
        """They go once there is a result: then another worker, which had lost its lease, has ended it meanwhile."""
        result = await self._worker.settler.insist(lambda: self._worker.broker.results.get(held.key))
        if result is None:
            lost = failure(DataLossError, f"its arguments are lost: {error}")
            self._leave(held, Execution(kind=Kind.REFUSED, failure=lost))
        elif held in self.waiting:
            self.waiting.remove(held)
            await self._worker.settler.finish_other(held.lease, result)
            self._worker.release(held)
            self._pool.feed()

    def _leave(self, held: Held, execution: Execution) -> None:
        """End an input that waits here, unless that was done while it was looked after."""
        if held in self.waiting:
            self.waiting.remove(held)
            self._pool.settle(held, execution)
            self._pool.feed()

    def _why_impossible(self, held: Held) -> Failure | None:
        """Why nobody can run an input, by what is known here of what is deployed."""
        pool, address = self._pool, held.lease.address
        assert address is not None
        if pool.record.removed is not None:
            return failure(NotFoundError, pool.record.removed.reason)
        methods = pool.spec.methods
        if (method_of(address.function) or None) not in (methods or (None,)):
            known = f"it has {', '.join(methods)}" if methods else "it is a function"
            return failure(NotFoundError, f"{pool.key.path} has no method {method_of(address.function)!r}: {known}")
        return pool.refusal

    async def _fail_impossible(self) -> None:
        """Inputs that nobody can run fail, unless what they need was deployed since: ask, before saying so."""
        key = self._pool.key
        record = await self._worker.settler.insist(lambda: self._worker.broker.registry.function(key.app, key.function))
        if record is not None and record.removed is None:
            self._pool.update(record)
        inputs, self._impossible = self._impossible, []
        for held in inputs:
            if (why := self._why_impossible(held)) is not None:
                self._pool.settle(held, Execution(kind=Kind.REFUSED, failure=why))
            else:
                self.accept(held)

    def next_run(self, most: float) -> list[Held] | None:
        """Take the inputs of the next run: one, or a batch, but `most` of them at most. `None` where a batch is not
        full yet, and may still wait, or where the arguments of all are on their way.

        Empty where that they begin is to be written down first.
        """
        size = self._pool.spec.max_batch_size
        if size is not None and len(self.waiting) < size and not self._waited():
            return None
        inputs = self._first_alike(int(min(size or 1, most)))
        if not inputs:
            return None
        unmarked = [held for held in inputs if not held.marked]
        self._take(unmarked or inputs)
        for held in unmarked:
            self._worker.background.spawn(self._mark(held))
        return [] if unmarked else inputs

    def _waited(self) -> bool:
        """Whether the first input has waited long enough for others; if not, the pool is fed when it has."""
        first, loop = self.waiting[0], asyncio.get_running_loop()
        left = first.since + self._pool.spec.wait_ms / 1000 - time.monotonic()
        if left > _TOO_EARLY and self._opened is not first:
            self._opened = first
            loop.call_later(left, self._pool.feed)
        return left <= _TOO_EARLY

    def _first_alike(self, count: int) -> list[Held]:
        """The first inputs whose arguments are here, of one method."""
        first = next((held for held in self.waiting if not held.away), None)
        if first is None:
            return []
        if count == 1:
            return [first]
        method = _function(first)
        alike = (held for held in self.waiting if not held.away and _function(held) == method)
        return list(itertools.islice(alike, count))

    def _take(self, inputs: list[Held]) -> None:
        if inputs == [self.waiting[0]]:
            self.waiting.popleft()
        else:
            taken = set(inputs)
            self.waiting = deque(held for held in self.waiting if held not in taken)

    async def _mark(self, held: Held) -> None:
        """Write down that an input begins, which was delivered before or is a generator's; then it may."""
        await self._worker.settler.mark_begun(held, self._worker.name)
        held.marked = True
        self.accept(held)

    def put_back(self, held: Held) -> None:
        """An input that has not begun waits again, as the first; if it was not cancelled meanwhile."""
        if held.cancelled:
            self._pool.settle(held, cancelled(held.cancelled))
        else:
            self.waiting.appendleft(held)

    def pass_on(self, kept: int, patience: float) -> None:
        """Hand back what no container here takes soon: all other slots are somewhere else, and perhaps idle there.

        Args:
            kept: inputs that are taken here. patience: seconds that others wait here; none if there is no container,
                and then nothing will be delivered here that says how many are left.
        """
        latest = time.monotonic() - patience
        for held in list(self.waiting)[kept:]:
            if held.since > latest:
                self._worker.wake_at(held.since + patience, self._pool)
                break
            self.waiting.remove(held)
            returned = "no slot of its function is free for another container here"
            self._pool.settle(held, Execution(kind=Kind.RETURNED, text=returned))
        if not patience:
            self.pending = 0


def _function(held: Held) -> str:
    return held.lease.address.function if held.lease.address is not None else ""
