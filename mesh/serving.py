"""Running inputs in a container: one after the other, or several at once.

Sync functions run in the main thread, which reads frames between them; where a container may run several inputs, in a
thread each, while the main thread goes on reading. Async functions run as tasks of one loop in the main thread, which
reads frames between their steps. A class may have methods of both kinds.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mesh import context
from mesh.answers import Answers, Run
from mesh.asgi import Requests
from mesh.context import Running
from mesh.frames import BeginMarks, Outcome, Start, Stop, Work
from mesh.generating import Generators
from mesh.interrupts import Interrupts, MainThread, Place, Task, Thread
from mesh.output import Output, flush_c_output
from mesh.usercode import UserCode
from mesh.wire import Wire

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


class Serving:
    """Runs one container's inputs, between its enter and its exit hooks."""

    def __init__(
        self, wire: Wire, start: Start, code: UserCode, outputs: tuple[Output, Output], marks: BeginMarks
    ) -> None:
        self._wire = wire
        self._code = code
        self._outputs = outputs
        self._marks = marks
        self._answers = Answers(start)
        self._interrupts = Interrupts(wire)
        for output in outputs:
            output.alone = self._interrupts.alone
        self._generators = Generators(wire, self._interrupts.is_named)
        self._requests = Requests(wire) if start.web else None
        self._limit = start.max_inputs
        self._gathered: list[Work] = []
        self._runner: asyncio.Runner | None = None
        self._threads: ThreadPoolExecutor | None = None

    def prepare(self) -> None:
        """Run the enter hooks. Whatever they raise is the user's."""
        code = self._code
        if any(_is_async(each) for each in (*code.functions.values(), *code.enter, *code.exit)):
            self._runner = asyncio.Runner()
        for hook in code.enter:
            self._run_hook(hook)
        if self._limit > 1:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(self._limit, "mesh-input")
        self._interrupts.install()

    def serve(self) -> None:
        """Run inputs until the worker says stop, or is gone; then the exit hooks."""
        if any(_is_async(function) for function in self._code.functions.values()):
            self._serve_loop()
        else:
            self._serve_sync()
        for hook in self._code.exit:
            try:
                self._run_hook(hook)
            except BaseException:  # noqa: BLE001 - the others are still to run, whatever this one raises
                name = getattr(hook, "__qualname__", repr(hook))
                sys.stderr.write(f"mesh: the exit hook {name} failed\n{traceback.format_exc()}")
        if self._runner is not None:
            self._runner.close()

    def _run_hook(self, hook: Callable[[], Any]) -> None:
        """In the main thread; an async one in the loop that runs the inputs, so what it opens can be used there."""
        done = hook()
        if inspect.iscoroutine(done):
            (self._runner.run if self._runner is not None else asyncio.run)(done)

    # --- without a loop ----------------------------------------------------------------------------------------------

    def _serve_sync(self) -> None:
        while isinstance(work := self._wire.receive(), Work):
            run = self._gather(work)
            if run is None:
                continue
            if self._threads is None:
                self._run(run, MainThread())
            else:
                self._threads.submit(self._in_thread(run))
        if self._threads is not None:
            self._wire.read_on()
            self._threads.shutdown()

    def _gather(self, work: Work) -> Run | None:
        """A run, once all its inputs have come."""
        self._gathered.append(work)
        if work.batch > 1:
            return None
        run, self._gathered = Run(self._gathered), []
        return run

    def _in_thread(self, run: Run) -> Callable[[], None]:
        """The run for another thread. It sees the context variables of imports and hooks, and keeps its own."""
        variables = contextvars.copy_context()
        return lambda: variables.run(lambda: self._run(run, Thread()))

    def _run(self, run: Run, place: Place) -> None:
        mark = self._marks.note(run.works[0].seq)
        try:
            try:
                call = self._begin(run, place)
                if call is not None:
                    value = call()
                    first = run.works[0]
                    self._answers.succeeded(run, self._generators.send(first, value) if first.generator else value)
            finally:
                self._interrupts.leave(place)
        except BaseException as error:  # noqa: BLE001 - whatever user code raises is its outcome
            self._interrupts.leave(place)  # where the interrupt came in the middle of that
            self._failed(run, error)
        self._end(run, mark)

    # --- with a loop -------------------------------------------------------------------------------------------------

    def _serve_loop(self) -> None:
        assert self._runner is not None
        loop = Loop(self._wire, self._limit, self._gather, self._start)
        while (run := self._runner.run(loop.serve())) is not None:
            self._run(run, MainThread())  # a sync method of a container for one input: no loop runs around it

    def _start(self, run: Run) -> asyncio.Future[None] | None:
        loop = asyncio.get_running_loop()
        if _is_async(self._code.functions.get(run.works[0].method)):
            return loop.create_task(self._run_task(run))
        if self._threads is None:
            return None
        return loop.run_in_executor(self._threads, self._in_thread(run))

    async def _run_task(self, run: Run) -> None:
        task = asyncio.current_task()
        assert task is not None
        place = Task(task)
        mark = self._marks.note(run.works[0].seq)
        try:
            try:
                call = self._begin(run, place)
                if call is not None:
                    value = call()
                    value = await value if inspect.isawaitable(value) else value
                    if run.works[0].generator:
                        value = await self._generators.send_from_loop(run.works[0], value)
                    self._answers.succeeded(run, value)
            finally:
                self._interrupts.leave(place)
        except BaseException as error:  # noqa: BLE001 - whatever user code raises is its outcome
            self._interrupts.leave(place)
            self._failed(run, error)
        self._end(run, mark)

    # --- what all of them share --------------------------------------------------------------------------------------

    def _begin(self, run: Run, place: Place) -> Callable[[], Any] | None:
        """From here on a cancel interrupts the run. What is to be called; `None` if no input of it may begin."""
        seqs = [work.seq for work in run.works]
        begun = self._interrupts.enter(place, seqs)
        if len(begun) < len(seqs):
            for work in run.works:
                if work.seq not in begun:
                    run.outcomes[work.seq] = self._off(work)
            if not begun:
                return None
        first = run.live[0] if run.outcomes else run.works[0]
        context.current.set(Running(first.call, first.index, first.attempt, first.last_error, first.seq))
        function = self._code.function(first.method)
        if self._requests is not None and first.method in self._code.answering:
            return functools.partial(self._requests.answer, first, function)
        return self._answers.call(run, function)

    def _off(self, work: Work) -> Outcome | None:
        """An input that must not begin: given back (the worker knows), or cancelled."""
        return None if self._interrupts.is_dropped(work.seq) else self._answers.cancelled(work)

    def _failed(self, run: Run, error: BaseException) -> None:
        for work in run.live:
            run.outcomes[work.seq] = self._answers.failed(work, error)

    def _end(self, run: Run, mark: int) -> None:
        """Answer, after everything the run printed. A value that came after its cancel does not count."""
        for output in self._outputs:
            for work in run.works:
                output.end(work.seq)
        flush_c_output()
        context.current.set(None)
        self._interrupts.stay_installed()
        self._marks.end(mark)
        for work in run.works:
            outcome = run.outcomes[work.seq]
            if outcome is not None:
                self._wire.send(self._answers.cancelled(work) if self._interrupts.is_named(work.seq) else outcome)
            self._interrupts.forget(work.seq)


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


