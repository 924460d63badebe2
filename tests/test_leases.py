"""Pulling: what is asked for and does not come is noticed, however patient the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mesh.broker import Broker, Lease, Puller
from mesh.broker.leases import BUSY, IDLE, Pace
from tests.support import Mesh

WORK = """
    import mesh
    app = mesh.App("pulled")

    @app.function()
    def work(name):
        return name
"""
CONSUMER = "pulled+work+_"
QUICK = Pace(expires=2.0, heartbeat=0.2)
PATIENT = Pace(expires=600.0, heartbeat=60.0)


class Asking:
    """A puller, and what it reports."""

    def __init__(self, broker: Broker) -> None:
        self.leases: list[Lease] = []
        self.voids: list[tuple[str, str]] = []
        self.puller = Puller(
            broker.connection, broker.topology, self.leases.append, lambda *void: self.voids.append(void)
        )

    async def ask(self, pace: Pace) -> None:
        self.puller.reserve(CONSUMER, 1, pace)
        await self.puller.ask(CONSUMER, 1, pace)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.02)
                self.puller.check()


def test_a_lost_request_is_noticed_and_made_again(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    call = mesh.deploy(WORK).work.spawn("a")

    async def lose_one(broker: Broker) -> str:
        asking = Asking(broker)
        await asking.puller.start()
        asking.puller.reserve(CONSUMER, 1, QUICK)  # as if what `ask` sends never arrived
        await asking.until(lambda: asking.voids)
        assert asking.voids == [(CONSUMER, "silent")]
        assert asking.puller.outstanding(CONSUMER) == 0
        await asking.ask(QUICK)
        await asking.until(lambda: asking.leases)
        await asking.puller.stop()
        address = asking.leases[0].address
        assert address is not None
        return address.call

    assert mesh.ask(lose_one) == call.object_id


def test_the_server_shows_life_and_then_says_that_it_has_nothing(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(WORK)

    async def wait(broker: Broker) -> tuple[str, str]:
        asking = Asking(broker)
        await asking.puller.start()
        await asking.ask(QUICK)
        demand = asking.puller._demands[CONSUMER]
        asked = demand.asked
        async with asyncio.timeout(20):
            while not demand.heard > asked:  # a heartbeat, long before the request expires
                await asyncio.sleep(0.02)
            assert demand.outstanding == 1
            while not asking.voids:
                await asyncio.sleep(0.02)
        await asking.puller.stop()
        return asking.voids[0]

    assert mesh.ask(wait) == (CONSUMER, "Request Timeout")


def test_silence_is_measured_by_the_slowest_of_several_requests(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(WORK)

    async def wait(broker: Broker) -> None:
        asking = Asking(broker)
        await asking.puller.start()
        asking.puller.reserve(CONSUMER, 1, PATIENT)
        asking.puller.reserve(CONSUMER, 1, QUICK)
        await asyncio.sleep(3 * QUICK.heartbeat)
        asking.puller.check()
        assert not asking.voids, "the patient one is not overdue"
        asking.puller.void_all()
        asking.puller.reserve(CONSUMER, 1, QUICK)
        await asking.until(lambda: asking.voids)

    mesh.ask(wait)


def test_the_server_takes_the_paces_of_workers(own_mesh: Callable[..., Mesh]) -> None:
    """It refuses a heartbeat of more than half of what a request waits."""
    mesh = own_mesh()
    call = mesh.deploy(WORK).work.spawn("a")

    async def ask(broker: Broker, pace: Pace) -> str:
        asking = Asking(broker)
        await asking.puller.start()
        await asking.ask(pace)
        await asking.until(lambda: asking.leases or asking.voids)
        assert not asking.voids
        await asking.leases[0].nak()
        await asking.puller.stop()
        address = asking.leases[0].address
        assert address is not None
        return address.call

    for pace in (BUSY, IDLE):
        assert mesh.ask(lambda broker, pace=pace: ask(broker, pace)) == call.object_id
