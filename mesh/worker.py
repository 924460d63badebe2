"""The worker: a daemon on a machine that runs everything deployed that fits it.

`run` reads as what happens: startup, main loop, drain. A pool does the work of one function (`pool`), settling has its
own module (`settle`); here is what they share: leases that are renewed, room for containers, and being seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import platform
import random
import re
import secrets
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import IntEnum

from mesh import container as containers
from mesh import machine, pythons, vault
from mesh.background import Background
from mesh.broker import Broker, Lease, NoResponders, Puller, StoreError, Unanswered, translated
from mesh.broker.leases import Pace
from mesh.capacity import Capacity
from mesh.codecache import CodeCache
from mesh.config import Settings
from mesh.container import Container
from mesh.deployed import Deployed
from mesh.ends import Ends
from mesh.environments import Environments
from mesh.examine import Examiner
from mesh.exception import Error
from mesh.fleet import Fleet
from mesh.labels import parse_labels
from mesh.memory import MemoryWatch
from mesh.nursery import Nursery
from mesh.payloadfiles import PayloadFiles
from mesh.placement import Offer, Size
from mesh.pool import Pool
from mesh.protocol import CancelRequest, PoolKey
from mesh.request import Door
from mesh.scratch import Scratch
from mesh.settle import Held, Settler
from mesh.slots import Slots
from mesh.spec import FunctionSpec
from mesh.sweep import Sweeper
from mesh.upkeep import Upkeep
from mesh.watch import Watch

logger = logging.getLogger("mesh.worker")

_TICK = 0.5  # seconds between looks at what has no event of its own
_REREAD = 20.0  # seconds between reads of all heads, in case a push was missed
_SETTLE_DOWN = (0.8, 1.2)  # seconds after a reconnect in which leases are renewed and nothing new is asked for
_HELD_TOO_LONG = 2.0  # seconds after which an input that has no room here goes to a worker that has
_CLIENTS_SWEEP = 10.0  # seconds between looks whether single runs and waiting callers have lost their client
_TIDY = 600.0  # seconds between looks at the environments of images


class ExitCode(IntEnum):
    """How a worker ended."""

    DRAINED = 0
    ABNORMAL = 1
    SECOND_SIGNAL = 8


class Worker:
    """Runs inputs for one environment.

    Args:
        settings: what is set.
        on_output: called with each piece of output: `app.function`, the input's id or the container's name, stream
            (1 or 2), text.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_output: Callable[[str, str, int, str], None] | None = None,
    ) -> None:
        self.settings = settings
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32]
        self.name = f"{host}-{secrets.token_hex(3)}"
        self.background = Background()
        self.memory = MemoryWatch()
        self.nursery = Nursery()
        self.draining = False
        self.offer = _offer(self.name, settings)
        self.deployed = Deployed(self)
        self.door = Door(self)
        self.awake: dict[PoolKey, Pool] = {}  # those with containers or inputs: most of many functions sleep
        self.capacity = Capacity(self.offer.size, self.awake.values())
        self._held: dict[str, Held] = {}
        self._seq = itertools.count(1)
        self._container_numbers = itertools.count(1)
        self._show_output = on_output
        self._stop = asyncio.Event()
        self._signals = 0
        self._pulling_from = 0.0
        self._resuming: asyncio.Task[None] | None = None
        self._pulling_again: dict[str, float] = {}
        self.fleet = Fleet(self, self._on_fleet)

    @property
    def pools(self) -> Collection[Pool]:
        """All that is deployed."""
        return self.deployed.pools.values()

    @property
    def held(self) -> Collection[Held]:
        """The inputs whose leases are kept."""
        return self._held.values()

    # --- the whole of it ---------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None] = lambda: None) -> ExitCode:
        """Work until told to stop.

        Raises:
            ConnectionError, AuthError, ServiceError, VersionError: there is no usable server.
        """
        self.broker = await Broker.open(self.settings, role="worker")
        self.scratch = Scratch()
        try:
            async with translated("starting the worker"):
                await self._startup()
        except BaseException:
            await self.background.cancel()
            await self.nursery.close()
            await self.broker.close()
            self.scratch.close()
            raise
        ready()
        try:
            await self._main_loop()
        finally:
            code = await self._drain()
        return code

    def stop(self) -> None:
        """First time: take nothing new, and finish. Second time: now."""
        self._signals += 1
        if self._signals > 1:
            self.settler.give_up()
        self._stop.set()

    async def _startup(self) -> None:
        self.nursery.warm(self.container_variables({}))
        await self.broker.ensure()
        self.ack_wait = await self.broker.ack_wait()
        self.settler = Settler(self.broker)
        interval = self.settings.sweep_interval
        self.upkeep = Upkeep(self.broker, self.name, self.ack_wait, interval, self.on_consumer_made, self.background)
        self.settler.on_trouble, self.settler.on_back = self.upkeep.suspect, self._feed_all
        self.payloads = PayloadFiles(self.broker, self.settler, self.scratch.path)
        self.ceiling = await self.broker.blobs.ceiling()
        self.ends = Ends(self.broker, self.settler, self.name, self._held, self._stop_input, self.background)
        self.examiner = Examiner(self.broker, self.settler, self.ends, self.name)
        self.code = CodeCache(self.broker, self.settings.cache_dir)
        self.environments = Environments(self.settings, self.code.files)
        self.sweeper = Sweeper(self.broker, self.name, self.ack_wait, interval)
        self.watch = Watch(self.broker, self.name, self._held, self._stop_input)
        self.slots = Slots(self.broker, self.name)
        self.puller = Puller(self.broker.connection, self.broker.topology, self._on_lease, self._on_void)
        events = self.broker.connection.events
        events.disconnected.append(self._on_disconnected)
        events.reconnected.append(self._on_reconnected)
        events.closed.append(self._stop.set)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not the main thread
                loop.add_signal_handler(number, self.stop)
        await self.watch.start()
        await self.ends.start()
        await self.slots.start()
        await self.puller.start()
        await self.deployed.watch()
        await self.broker.consumers.watch(self.on_consumer_made)
        await self.fleet.listen()
        await self.fleet.announce()
        self.examiner.trust_from(await self.broker.workers.server_time(self.name))
        await self._read_deployed()
        logger.info(
            "worker %s is ready: %d containers, environment %s, %s",
            self.name,
            self.offer.size.containers,
            self.broker.topology.environment,
            self.settings.safe_url,
        )

    async def _main_loop(self) -> None:
        duties = [
            self.background.spawn(self._regularly(_TICK, self._tick)),
            self.background.spawn(self._regularly(self.ack_wait / 12, self._renew_leases)),
            self.background.spawn(self._regularly(_REREAD, self._read_deployed)),
            self.background.spawn(self._regularly(self.slots.look_every, self.slots.look)),
            self.background.spawn(self._regularly(_CLIENTS_SWEEP, self._sweep_runs)),
            self.background.spawn(self._regularly(_TIDY, self._tidy_environments)),
            self.background.spawn(self._regularly(_CLIENTS_SWEEP, self.watch.callers)),
            self.background.spawn(self._regularly(self.settings.sweep_interval, self.sweeper.sweep)),
            self.background.spawn(self._regularly(self.settings.sweep_interval, self.upkeep.look)),
        ]
        await self._stop.wait()
        for duty in duties:
            duty.cancel()

    async def _regularly(self, pause: float, duty: Callable[[], object]) -> None:
        """Do something again and again, whatever becomes of one time."""
        while True:
            await asyncio.sleep(pause * random.uniform(0.9, 1.1))
            try:
                done = duty()
                if asyncio.iscoroutine(done):
                    await done
            except (Unanswered, NoResponders, StoreError, Error) as error:
                logger.debug("%s: %r", getattr(duty, "__name__", duty), error)
                self.upkeep.suspect(error)
            except Exception:  # a fault of ours: said, and no reason to leave the duty undone from now on
                logger.exception("%s failed", getattr(duty, "__name__", duty))

    async def _drain(self) -> ExitCode:
        """Take nothing new, let running inputs finish within the grace, and hand back the rest at once."""
        self.draining = True
        if self.broker.connection.is_closed:
            logger.error("the connection was closed for good; ending")
            self._kill_containers("its worker lost the server for good")
            return ExitCode.ABNORMAL
        renewing = self.background.spawn(self._regularly(self.ack_wait / 12, self._renew_leases))
        await self.puller.stop()
        await self.door.close()
        for pool in self.pools:
            pool.hand_back("the worker is stopping")
        with contextlib.suppress(TimeoutError, Unanswered, NoResponders, StoreError):
            await asyncio.wait_for(self.fleet.announce(), 2)
        busy = sum(pool.running for pool in self.pools)
        if busy:
            logger.info("stopping: %d running, given %g s; again to stop now", busy, self.settings.grace)
        await self._wait_for_containers()
        await self._end_containers()
        await self._settle_all()
        await self.slots.close()
        renewing.cancel()
        with contextlib.suppress(Exception):  # it lapses by itself
            await self.fleet.withdraw()
        await self.examiner.close()
        await self.environments.close()
        await self.background.cancel()
        await self.nursery.close()
        await self.broker.close()
        self.scratch.close()
        logger.info("worker %s has stopped", self.name)
        return ExitCode.SECOND_SIGNAL if self._signals > 1 else ExitCode.DRAINED

    async def _wait_for_containers(self) -> None:
        """Until all have ended, with their clean-up; the grace is over; or there is a second signal."""
        deadline = time.monotonic() + self.settings.grace
        for pool in self.pools:
            for container in list(pool.containers):
                container.take_back()
                if container.ready:
                    container.stop()
                else:
                    container.kill("the worker is stopping")
        while any(c.ready for pool in self.pools for c in pool.containers) and self._signals < 2:
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.02)

    async def _end_containers(self) -> None:
        """Kill what is left; what ran in it is handed back without counting as a try."""
        for pool in self.pools:
            pool.abandon("the worker is stopping")
        ending = [c for pool in self.pools for c in pool.containers]
        if ending:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.gather(*(container.ended() for container in ending))

    async def _settle_all(self) -> None:
        """Until everything held is settled, as long as the store answers."""
        deadline = time.monotonic() + (self.settings.grace if self._signals < 2 else 2.0)
        while self._held and time.monotonic() < deadline:  # noqa: ASYNC110 - ends with the process, and rarely waits
            await asyncio.sleep(0.02)
        self.settler.give_up()
        with contextlib.suppress(Unanswered):
            await self.broker.connection.flush()

    def _kill_containers(self, reason: str) -> None:
        for pool in self.pools:
            for container in pool.containers:
                container.kill(reason)

    async def _read_deployed(self) -> None:
        self.ceiling = await self.broker.blobs.ceiling()
        await self.deployed.read()
        self._feed_all()  # whatever may have been missed ends here

    async def _tidy_environments(self) -> None:
        await self.environments.tidy(self.nursery.interpreters)

    async def _sweep_runs(self) -> None:
        """End apps of a single run whose client has gone."""
        runs = self.deployed.runs
        if runs:
            await self.sweeper.runs(runs)

    # --- leases ------------------------------------------------------------------------------------------------------

    def ask(self, consumer: str, count: int, pace: Pace) -> None:
        """Pull, unless it is too early after a reconnect, or the consumer is gone."""
        too_early = time.monotonic() < max(self._pulling_from, self._pulling_again.get(consumer, 0.0))
        if self.broker.connection.is_up and not too_early and not self.upkeep.is_lost(consumer):
            self.puller.reserve(consumer, count, pace)
            self.background.spawn(self.puller.ask(consumer, count, pace))

    def _on_lease(self, lease: Lease) -> None:
        pool = self.deployed.pool_of(lease.consumer)
        if pool is not None:
            pool.intake.on_lease(lease)

    def _on_void(self, consumer: str, why: str) -> None:
        pool = self.deployed.pool_of(consumer)
        if pool is None or pool.closed or self.draining:
            return
        if why == "deleted":
            self.upkeep.lost(consumer)
        else:
            pool.feed()

    def on_consumer_made(self, consumer: str, made: float) -> None:
        """A consumer of a pool was made anew, and delivers everything as if for the first time: also what somebody
        holds, and what has ended but was acknowledged to nobody. So, as after a reconnect: nothing stored before is
        trusted, everything held is listed, and nothing is asked for until the others have listed theirs, too."""
        pool = self.deployed.pool_of(consumer)
        if pool is None or pool.closed:
            return  # a new function
        self.examiner.on_consumer_remade(consumer, made)
        self.upkeep.found(consumer)
        self._pulling_again[consumer] = time.monotonic() + random.uniform(*_SETTLE_DOWN)
        self.background.spawn(self.settler.insist(self.fleet.announce))
        self.wake_at(self._pulling_again[consumer], pool)

    def known(self, lease: Lease) -> Held | None:
        """The input that was delivered again, if this worker still has it."""
        return self._held.get(lease.subject)

    def hold(self, held: Held) -> None:
        """Keep a lease alive from now on. Its cancel may have come before it."""
        self._held[held.lease.subject] = held
        if held.lease.address is not None:
            held.cancelled = self.watch.asked_before(held.key)

    def release(self, held: Held) -> None:
        """Stop keeping a lease alive: it was acknowledged or handed back."""
        if self._held.get(held.lease.subject) is held:
            del self._held[held.lease.subject]

    async def _renew_leases(self) -> None:
        """Renew what was not renewed for a third of the ack wait."""
        if not self.broker.connection.is_up:
            return
        limit = time.monotonic() - self.ack_wait / 3
        due = [held for held in self._held.values() if held.lease.renewed < limit]
        for held in due:
            await held.lease.renew()
        if due:
            self.background.spawn(self._watch(due))

    async def _watch(self, renewed: Sequence[Held]) -> None:
        with contextlib.suppress(Unanswered, NoResponders, StoreError, Error):  # the next renewal looks again
            await self.watch.look(renewed)

    def _stop_input(self, held: Held, request: CancelRequest) -> None:
        pool = self.deployed.pool_of(held.lease.consumer)
        if pool is not None:
            pool.cancel(held, request)

    def _on_disconnected(self) -> None:
        if self._resuming is not None:
            self._resuming.cancel()
        self.examiner.on_disconnected()
        if self.draining:
            return
        logger.warning("the server is away; what runs goes on")
        self.puller.void_all()

    def _on_reconnected(self) -> None:
        self._pulling_from = time.monotonic() + random.uniform(*_SETTLE_DOWN)
        self.examiner.on_reconnected()
        self.slots.on_reconnected()
        self.fleet.on_reconnected()
        self._resuming = self.background.spawn(self._resume())

    async def _resume(self) -> None:
        """Renew everything first, so that nothing is delivered to somebody else; then, after a moment, ask again.

        Ends with the connection: the next one begins anew, and its server may have forgotten what this one knew.
        """
        for held in list(self._held.values()):
            await held.lease.renew()
        logger.info("the server is back")
        # List everything held, so that nobody runs what the server may deliver once more as if for the first time.
        await self.settler.insist(self.fleet.announce)
        self.examiner.trust_from(await self.settler.insist(lambda: self.broker.workers.server_time(self.name)))
        await asyncio.sleep(max(0.0, self._pulling_from - time.monotonic()))
        self._feed_all()
        await self.settler.insist(self._read_deployed)

    def _on_fleet(self) -> None:
        """The workers are others, or do something else: so are the shares of what they have together."""
        for pool in self.pools:
            if pool.scaling.is_bounded:
                pool.feed()

    def _feed_all(self) -> None:
        for pool in list(self.pools):
            pool.feed()

    # --- time --------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        self.puller.check()
        for key, pool in list(self.awake.items()):
            pool.tick()
            if not pool.is_awake:
                del self.awake[key]
        self.capacity.make_way()
        self._pass_on()
        await self.fleet.tick()

    def _pass_on(self) -> None:
        """Hand inputs that wait for room here to workers that have it."""
        waiting = self.capacity.starving(_HELD_TOO_LONG)
        if not waiting or self.settler.trouble:
            return
        for pool in waiting:
            fit = (other for other in self.fleet.others if str(pool.key) not in other.unfit)
            if any(pool.size.fits(Size.free_at(other)) for other in fit):
                pool.hand_back("another worker has room")

    def wake_at(self, moment: float, pool: Pool) -> None:
        """Feed a pool again at a monotonic time."""
        asyncio.get_running_loop().call_later(max(0.0, moment - time.monotonic()) + 0.01, pool.feed)

    # --- what pools need ---------------------------------------------------------------------------------------------

    def next_seq(self) -> int:
        """A number for one delivery of an input, new within this worker."""
        return next(self._seq)

    def new_container_name(self) -> str:
        return f"ta-{self.name.rpartition('-')[2]}-{next(self._container_numbers)}"

    def container_variables(self, own: Mapping[str, str]) -> dict[str, str]:
        """The environment of a container: how it reaches the mesh (as a role of its own), then the function's own."""
        about = {
            "MESH_ENVIRONMENT": self.broker.topology.environment,
            "MESH_NATS_URL": self._container_url(),
            "MESH_STATE_DIR": os.devnull,
        }
        return containers.environment(own, about)

    async def secrets(self, spec: FunctionSpec) -> dict[str, str]:
        """The variables of a function's secrets, but those that its `env=` has.

        Raises:
            NotHere: one is missing, or cannot be read here.
        """
        values = await vault.values_of(self.broker, spec.secrets, self.settings.key_file, self.name)
        return {variable: value for variable, value in values.items() if variable not in spec.env}

    def _container_url(self) -> str:
        """Never the worker's own credentials. Where there are none, it is the same address."""
        if self.settings.container_url:
            return self.settings.container_url
        return "" if self.broker.connection.needs_credentials else self.settings.nats_url

    def on_output(self, key: PoolKey, container: Container, held: Held | None, stream: int, text: str) -> None:
        """Output of a function: to whoever follows it, to the log stream, and to this worker's own output."""
        call, index = held.key.split(".") if held else ("_", container.name)
        subject = self.broker.topology.log_subject(key.app, key.function, call, index)
        headers = {"Mesh-Stream": "stdout" if stream == 1 else "stderr", "Mesh-Container": container.name}
        self.background.spawn(self.broker.log(subject, text, headers))
        if self._show_output:
            self._show_output(str(key), held.key if held else container.name, stream, text)


def _offer(worker: str, settings: Settings) -> Offer:
    """What this machine has for containers, as far as the settings do not say otherwise."""
    size = Size(
        containers=settings.containers or 8 * (os.cpu_count() or 1),
        cpus=settings.cpus or machine.cores(),
        memory=settings.memory or machine.memory(),
    )
    python = ".".join(platform.python_version_tuple()[:2])
    labels = parse_labels(settings.labels)
    return Offer(worker=worker, python=python, size=size, labels=labels, pythons=pythons.seen())
