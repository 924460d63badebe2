"""How many containers a pool should have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.autoscaler import Load, containers_wanted
from mesh.spec import FunctionSpec


def wanted(waiting: int, running: int, duration: float | None = None, **options: Any) -> int:
    load = Load(waiting=waiting, running=running, duration=duration)
    return containers_wanted(load, FunctionSpec(name="f", **options))


@pytest.mark.parametrize(
    ("waiting", "running", "options", "containers"),
    [
        (0, 0, {}, 0),  # scales to zero
        (1, 0, {}, 1),
        (0, 1, {}, 1),
        (3, 2, {}, 5),  # one for each that waits or runs
        (0, 0, {"min_containers": 2}, 2),
        (1, 0, {"min_containers": 2}, 2),
        (3, 0, {"min_containers": 2}, 3),
        (9, 1, {"max_containers": 4}, 4),
        (9, 1, {"min_containers": 4, "max_containers": 4}, 4),
        (0, 0, {"buffer_containers": 3}, 0),  # the buffer is kept while the pool is active only
        (0, 1, {"buffer_containers": 3}, 4),
        (2, 1, {"buffer_containers": 3}, 6),
        (2, 1, {"buffer_containers": 3, "max_containers": 5}, 5),
        (0, 1, {"buffer_containers": 1, "min_containers": 4}, 4),  # the minimum holds the buffer
    ],
)
def test_a_pool_has_a_container_for_each_input_within_its_bounds(
    waiting: int, running: int, options: dict[str, Any], containers: int
) -> None:
    assert wanted(waiting, running, **options) == containers


@pytest.mark.parametrize(
    ("waiting", "running", "duration", "containers"),
    [
        (100, 1, None, 101),  # how long they take is not known yet
        (100, 1, 0.001, 2),  # a tenth of a second of work
        (100, 1, 0.05, 6),  # five seconds of work, to be done in one
        (100, 1, 1.0, 101),
        (100, 1, 60.0, 101),  # never more than there are inputs
        (1, 0, 0.001, 1),  # somebody has to run it
        (0, 3, 0.001, 3),
    ],
)
def test_a_backlog_of_short_runs_is_worked_off_by_few(
    waiting: int, running: int, duration: float | None, containers: int
) -> None:
    assert wanted(waiting, running, duration) == containers


LOADS = st.builds(
    Load,
    waiting=st.integers(0, 10**6),
    running=st.integers(0, 1000),
    duration=st.none() | st.floats(1e-9, 86_400),
)
SPECS = st.builds(
    lambda low, more, buffer: FunctionSpec(
        name="f", min_containers=low, max_containers=None if more is None else low + more + 1, buffer_containers=buffer
    ),
    st.integers(0, 100),
    st.none() | st.integers(0, 100),
    st.integers(0, 100),
)


@given(LOADS, SPECS)
def test_the_bounds_always_hold(load: Load, spec: FunctionSpec) -> None:
    containers = containers_wanted(load, spec)
    assert containers >= spec.min_containers
    assert spec.max_containers is None or containers <= spec.max_containers


@given(LOADS, SPECS)
def test_whoever_waits_gets_a_container(load: Load, spec: FunctionSpec) -> None:
    assert containers_wanted(load, spec) >= (load.waiting > 0)


@given(LOADS, SPECS, st.integers(1, 1000))
def test_more_to_do_never_means_fewer_containers(load: Load, spec: FunctionSpec, more: int) -> None:
    busier = Load(waiting=load.waiting + more, running=load.running, duration=load.duration)
    assert containers_wanted(busier, spec) >= containers_wanted(load, spec)
