"""Slots: `max_containers` over the whole fleet, as the functions themselves saw it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import Function, FunctionCall
from mesh.broker import Broker
from mesh.broker.bucket import Bucket
from mesh.protocol import PoolKey
from mesh.server import NatsServer
from mesh.slots import claimable
from tests.chaos.proxy import Proxy
from tests.support import Ledger, Mesh, alive, new_mesh, until

TTL = 3  # seconds, of a slot in these tests

# Every container says that it is alive, fifty times a second, from before its first input until it is dead.
CAPPED = """
    import mesh, os, threading, time
    app = mesh.App("capped")
    VERSION = {version}

    def note(name, text):
        file = os.open("{directory}/" + name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{{time.monotonic():.4f}} {{os.getpid()}} {{text}}\\n".encode())
        os.close(file)

    def live():
        while True:
            note("alive", VERSION)
            time.sleep(0.02)

    if not mesh.is_local():
        threading.Thread(target=live, daemon=True).start()

    @app.function({options})
    def work(seconds=0.0, name=""):
        note("begun", name)
        time.sleep(seconds)
        note("ended", name)
        return os.getpid()
"""


def deploy(mesh: Mesh, options: str, version: int = 1) -> Function[..., int]:
    """The function, deployed with these options."""
    module = mesh.deploy(CAPPED.format(directory=mesh.directory, options=options, version=version))
    return module.work


def lives(ledger: Ledger) -> dict[str, tuple[float, float]]:
    """First and last moment at which each container was seen alive."""
    found: dict[str, tuple[float, float]] = {}
    for line in ledger.lines():
        moment, process, *_ = line.split()
        first, last = found.get(process, (float(moment), 0.0))
        found[process] = first, max(last, float(moment))
    return found


def most_at_once(intervals: Iterable[tuple[float, float]]) -> int:
    """How many of these overlap at most."""
    steps = sorted([(first, 1) for first, _ in intervals] + [(last, -1) for _, last in intervals])
    most = count = 0
    for _, step in steps:
        count += step
        most = max(most, count)
    return most


def most_alive(mesh: Mesh) -> int:
    return most_at_once(list(lives(mesh.ledger("alive")).values()))


def begun(mesh: Mesh, name: str = "") -> list[int]:
    """Processes that have begun the input of this name, in order."""
    lines = [line.split() for line in mesh.ledger("begun").lines()]
    return [int(process) for _, process, *called in lines if not name or called == [name]]


def slots(mesh: Mesh) -> dict[str, set[int]]:
    return mesh.ask(lambda broker: broker.slots.taken())


def owners(mesh: Mesh) -> list[str]:
    """Names of the workers that have slots."""

    async def read(broker: Broker) -> list[str]:
        entries = await Bucket(broker.connection, broker.topology, "slots").all("*.*.*.*")
        return [stored.body.decode() for stored in entries.values()]

    return mesh.ask(read)


# --- what may be claimed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cap", "taken", "numbers"),
    [
        (3, [], [0, 1, 2]),
        (3, [1], [0, 2]),
        (3, [0, 1, 2], []),
        (2, [4], [0]),  # the cap was lowered: one above it keeps one below it
        (2, [3, 4], []),
        (2, [2, 3, 4], []),
        (3, [0, 4], [1]),
        (3, [2, 4], [0]),
        (1, [0, 1, 2], []),
    ],
)
def test_what_may_be_claimed(cap: int, taken: list[int], numbers: list[int]) -> None:
    assert claimable(cap, taken) == numbers


@given(st.integers(1, 6), st.sets(st.integers(0, 9)), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9))))
def test_no_order_of_claims_exceeds_the_cap(cap: int, taken: set[int], steps: list[tuple[int, int]]) -> None:
    """Four workers look, and claim by what they saw then, while slots are released."""
    seen: dict[int, list[int]] = {}
    for worker, pick in steps:
        if worker in seen:
            free = [number for number in seen.pop(worker) if number not in taken]
            if free:
                taken.add(free[pick % len(free)])
                assert len(taken) <= cap
        elif pick % 3 == 0 and taken:
            taken.remove(sorted(taken)[pick % len(taken)])
        else:
            seen[worker] = claimable(cap, taken)


# --- the store -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 5])
def test_fifty_race_for_a_few_slots(own_mesh: Callable[..., Mesh], cap: int) -> None:
    mesh = own_mesh(slot_ttl=TTL)

    async def race(broker: Broker) -> list[int]:
        async def claim(owner: str) -> int:
            while free := claimable(cap, (await broker.slots.taken("a.f._")).get("a.f._", ())):
                if await broker.slots.claim("a.f._", random.choice(free), owner):
                    return 1
            return 0

        return await asyncio.gather(*(claim(f"w{n}") for n in range(50)))

    assert sum(mesh.ask(race)) == cap
    assert slots(mesh) == {"a.f._": set(range(cap))}
    until(lambda: not slots(mesh), 2 * TTL, "slots expire that nobody renews")


def test_a_slot_is_its_owners_until_it_is_released(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL)

    async def story(broker: Broker) -> None:
        store, freed = broker.slots, []
        await store.listen(lambda pool, backlog: freed.append((pool, backlog)))
        first = await store.claim("a.f._", 0, "w1")
        assert first
        assert await store.claim("a.f._", 0, "w2") is None
        second = await store.renew("a.f._", 0, "w1", first)
        assert second
        assert second > first
        third = await store.renew("a.f._", 0, "w1", first)  # the answer to the renewal before was lost
        assert third
        assert await store.renew("a.f._", 0, "w2", third - 1) is None
        await store.release("a.f._", 0, "w2", 0)
        assert (await store.taken())["a.f._"] == {0}, "which was not its to release"
        await store.release("a.f._", 0, "w1", first, 5)  # the same lost answer
        assert await store.taken() == {}
        assert await store.claim("a.f._", 0, "w2"), "at once"
        await broker.connection.flush()
        assert freed == [("a.f._", 0), ("a.f._", 5)]

    mesh.ask(story)


def test_locks_are_no_slots(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL)

    async def story(broker: Broker) -> None:
        assert await broker.locks.claim("sweep", "w", 30)
        assert await broker.slots.claim(broker.topology.pool_key(PoolKey("my.app", "f.g")), 7, "w")
        assert await broker.slots.taken() == {"my=app.f=g._": {7}}

    mesh.ask(story)


def test_a_slot_deleted_by_hand_ends_its_container_and_comes_back(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL)
    work = deploy(mesh, "max_containers=1")
    mesh.start_worker()
    call = work.spawn(3.0)
    until(lambda: begun(mesh))

    async def as_nats_kv_del_does(broker: Broker) -> None:
        subject = broker.topology.key_subject("slots", "capped.work._.0")
        await broker.connection.store(subject, b"", {"KV-Operation": "DEL"})

    mesh.ask(as_nats_kv_del_does)
    assert call.get(timeout=60) == begun(mesh)[1]
    assert most_alive(mesh) == 1


# --- the fleet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 5])
def test_fifty_containers_over_three_workers(own_mesh: Callable[..., Mesh], cap: int) -> None:
    mesh = own_mesh(slot_ttl=TTL)
    work = deploy(mesh, f"max_containers={cap}, single_use_containers=True, scaledown_window=1")
    calls = [work.spawn(0.02 * cap) for _ in range(50)]
    for _ in range(3):
        mesh.start_worker("--containers", "20")
    assert len(set(FunctionCall.gather(*calls))) == 50, "each in a container of its own"
    assert min(cap, 2) <= most_alive(mesh) <= cap
    until(lambda: not slots(mesh), what="what has ended keeps no slot")


@pytest.mark.load
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cap", [1, 5])
def test_fifty_workers_race_while_some_are_killed(own_mesh: Callable[..., Mesh], cap: int) -> None:
    mesh = own_mesh(slot_ttl=TTL, ack_wait=5)
    work = deploy(mesh, f"max_containers={cap}, single_use_containers=True")
    workers = [mesh.start_worker("--containers", "1") for _ in range(50)]
    calls = [work.spawn(0.1) for _ in range(50 * cap)]
    for worker in workers[:10]:
        count = len(begun(mesh))
        until(lambda count=count: len(begun(mesh)) > count, 60)  # type: ignore[misc]
        worker.kill()
    FunctionCall.gather(*calls)
    assert min(cap, 2) <= most_alive(mesh) <= cap


@pytest.mark.parametrize("options", ["max_containers=1", "max_containers=2, single_use_containers=True"])
def test_no_input_waits_beside_a_free_slot(own_mesh: Callable[..., Mesh], options: str) -> None:
    """Slots live long here: whoever waited for one to expire, or for a slow look, would wait for a minute."""
    mesh = own_mesh(slot_ttl=600)
    work = deploy(mesh, options)
    workers = [mesh.start_worker() for _ in range(3)]
    for _ in range(4):  # from idle, so that each worker has asked for an input
        FunctionCall.gather(*(work.spawn(0.02) for _ in range(5)))
    calls = [work.spawn(0.02) for _ in range(60)]
    until(lambda: len(begun(mesh)) > 25)
    owner = until(lambda: owners(mesh))[0]
    assert next(worker for worker in workers if f"worker {owner} is ready" in worker.log).stop() == 0
    FunctionCall.gather(*calls)
    assert most_alive(mesh) <= 2


def test_a_worker_that_joins_takes_the_slots_that_others_have_no_room_for(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=600)
    work = deploy(mesh, "max_containers=3")
    calls = [work.spawn(0.1) for _ in range(60)]
    mesh.start_worker("--containers", "2")
    until(lambda: slots(mesh) and len(set(begun(mesh))) == 2)
    mesh.start_worker("--containers", "2")
    FunctionCall.gather(*calls)
    assert len(set(begun(mesh))) == 3
    assert most_alive(mesh) == 3


def test_a_slot_of_a_killed_worker_comes_back(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL, ack_wait=2)
    work = deploy(mesh, "max_containers=2")
    first = mesh.start_worker()
    calls = [work.spawn(0.2) for _ in range(30)]
    until(lambda: len(set(begun(mesh))) == 2)
    mesh.start_worker()
    first.kill()
    FunctionCall.gather(*calls)
    assert most_alive(mesh) == 2
    assert len(set(begun(mesh))) == 4


def test_a_paused_worker_loses_its_containers_before_its_slots(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL, ack_wait=2)
    work = deploy(mesh, "max_containers=2")
    first = mesh.start_worker()
    calls = [work.spawn(0.5) for _ in range(40)]
    until(lambda: len(set(begun(mesh))) == 2)
    before = set(begun(mesh))
    mesh.start_worker()
    os.kill(first.pid, signal.SIGSTOP)
    try:
        until(lambda: len(set(begun(mesh))) == 4, 60, "the other one takes over")
        assert not any(map(alive, before)), "its zygote has killed what it ran"
    finally:
        os.kill(first.pid, signal.SIGCONT)
    FunctionCall.gather(*calls)
    assert most_alive(mesh) == 2
    assert all(call.status().attempts == 1 for call in calls), "it was no try of the user's"


def test_where_everything_is_paused_what_wakes_up_is_killed_at_once(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL, ack_wait=2)
    work = deploy(mesh, "max_containers=1")
    first = mesh.start_worker()
    call = work.spawn(60.0)
    until(lambda: begun(mesh))
    tree = descendants(first.pid)
    assert begun(mesh)[0] in tree
    mesh.start_worker()
    for process in tree:
        os.kill(process, signal.SIGSTOP)
    until(lambda: len(begun(mesh)) == 2, 60, "the other one takes over")
    woken = time.monotonic()
    for process in reversed(tree):  # what runs before who kills it
        os.kill(process, signal.SIGCONT)
    until(lambda: not alive(begun(mesh)[0]), what="it is killed")
    overlap = lives(mesh.ledger("alive"))[str(begun(mesh)[0])][1] - woken
    print(f"ran for {overlap:.3f} s beside the other one")
    assert overlap < 1, "0.1 s where the machine is not busy"
    call.cancel()


def descendants(pid: int) -> list[int]:
    """A process and all that come from it, parents first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(process for child in children for process in descendants(int(child)))]