class Loop:
    """Reads frames in an event loop, and has inputs run as they come.

    Args:
        limit: runs at once. start: begins one in this loop, or returns `None` where it must be run outside of it.
    """

    def __init__(
        self,
        wire: Wire,
        limit: int,
        gather: Callable[[Work], Run | None],
        start: Callable[[Run], asyncio.Future[None] | None],
    ) -> None:
        self._wire = wire
        self._limit = limit
        self._gather = gather
        self._start = start
        self._running: set[asyncio.Future[None]] = set()
        self._stopping = False

    async def serve(self) -> Run | None:
        """Run inputs until one is to be run outside of the loop, which is returned, or none are to come."""
        loop = asyncio.get_running_loop()
        self._done: asyncio.Future[Run | None] = loop.create_future()
        loop.add_reader(self._wire.protocol, self._readable)
        self._feed()
        try:
            return await self._done
        finally:
            loop.remove_reader(self._wire.protocol)

    def _readable(self) -> None:
        if not self._wire.read():
            asyncio.get_running_loop().remove_reader(self._wire.protocol)
            self._wire.inbox.append(Stop())
        self._feed()

    def _feed(self) -> None:
        while self._wire.inbox and len(self._running) < self._limit and not (self._stopping or self._done.done()):
            frame = self._wire.inbox.popleft()
            if isinstance(frame, Work):
                self._take(frame)
            else:
                self._stopping = True
        if self._stopping and not self._running and not self._done.done():
            self._done.set_result(None)

    def _take(self, work: Work) -> None:
        run = self._gather(work)
        if run is None:
            return
        running = self._start(run)
        if running is None:
            self._done.set_result(run)
        else:
            self._running.add(running)
            running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Future[None]) -> None:
        self._running.discard(running)
        self._feed()
