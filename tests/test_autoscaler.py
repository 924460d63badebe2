"""How many containers a pool should have: single decisions, and what comes of them over time."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.autoscaler import Bounds, Load, Plan, decide
from mesh.fleet import share
from tests.simulation import Simulation, at_random, evenly

# --- one decision ----------------------------------------------------------------------------------------------------


def plan(bounds: dict[str, Any] | None = None, **load: Any) -> tuple[int, int]:
    found = decide(Load(**{"quiet": 1000.0, **load}), Bounds(**(bounds or {})))
    return found.start, found.end


@pytest.mark.parametrize(
    ("load", "bounds", "started"),
    [
        ({}, {}, 0),
        ({"waiting": 1}, {}, 1),  # from zero, by the waiting call itself
        ({"waiting": 200}, {}, 200),  # how long they take is not known: one for each
        ({"waiting": 200, "busy": 2, "starting": 3}, {}, 197),
        ({"busy": 1}, {}, 0),
        ({"waiting": 200}, {"maximum": 4}, 4),
        ({"waiting": 200, "busy": 4}, {"maximum": 4}, 0),
        ({}, {"minimum": 2}, 2),
        ({"starting": 1, "idle": (5.0,)}, {"minimum": 2}, 0),
        ({"waiting": 1}, {"minimum": 2}, 2),
        ({"waiting": 3}, {"minimum": 2}, 3),
        ({}, {"minimum": 5, "maximum": 4}, 4),  # where the fleet's share is larger than a bound set meanwhile
        ({}, {"buffer": 3}, 0),  # the buffer is kept while the pool is in use only
        ({"busy": 1}, {"buffer": 3}, 3),
        ({"busy": 1, "idle": (1.0, 1.0)}, {"buffer": 3}, 1),
        ({"waiting": 2, "busy": 1}, {"buffer": 3}, 5),
        ({"waiting": 2, "busy": 1}, {"buffer": 3, "maximum": 5}, 4),
        ({"busy": 1}, {"buffer": 1, "minimum": 4}, 3),  # the minimum holds the buffer
        ({"quiet": 10.0}, {"buffer": 3}, 3),  # it had inputs lately
        ({"in_use": True}, {"buffer": 2}, 2),  # or has some elsewhere
        ({"leaving": 1}, {}, 1),  # its replacement comes before it goes
        ({"leaving": 1, "starting": 1}, {}, 0),
    ],
)
def test_containers_are_started(load: dict[str, Any], bounds: dict[str, Any], started: int) -> None:
    assert plan(bounds, **load) == (started, 0)


@pytest.mark.parametrize(
    ("waiting", "runs", "duration", "started"),
    [
        (100, (0.0,), 0.001, 0),  # one comes to them within half a second
        (100, (0.0,), 0.05, 9),  # five seconds of work, for half a second
        (100, (0.0,), 1.0, 99),  # the one that runs comes to one of them in time
        (100, (0.0,), 60.0, 100),
        (1, (0.0,), 0.4, 0),
        (1, (0.0,) * 4, 2.0, 0),  # one of the four ends within a second
        (1, (0.0,), 2.0, 1),
        (1, (5.0,), 0.001, 1),  # one that runs far longer than others is not waited for
        (1, (), 0.001, 1),  # nothing runs but what waits itself
        (200, (30.0,) * 20, 0.05, 200),  # they do not take as long as they did
    ],
)
def test_a_backlog_is_worked_off_by_few_where_runs_are_short(
    waiting: int, runs: tuple[float, ...], duration: float, started: int
) -> None:
    assert plan(waiting=waiting, runs=runs, busy=max(1, len(runs)), duration=duration) == (started, 0)


def test_a_shortage_that_lasts_is_worth_containers_however_small_it_is() -> None:
    load: dict[str, Any] = {"runs": (0.1,) * 4, "busy": 4, "duration": 0.2}
    assert plan(waiting=6, **load) == (0, 0)
    assert plan(waiting=1, short=1.0, **load) == (1, 0)
    assert plan(waiting=6, short=1.0, **load) == (3, 0)
    assert plan({"buffer": 2}, idle=(0.0,), **load) == (0, 0)
    assert plan({"buffer": 2}, idle=(0.0,), short=1.0, **load) == (1, 0)


def test_containers_that_take_several_inputs_at_once_are_fewer() -> None:
    assert plan({"target": 10}, waiting=95) == (10, 0)
    assert plan({"target": 10}, waiting=10, runs=(0.0,) * 10, busy=1, duration=0.4) == (0, 0)
    assert plan({"target": 10}, waiting=30, runs=(0.0,) * 10, busy=1, duration=0.5) == (2, 0)


@pytest.mark.parametrize(
    ("load", "bounds", "ended"),
    [
        ({"idle": (61.0,)}, {}, 1),
        ({"idle": (59.0,)}, {}, 0),
        ({"idle": (5.0, 2.0)}, {"window": 3.0}, 1),  # the one that was idle longest
        ({"idle": (99.0, 99.0, 99.0)}, {"minimum": 2}, 1),
        ({"idle": (99.0, 99.0)}, {"kept": 1}, 1),  # nobody else has it
        ({"busy": 2, "idle": (99.0, 99.0)}, {"minimum": 1}, 2),
        ({"busy": 1, "idle": (99.0, 99.0, 99.0)}, {"buffer": 2}, 1),
        ({"quiet": 30.0, "idle": (99.0, 99.0)}, {"buffer": 2}, 0),
        ({"idle": (99.0, 99.0)}, {"buffer": 2}, 2),
        ({"busy": 3, "idle": (1.0, 0.5)}, {"maximum": 4}, 1),  # it was lowered: that waits for no window
        ({"busy": 6, "idle": (1.0,)}, {"maximum": 4}, 1),
        ({"idle": (99.0, 99.0)}, {"minimum": 5, "maximum": 1}, 1),
    ],
)
def test_containers_are_ended(load: dict[str, Any], bounds: dict[str, Any], ended: int) -> None:
    start, end = plan(bounds, duration=0.1, **load)
    assert (start, end) == (0, ended)


LOADS = st.builds(
    Load,
    waiting=st.integers(0, 10**6),
    runs=st.lists(st.floats(0, 10**5), max_size=20),
    busy=st.integers(0, 100),
    leaving=st.integers(0, 5),
    starting=st.integers(0, 100),
    idle=st.lists(st.floats(0, 10**5), max_size=20).map(lambda idle: sorted(idle, reverse=True)),
    in_use=st.booleans(),
    duration=st.none() | st.floats(0, 86_400),
    short=st.floats(0, 10),
    quiet=st.floats(0, 10**5),
)
BOUNDS = st.builds(
    Bounds,
    minimum=st.integers(0, 100),
    kept=st.integers(0, 100),
    maximum=st.none() | st.integers(1, 100),
    buffer=st.integers(0, 100),
    window=st.floats(1, 1000),
    target=st.integers(1, 100),
)


@given(LOADS, BOUNDS)
def test_the_bounds_always_hold(load: Load, bounds: Bounds) -> None:
    found = decide(load, bounds)
    after = load.containers + found.start - found.end
    limit = bounds.maximum or 10**9
    assert found.start == 0 or found.end == 0
    assert 0 <= found.end <= len(load.idle)
    assert after >= min(bounds.minimum, limit)
    assert found.start == 0 or after <= limit
    assert after <= limit or found.end == len(load.idle)


@given(LOADS, BOUNDS)
def test_whoever_waits_gets_a_container(load: Load, bounds: Bounds) -> None:
    if load.waiting:
        assert load.containers + decide(load, bounds).start >= 1


@given(LOADS, BOUNDS)
def test_what_was_decided_is_not_decided_again(load: Load, bounds: Bounds) -> None:
    """Once what it starts is starting, and what it ends has ended, there is nothing more to do."""
    found = decide(load, bounds)
    then = Load(
        **{name: getattr(load, name) for name in ("waiting", "runs", "busy", "leaving", "in_use", "duration", "short")},
        quiet=load.quiet,
        starting=load.starting + found.start,
        idle=load.idle[found.end :],
    )
    assert decide(then, bounds) == Plan(0, 0)


# --- over time -------------------------------------------------------------------------------------------------------


def fixed(seconds: float) -> Any:
    return lambda: seconds


@pytest.mark.parametrize(
    ("rate", "seconds"),
    [(1, 0.3), (7, 0.1), (10, 0.25), (3.1, 1.0), (100, 0.033), (0.5, 5.0), (0.41, 8.0), (33, 0.3), (9.9, 0.1)],
)
@pytest.mark.parametrize("start", [0.02, 2.0])
def test_under_a_constant_load_nothing_starts_or_ends(rate: float, seconds: float, start: float) -> None:
    simulation = Simulation(fixed(seconds), start=start)
    simulation.run(evenly(rate), until=200)
    settled = max(30.0, 3 * seconds)
    assert simulation.changes_after(settled) == []
    assert simulation.containers_at(settled) <= rate * seconds * 1.5 + max(2, rate * start)


@pytest.mark.parametrize("bounds", [{}, {"buffer": 2}, {"minimum": 3}])
@pytest.mark.parametrize(("rate", "seconds"), [(10, 0.03), (20, 0.05), (40, 0.05), (100, 0.04), (10, 0.1)])
def test_under_a_constant_load_at_random_nothing_flaps(rate: float, seconds: float, bounds: dict[str, Any]) -> None:
    """The same seeds at each run. Runs of any length, independent of each other: the worst there is."""
    changes = 0
    for seed in range(3):
        chance = random.Random(seed)
        simulation = Simulation(lambda chance=chance: chance.expovariate(1 / seconds), Bounds(**bounds))  # type: ignore[misc]
        simulation.run(at_random(rate, chance), until=300)
        changes += len(simulation.changes_after(30))
    assert changes <= 2  # in a quarter of an hour


@pytest.mark.parametrize("seconds", [0.02, 0.2, 1.0, 20.0])
def test_a_load_that_steps_is_followed(seconds: float) -> None:
    """0, then 200 at once, then 0, then a burst again."""
    simulation = Simulation(fixed(seconds), Bounds(window=10.0), start=0.1)
    bursts = [[10.0 + n / 10_000 for n in range(200)], [100.0 + n / 100 for n in range(200)]]
    simulation.run(itertools.chain(*bursts), until=150)
    assert simulation.containers_at(9.9) == 0
    assert simulation.containers_at(10.2) >= 200  # nobody knew how long they take
    assert simulation.containers_at(80) == 0  # idle for the window, and gone
    assert max(simulation.waits) < 1.7
    assert simulation.containers_at(104) <= 200
    assert simulation.containers_at(149) == 0


def test_what_is_too_many_after_a_burst_ends_while_the_load_goes_on() -> None:
    simulation = Simulation(fixed(0.2), Bounds(window=10.0))
    simulation.run(itertools.chain([0.0] * 50, evenly(10, since=1.0)), until=60)
    assert simulation.containers_at(5) == 50
    assert simulation.containers_at(15) <= 4
    assert simulation.changes_after(30) == []


def test_callers_that_wait_for_each_other_get_their_containers() -> None:
    """Ten callers, each with one call at a time: at the end nobody waits."""
    simulation = Simulation(fixed(0.3))
    simulation.run_closed(callers=10, until=60)
    assert simulation.containers_at(10) == 10
    assert simulation.changes_after(10) == []


def test_a_minimum_is_there_before_any_load_and_after_it() -> None:
    simulation = Simulation(fixed(0.1), Bounds(minimum=3, window=5.0))
    simulation.run([20.0 + n / 100 for n in range(50)], until=120)
    assert [simulation.containers_at(moment) for moment in (1, 19, 119)] == [3, 3, 3]


def test_containers_of_one_use_are_replaced_as_inputs_come() -> None:
    simulation = Simulation(fixed(0.3), Bounds(buffer=2, window=5.0), once=True)
    simulation.run(evenly(5, until=30.0), until=60)
    assert max(simulation.waits[5:]) == 0  # the buffer has one ready
    assert simulation.containers_at(59) == 0


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "rooms", "shares"),
    [
        (3, [9], [3]),
        (3, [9, 9], [2, 1]),
        (2, [9, 9, 9], [1, 1, 0]),
        (10, [2, 9, 9], [2, 4, 4]),
        (10, [0, 1, 9], [0, 1, 9]),
        (10, [1, 1, 1], [4, 3, 3]),  # what fits nobody is dealt out all the same
        (0, [1, 1], [0, 0]),
        (5, [0, 0], [3, 2]),
    ],
)
def test_what_belongs_to_all_is_shared(total: int, rooms: list[int], shares: list[int]) -> None:
    assert [share(total, rooms, place) for place in range(len(rooms))] == shares


@given(st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_shares_add_up_and_keep_to_the_room_there_is(total: int, rooms: list[int]) -> None:
    shares = [share(total, rooms, place) for place in range(len(rooms))]
    assert sum(shares) == total
    if total <= sum(rooms):
        assert all(own <= room for own, room in zip(shares, rooms, strict=True))