def test_a_worker_that_is_cut_off_keeps_its_slot_no_longer_than_it_is_sure(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL, ack_wait=2)
    work = deploy(mesh, "max_containers=1")
    proxy = Proxy(mesh.server.port)
    try:
        mesh.start_worker(MESH_NATS_URL=f"nats://127.0.0.1:{proxy.port}")
        call = work.spawn(6.0, "long")
        until(lambda: begun(mesh, "long"))
        proxy.swallow()
        mesh.start_worker()
        until(lambda: len(begun(mesh, "long")) == 2, 60, "it runs again, on the other one")
        proxy.forward()
        assert call.get(timeout=60) == begun(mesh, "long")[1]
    finally:
        proxy.close()
    assert most_alive(mesh) == 1


def test_a_cut_that_is_mended_soon_stops_nothing(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=15)
    work = deploy(mesh, "max_containers=1")
    proxy = Proxy(mesh.server.port)
    try:
        mesh.start_worker(MESH_NATS_URL=f"nats://127.0.0.1:{proxy.port}")
        call = work.spawn(4.0)
        until(lambda: begun(mesh))
        for _ in range(5):
            proxy.cut()
        call.get()
    finally:
        proxy.close()
    assert len(begun(mesh)) == 1


def test_an_outage_ends_capped_containers_and_no_others(own_server: Callable[..., NatsServer], tmp_path: Path) -> None:
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, slot_ttl=TTL) as mesh:
        mesh.start_worker()
        capped = deploy(mesh, "max_containers=1").spawn(10.0, "capped")
        until(lambda: begun(mesh, "capped"))
        free = mesh.deploy(CAPPED.format(directory=tmp_path, options="", version=2).replace('"capped"', '"free"'))
        call = free.work.spawn(10.0, "free")
        until(lambda: begun(mesh, "free"))
        server.kill()
        until(lambda: not alive(begun(mesh, "capped")[0]), what="it is killed before its slot is anybody else's")
        assert alive(begun(mesh, "free")[0])
        own_server(store=tmp_path / "store", port=server.port)
        assert call.get() == begun(mesh, "free")[0]
        assert capped.get(timeout=60) == begun(mesh, "capped")[1]
        assert capped.status().attempts == 1, "it was no try of the user's, and no crash"


