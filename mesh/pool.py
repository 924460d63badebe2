"""One function on one worker: inputs come in as leases, go to containers, and leave settled.

Event-driven: whatever happens ends in `feed`, which gives inputs to containers, starts or asks for more, and is cheap
to call. Nothing here waits; what needs the store runs in the background and ends in `feed` again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mesh import execution, placement, report
from mesh.broker.leases import BUSY, IDLE
from mesh.container import Container, Exit
from mesh.exception import Error, FunctionTimeoutError, InternalFailure, InvalidError
from mesh.frames import Outcome, Start, Work
from mesh.imagespec import ImageSpec
from mesh.intake import Intake
from mesh.judge import About, Execution, Kind, cancelled
from mesh.placement import Size
from mesh.protocol import ERROR_TEXT_LIMIT, CancelRequest, Failure, PoolKey, failure, method_of, one_line
from mesh.records import FunctionRecord
from mesh.request import Request
from mesh.runs import Assignment, Flow, Run
from mesh.scaling import Scaling
from mesh.settle import Held
from mesh.spec import FunctionSpec
from mesh.variant import Variant
from mesh.vault import NotHere

if TYPE_CHECKING:
    from mesh.worker import Worker

logger = logging.getLogger("mesh.worker")

_SHORT = 0.05  # seconds; runs are short where their median is below this
_READ_AHEAD = 8, 64  # inputs a container holds besides the running one, where runs are short: at least, and at most
_AHEAD = 0.1  # seconds that those take together, where they are more than the least
_SOON = 0.2  # seconds an input waits for a container here where others have slots of its function, too
_HOSTAGE = 1.0  # seconds after which inputs do not wait behind a running one any longer
_REFUSED_BATCH = 100  # inputs that nobody can run, of a removed function for example, taken at once to be failed
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 60.0  # seconds between tries to start code that does not start
_RESULT_HEADERS = 4096  # bytes kept free of the message's limit for the headers of a result


class Pool:
    """The containers of one function on this worker, and the inputs that wait for them.

    Attributes:
        spec: the options in force. bounds_set: those of them that `update_autoscaler` has set.
        unfit: why this worker cannot run it; empty if it can.
        refusal: why nobody can run its inputs, which fail with that; `None` where somebody can.
    """

    def __init__(self, worker: Worker, key: PoolKey, record: FunctionRecord, variant: Variant) -> None:
        self.key = key
        self.record = record
        self.variant = variant
        self.spec = record.spec
        self.bounds_set: Mapping[str, Any] = {}
        self.refusal: Failure | None = None
        self._never_starts: Failure | None = None
        self.containers: list[Container] = []
        self.consumer = worker.broker.topology.consumer(key)
        self.closed = False
        self._worker = worker
        self.intake = Intake(worker, self)
        self.share = worker.slots.share(self)
        self._versions: dict[Container, str] = {}
        self.scaling = Scaling(worker, self)
        self._backoff = 0.0
        self._retry_at = 0.0
        self._preparing: ImageSpec | None = None
        self.start_error = ""
        self._why_resting = ""
        self._modules: tuple[str, ...] = ()
        self._feeding = False
        self._abouts: dict[tuple[str, bool], About] = {}  # by function or method, and whether it yields
        self._set_spec()
        self._deployed_anew()

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def size(self) -> Size:
        """What one of its containers takes of the worker."""
        return Size.of(self.spec)

    @property
    def serving(self) -> list[Container]:
        """Containers that take inputs, now or once they are ready."""
        return [c for c in self.containers if not c.stopping and self._versions[c] == self.record.version]

    @property
    def _taking(self) -> bool:
        """Whether a container is there, or coming, that does not just wait for other calls."""
        return any(not c.waiting for c in self.serving)

    @property
    def is_awake(self) -> bool:
        """Whether it has containers, or is to have some, or inputs that wait for one."""
        return bool(self.containers or self.intake.waiting or (self.spec.min_containers and self.is_open))

    @property
    def is_open(self) -> bool:
        """Whether inputs of it are run here."""
        return not (self.unfit or self.refusal or self.closed or self.record.removed)

    @property
    def running(self) -> int:
        """Inputs that containers have."""
        return sum(c.load for c in self.containers)

    @property
    def starving_since(self) -> float | None:
        """Since when inputs wait here while no container takes any; `None` if that is not so."""
        if not self.intake.waiting or self._taking or self.trouble or self.record.removed or not self.share.open:
            return None
        return self.intake.waiting[0].since

    @property
    def trouble(self) -> str:
        """Why inputs of this function are not run here; empty where they are."""
        if self._preparing is not None and self.is_stuck():
            return f"{self.key} waits for its image: {self._worker.environments.progress(self._preparing)}"
        return self.unfit or (
            f"{self._why_resting}: {self.start_error}" if self.start_error and self.is_stuck() else ""
        )

    def _resting(self) -> bool:
        """Whether it is too early to start another container, after one that did not start."""
        return time.monotonic() < self._retry_at

    def is_stuck(self) -> bool:
        """Whether no input can be run until then."""
        return self._resting() and not any(c.ready for c in self.serving)

    def turns_away(self, held: Held) -> bool:
        """Whether an input must not wait here for a container. Who waits for an image that is built are requests: no
        queue keeps them."""
        return self.is_stuck() and not (self._preparing is not None and isinstance(held, Request))

    def _about(self, held: Held) -> About:
        """By which version an input is run, and with which options; generators of a class share none of its retries."""
        function = held.lease.address.function if held.lease.address is not None else self.key.function
        about = self._abouts.get((function, held.generates))
        if about is None:
            about = self._abouts[function, held.generates] = About(
                app=self.key.app,
                function=function,
                code=self.record.version[:12],
                worker=self._worker.name,
                spec=dataclasses.replace(self.spec, retries=None) if held.generates else self.spec,
                crash_budget=self._worker.settings.crash_budget,
            )
        return about

    # --- changes from outside ----------------------------------------------------------------------------------------

    def update(self, record: FunctionRecord) -> None:
        """Another version, or its removal: what runs finishes on the old code, the rest runs on the new."""
        changed = record.version != self.record.version or record.removed != self.record.removed
        self.record = record
        if changed:
            self._never_starts = self._preparing = None
        self._set_spec()
        if self.unfit:
            self.hand_back(self.unfit)
        if changed:
            self._retry_at = self._backoff = 0.0
            self._deployed_anew()
            self.scaling.autoscaler.reset()
            for container in self.containers:
                container.take_back()
                container.stop()
        self.feed()

    def _set_spec(self) -> None:
        """The options in force. What the pool asks for may make no sense with what is deployed now."""
        self._abouts.clear()
        self.refusal = self._never_starts
        try:
            self.variant = self.variant.of(self.record.spec)
            self.spec = self.variant.apply(self.record.spec)
        except (TypeError, InvalidError) as error:
            self.refusal = failure(type(error), str(error))
        try:
            self.spec = dataclasses.replace(self.spec, **self.bounds_set)
        except (TypeError, InvalidError) as error:  # set for what was deployed before
            logger.warning("%s: what update_autoscaler has set does not count: %s", self.key, error)
        self.unfit = placement.unfit(self.record, self.spec, self._worker.offer)
        self._worker.door.attend(self)

    def _deployed_anew(self) -> None:
        if self.spec.image is not None:
            self._worker.environments.forget(self.spec.image)

    def set_bounds(self, options: Mapping[str, Any]) -> None:
        """Have other bounds of its containers from now on; they themselves stay."""
        self.bounds_set = options
        self._set_spec()
        logger.info("%s: %s", self.key, ", ".join(f"{n}={v}" for n, v in options.items()) or "bounds as deployed")
        self.feed()

    def close(self, reason: str) -> None:
        """The app of a single run has ended: nothing of it runs on."""
        self.closed = True
        self._worker.door.attend(self)
        self._worker.puller.forget(self.consumer)
        self._worker.slots.forget(self.share)
        while self.intake.waiting:
            self.settle(self.intake.waiting.popleft(), cancelled(reason))
        for container in self.containers:
            for assignment in container.assignments:
                container.cancel(assignment, reason)
            container.stop()

    def hand_back(self, reason: str) -> None:
        """Give up the inputs that no container has: the worker is stopping, or somebody else has room."""
        while self.intake.waiting:
            self.settle(self.intake.waiting.popleft(), Execution(kind=Kind.RETURNED, text=reason))

    def abandon(self, reason: str) -> None:
        """Kill what runs; its inputs go back, and it does not count as a try."""
        for container in self.containers:
            self._abandon(container, reason)

    @staticmethod
    def _abandon(container: Container, reason: str) -> None:
        for assignment in container.assignments:
            assignment.stopped = assignment.stopped or execution.ABANDONED
        container.kill(reason)

    def cancel(self, held: Held, request: CancelRequest) -> None:
        """End one input wherever it is: while it waits here, in a container, or on its way between these."""
        held.cancelled = held.cancelled or request.reason
        if held in self.intake.waiting:
            self.intake.waiting.remove(held)
            self.settle(held, cancelled(held.cancelled))
            return
        for container in self.containers:
            for assignment in container.assignments:
                if assignment.owner is held:
                    container.cancel(assignment, held.cancelled)
                    if request.terminate:
                        self._abandon(container, f"{held.key} was cancelled, its container with it")

    # --- the heart ---------------------------------------------------------------------------------------------------

    def feed(self) -> None:
        """Give inputs to containers, start what is missing, and ask for as much as can be run.

        At the end of this turn of the loop, once for everything that happens in it.
        """
        if not self._feeding:
            self._feeding = True
            asyncio.get_running_loop().call_soon(self._feed)

    def _feed(self) -> None:
        self._feeding = False
        if self.is_awake:
            self._worker.awake[self.key] = self
        settler = self._worker.settler
        if self.closed or self._worker.draining or settler.trouble or settler.is_busy:
            self.share.tidy()
            return  # where the store takes nothing, or too slowly, what is held stays held, and nothing begins
        self._assign()
        serving = self.serving
        self._scale()
        self.share.tidy()
        if self.share.is_shut_out:
            self.intake.pass_on(self._takes(self.serving), _SOON if self.containers else 0.0)
        self._ask(serving)

    def _assign(self) -> None:
        while self.intake.waiting:
            container = self._seat()
            inputs = None if container is None else self.intake.next_run(self.scaling.uses_left(container))
            if container is None or inputs is None:
                return
            if inputs:
                self._give(container, inputs)

    def _seat(self) -> Container | None:
        """A container that can begin a run: one that runs some, but fewer than it is to; else the idle one that was
        used last, so that what is too many stays idle, and ends; else the one with the fewest."""
        wanted = self.spec.inputs_wanted
        free = [container for container in self.containers if self._room(container) > 0]
        return min(free, key=lambda c: _order(c, wanted), default=None)

    def _room(self, container: Container) -> int:
        """Runs a container can take now."""
        if not container.ready or container.stopping or self._versions[container] != self.record.version:
            return 0
        if self.spec.single_use_containers:
            return 0 if container.load or container.served else 1
        room = container.max_inputs + self._read_ahead(container) - container.runs
        return max(0, int(min(room, self.scaling.uses_left(container))))

    def _read_ahead(self, container: Container) -> int:
        """Inputs a container may hold besides what it runs: where that is one, and short."""
        answers = self.spec.may_yield or self.spec.webs  # as it goes on, to somebody who waits
        alone = container.max_inputs == 1 and self.spec.max_batch_size is None and not answers
        median = self.scaling.autoscaler.median
        if median is None or median >= _SHORT or not alone or container.running_for >= _HOSTAGE:
            return 0
        least, most = _READ_AHEAD
        return min(most, max(least, int(_AHEAD / max(median, 1e-6))))

    def _give(self, container: Container, inputs: Sequence[Held]) -> None:
        """Have a container run an input, or a batch."""
        batched = self.spec.max_batch_size is not None
        about = self._about(inputs[0])
        assignments: list[Assignment] = []
        for left, held in zip(range(len(inputs), 0, -1), inputs, strict=True):
            work = self._work(held, left if batched else 0)
            held.about = about
            report.began(held, self._worker.name, container.name, work.attempt)
            flow = self._flow(container, work) if work.generator else None
            assignment = Assignment(work, held, self.spec.timeout, flow)
            assignments.append(assignment)
            if isinstance(held, Request):
                held.give(container, assignment)
        container.run(*assignments)
        if self.spec.single_use_containers:
            container.stop()
        self.scaling.on_given(container)

    def _work(self, held: Held, batch: int) -> Work:
        input = held.lease.input
        assert input is not None
        return Work(
            seq=self._worker.next_seq(),
            call=input.address.call,
            index=input.address.index,
            attempt=held.log.tries + 1,
            last_error=held.log.last_error,
            format=input.format,
            body=input.body,
            keep_result=input.keep_result,
            method=method_of(input.address.function),
            generator=input.generates,
            file=str(held.arguments or ""),
            batch=batch,
        )

    def _flow(self, container: Container, work: Work) -> Flow:
        """Where the items of a generator go from its container."""
        grant = functools.partial(container.grant, work.seq)
        return self._worker.broker.flows.write(work.call, work.index, grant)

    def _scale(self) -> None:
        """End containers that are not needed; start others while the load wants more and there is room for them."""
        wanted = self.scaling.scale(self._queued)
        if self._resting() or not self.is_open:
            return
        missing, capacity = max(wanted, self.share.due), self._worker.capacity
        if missing > 0 and self.spec.image is not None and self._worker.environments.built(self.spec.image) is None:
            self._prepare(self.spec.image)
            return
        while missing > 0 and capacity.could_make_room(self) and self.share.reserve() and capacity.make_room(self):
            self._start_container()
            missing -= 1

    @property
    def backlog(self) -> int:
        """Inputs that wait, here and in the queue, as far as this worker knows."""
        return len(self.intake.waiting) + self._queued

    @property
    def _queued(self) -> int:
        """Inputs in the queue; none where some were asked for, and have not come."""
        return 0 if self._asked() else self.intake.pending

    def _takes(self, serving: Sequence[Container]) -> int:
        """Inputs that these containers take now, or once they are ready."""
        size, coming = self.spec.batch_size, self.spec.inputs_wanted
        return sum(self._room(c) * size if c.ready else coming for c in serving)

    def _asked(self) -> int:
        return self._worker.puller.outstanding(self.consumer)

    def _ask(self, serving: Sequence[Container]) -> None:
        """Pull what can be run now; one input more where another container could be started for it."""
        if self.unfit or self.is_stuck():
            return
        if self.record.removed is not None or self.refusal is not None:
            wanted = _REFUSED_BATCH
        else:
            wanted = self._takes(serving)
            may_grow = self.share.open and not self.share.is_claiming and not self._resting()
            if may_grow and (not self._taking or self._worker.capacity.could_make_room(self)):
                wanted += 1
        missing = wanted - self._asked() - len(self.intake.waiting)
        if missing > 0 and (missing * 2 >= wanted or not self._asked()):
            self._worker.ask(self.consumer, missing, BUSY if self.is_awake else IDLE)

    # --- containers --------------------------------------------------------------------------------------------------

    def _prepare(self, image: ImageSpec) -> None:
        """Have the image of its containers made ready before any is started: until then they would only take room.

        Its inputs wait in the queue meanwhile, where workers that have the image find them.
        """
        self._preparing, self._retry_at = image, math.inf
        self.start_error = "its image is being built"
        for held in [held for held in self.intake.waiting if self.turns_away(held)]:
            self.intake.waiting.remove(held)
            self.settle(held, Execution(kind=Kind.RETURNED, text=self.start_error))
        self._worker.background.spawn(self._prepared(image, self.record, self.spec.start_limit))

    async def _prepared(self, image: ImageSpec, record: FunctionRecord, limit: float) -> None:
        failed: Error | None = None
        try:
            async with asyncio.timeout(limit):
                await self._worker.environments.prepare(image, self.key.app)
        except TimeoutError:
            failed = FunctionTimeoutError(f"its image was not built within its startup_timeout of {limit:g} s")
        except Error as error:
            failed = error
        if record.version != self.record.version:
            return  # the newer one has begun anew
        self._preparing, self._retry_at, self.start_error = None, 0.0, ""
        if failed is not None and self.key.app.startswith("ap-") and not isinstance(failed, NotHere):
            self._never_start(failure(type(failed), str(failed)))
        elif failed is not None:
            why = f"{self.key} waits" if isinstance(failed, NotHere) else f"the image of {self.key} cannot be built"
            self._rest(one_line(str(failed), ERROR_TEXT_LIMIT), why)
        self.feed()

    def _start_container(self) -> None:
        name, grace = self._worker.new_container_name(), self._worker.settings.cancel_grace
        worker = self._worker
        container = Container(name, self, grace, worker.memory, worker.nursery, self.spec.max_inputs)
        self.containers.append(container)
        self._worker.awake[self.key] = self
        self._versions[container] = self.record.version
        self.share.take(container)
        self._worker.background.spawn(self._start(container, self.record, self.spec))

    async def _start(self, container: Container, record: FunctionRecord, spec: FunctionSpec) -> None:
        try:
            code, bundle = await self._worker.code.prepare(record)
            ceiling = self._worker.ceiling
            start = Start(
                app=self.key.app,
                function=self.key.function,
                version=record.version,
                construction=self.variant.construction.to_json(),
                environment=self._worker.broker.topology.environment,
                worker=self._worker.name,
                container=container.name,
                code=code.to_json(),
                bundle=str(bundle) if bundle else "",
                result_limit=self._worker.broker.connection.inline_limit - _RESULT_HEADERS,
                payload_limit=ceiling.size,
                payload_reason=ceiling.reason,
                max_inputs=container.max_inputs,
                web=bool(spec.webs),
                image=spec.image.mark if spec.image else "",
            )
            image = await self._worker.environments.use(spec.image, self.key.app) if spec.image else None
            variables = self._worker.container_variables({**(image.variables if image else {}), **spec.env})
            secrets = await self._worker.secrets(spec)
            if container.stopping:  # asked to while its code was being fetched
                self._drop(container)
                return
            folder, modules = self._worker.scratch.path, () if secrets else self._modules
            await container.start(start, variables, spec.start_limit, spec.memory, folder, secrets, image, modules)
        except (Error, OSError) as error:
            if self._versions[container] == self.record.version:
                self._start_failed(failure(type(error), str(error)), here=isinstance(error, NotHere))
            self._drop(container)
            self.feed()

    def _drop(self, container: Container) -> None:
        self.containers.remove(container)
        self.scaling.forget(container)
        del self._versions[container]
        self.share.ended(container)
        self._worker.capacity.changed()

    def _start_failed(self, failed: Failure, *, here: bool = False) -> None:
        """The code cannot be started.

        Args:
            here: it is not the code's fault, but what it needs is not here.
        """
        if self.key.app.startswith("ap-") and not here:
            # The client of a single run waits, and nobody will deploy something better: its inputs fail.
            self._refuse_waiting(failed)
        elif here:
            self._rest(failed.text, f"{self.key} waits")
        else:
            self._rest(failed.summary, "its code does not start")

    def _rest(self, error: str, why: str) -> None:
        """Start nothing for a while, longer each time, instead of burning the queue.

        Its inputs wait in the queue meanwhile, where other workers, or this one with newer code, find them at once.
        """
        self.start_error, self._why_resting = error, why
        if not self._resting():  # containers that were started together fail together, and count once
            self._backoff = min(max(2 * self._backoff, _FIRST_BACKOFF), _LONGEST_BACKOFF)
            self._retry_at = time.monotonic() + self._backoff
            logger.warning("%s does not start, trying again in %g s: %s", self.key, self._backoff, self.start_error)
            self._worker.wake_at(self._retry_at, self)
        while self.intake.waiting and self.is_stuck():
            self.settle(self.intake.waiting.popleft(), Execution(kind=Kind.NOT_STARTED, text=self.start_error))

    def _never_start(self, failed: Failure) -> None:
        """All inputs fail, until something else is deployed."""
        self._never_starts = self.refusal = failed
        self._refuse_waiting(failed)

    def _refuse_waiting(self, why: Failure) -> None:
        while self.intake.waiting:
            self.settle(self.intake.waiting.popleft(), Execution(kind=Kind.REFUSED, failure=why))

    def tick(self) -> None:
        """Look at what has no event of its own: time that passes."""
        self.free_hostages()
        self.feed()

    def free_hostages(self) -> None:
        """Take back inputs that wait behind one that runs long, or while another container idles."""
        idle = any(c.ready and not c.load and not c.stopping for c in self.containers)
        for container in self.containers:
            if container.behind and (idle or container.running_for > _HOSTAGE):
                container.take_back()

    # --- what containers say (Listener) ------------------------------------------------------------------------------

    def on_ready(self, container: Container) -> None:
        if self._versions[container] == self.record.version:
            self._backoff = self._retry_at = 0.0
            self.start_error = ""
            self._modules = container.modules
        self.feed()

    def on_start_failed(self, container: Container, failure: Failure, *, for_good: bool) -> None:
        if self._versions[container] != self.record.version:
            return  # that older code did not start says nothing
        failure = container.mask.failure(failure)
        if for_good:
            self._never_start(failure)
        else:
            self._start_failed(failure)

    def on_outcome(self, container: Container, assignment: Assignment, outcome: Outcome) -> None:
        self.scaling.autoscaler.ran(time.monotonic() - assignment.began)
        self.settle(assignment.owner, container.mask.execution(self._execution(container, assignment, outcome)))
        self.scaling.on_outcome(container)
        if not container.load:
            self._worker.capacity.on_idle(self, container)
        self.feed()

    def _execution(self, container: Container, assignment: Assignment, outcome: Outcome) -> Execution:
        """What an outcome says. A large result is taken from the container."""
        try:
            file = self._worker.payloads.claim(container.directory, outcome.seq) if outcome.large else None
        except OSError as error:
            lost = failure(
                InternalFailure, f"its result was written to a file of its container, which is gone: {error}"
            )
            return Execution(kind=Kind.FAILED, failure=lost)
        return execution.of_outcome(assignment, outcome, file)

    def on_timeout(self, container: Container, run: Run) -> None:
        container.interrupt(run, execution.TIMEOUT)

    def on_given_up(self, container: Container, assignment: Assignment) -> None:
        self.settle(assignment.owner, execution.of_stop(assignment))
        self.feed()

    def on_dropped(self, container: Container, assignment: Assignment) -> None:
        self.intake.put_back(assignment.owner)
        self.feed()

    def on_output(self, container: Container, assignment: Assignment | None, stream: int, text: str) -> None:
        held = assignment.owner if assignment else None
        self._worker.on_output(self.key, container, held, stream, container.mask(text))

    def on_waiting(self, container: Container) -> None:
        self._worker.capacity.changed()

    def on_exit(self, container: Container, lost: Sequence[Assignment], exit: Exit) -> None:
        app, function, ill = self.key.app, self.key.function, bool(exit.out_of_memory)
        report.container_ended(self._worker.name, container.name, app, function, len(lost), exit.text, ill=ill)
        for assignment in reversed(lost):
            if assignment.began:
                self.settle(assignment.owner, execution.of_loss(assignment, exit))
            else:
                self.intake.put_back(assignment.owner)
        self._drop(container)
        self.feed()
        if self._worker.draining:
            self.hand_back("the worker is stopping")

    # --- inputs out --------------------------------------------------------------------------------------------------

    def settle(self, held: Held, execution: Execution) -> None:
        if isinstance(held, Request):
            held.end(execution)
            return
        self._worker.background.spawn(self._settled(held, execution))

    async def _settled(self, held: Held, execution: Execution) -> None:
        try:
            verdict = await self._worker.settler.settle(held, execution, held.about or self._about(held))
        finally:
            self._worker.release(held)
            if held.fetching is not None or execution.file is not None:
                self._worker.payloads.drop(held, execution.file)
        report.ended(held, verdict)


def _order(container: Container, wanted: int) -> tuple[int, float]:
    """Which container gets an input first, of those that are to have so many."""
    if 0 < container.load < wanted:
        return 0, -container.load
    return (2, container.load) if container.load else (1, -container.idle_since)