def test_a_redeploy_shares_the_slots_with_the_old_version(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL)
    workers = [mesh.start_worker() for _ in range(2)]
    module = mesh.deploy(CAPPED.format(directory=mesh.directory, options="max_containers=2", version=1))
    calls = [module.work.spawn(0.3) for _ in range(20)]
    for version in (2, 3, 4):
        until(lambda: any(line.endswith(f" {version - 1}") for line in mesh.ledger("alive").lines()))  # noqa: B023
        source = CAPPED.format(directory=mesh.directory, options="max_containers=2", version=version)
        module = mesh.redeploy(module, source)
    FunctionCall.gather(*calls)
    assert most_alive(mesh) == 2
    assert all(worker.process.poll() is None for worker in workers)


def test_a_lower_cap_holds_once_what_runs_has_ended(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(slot_ttl=TTL)
    for _ in range(2):
        mesh.start_worker("--containers", "3")
    module = mesh.deploy(CAPPED.format(directory=mesh.directory, options="max_containers=4", version=1))
    calls = [module.work.spawn(seconds) for seconds in (2.0, 2.5, 3.0, 3.5)]
    until(lambda: len(begun(mesh)) == 4)
    source = CAPPED.format(directory=mesh.directory, options="max_containers=1", version=2)
    module = mesh.redeploy(module, source)
    calls += [module.work.spawn(0.1) for _ in range(10)]
    FunctionCall.gather(*calls)
    assert sorted(begun(mesh)[:4]) == sorted(set(begun(mesh)[:4])), "each finished what it had"
    old = {line.split()[1] for line in mesh.ledger("alive").lines() if line.endswith(" 1")}
    intervals = lives(mesh.ledger("alive"))
    assert len(old) == 4
    for process in intervals.keys() - old:
        first = intervals[process][0]
        others = [one for one, (since, last) in intervals.items() if one != process and since < first < last]
        assert not others, "a container of the new version began beside another"


def test_a_small_function_gets_as_much_as_a_large_one_with_the_same_cap(own_mesh: Callable[..., Mesh]) -> None:
    check_shares(own_mesh(slot_ttl=TTL), 800, 40)


@pytest.mark.load
@pytest.mark.timeout(900)
def test_ten_thousand_calls_beside_a_hundred(own_mesh: Callable[..., Mesh]) -> None:
    check_shares(own_mesh(slot_ttl=TTL), 10_000, 100)


def check_shares(mesh: Mesh, large: int, small: int) -> None:
    """While the small one works through its calls, the large one gets through no more than twice as many."""
    source = CAPPED.format(directory=mesh.directory, options="max_containers=2", version=1)
    first = mesh.deploy(source.replace('"capped"', '"large"'))
    second = mesh.deploy(source.replace('"capped"', '"small"'))
    for _ in range(2):
        mesh.start_worker()
    calls = [first.work.spawn(0.05, "large") for _ in range(large)]
    until(lambda: begun(mesh, "large"))
    FunctionCall.gather(*(second.work.spawn(0.05, "small") for _ in range(small)))
    names = [line.split()[2] for line in mesh.ledger("begun").lines()]
    end = len(names) - names[::-1].index("small")
    between = names[names.index("small") : end]
    assert between.count("large") <= 2 * small
    for call in calls:
        call.cancel()
