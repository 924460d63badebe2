"""What code may ask about where it runs."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator

import pytest

import mesh
from mesh import context
from mesh.context import Container, Running, last_error, shown, waiting_in_mesh
from mesh.exception import InvalidError

CALL = "fc-01JXYZ0123ABCDEFGHT0KEN123"
ASKED = (
    mesh.current_function_call_id,
    mesh.current_input_id,
    mesh.current_attempt,
)


def running(seq: int = 1, attempt: int = 2, error: str = "ValueError: no") -> Running:
    return Running(CALL, seq, attempt, error, seq)


@pytest.fixture(autouse=True)
def outside() -> Iterator[None]:
    """This process is no container when a test ends, whatever the test made of it."""
    yield
    context._container = None
    context._waiting_inputs.clear()
    context.show_times(False)


@pytest.fixture
def announced() -> list[tuple[int, bool]]:
    """What the container told its worker; being one is part of it."""
    told: list[tuple[int, bool]] = []
    context.enter_container(Container("shop", "f", "main", lambda seq, waiting: told.append((seq, waiting))))
    return told


# --- which call ------------------------------------------------------------------------------------------------------


def test_outside_of_a_function_there_is_no_call() -> None:
    assert [ask() for ask in ASKED] == [None, None, None]
    assert last_error() == ""


def test_inside_of_a_function_its_call_input_and_attempt_are_known() -> None:
    token = context.current.set(running(seq=3))
    try:
        assert [ask() for ask in ASKED] == [CALL, f"{CALL}.3", 2]
        assert last_error() == "ValueError: no"
    finally:
        context.current.reset(token)
    assert mesh.current_function_call_id() is None


async def test_each_task_has_a_call_of_its_own() -> None:
    async def ask(seq: int) -> str | None:
        context.current.set(running(seq))
        await asyncio.sleep(0)
        return mesh.current_input_id()

    assert await asyncio.gather(*(ask(seq) for seq in range(3))) == [f"{CALL}.{seq}" for seq in range(3)]
    assert mesh.current_input_id() is None


def test_a_thread_that_a_function_starts_knows_no_call_unless_given_the_context() -> None:
    seen: list[str | None] = []
    token = context.current.set(running())
    try:
        thread = threading.Thread(target=lambda: seen.append(mesh.current_function_call_id()))
        thread.start()
        thread.join()
    finally:
        context.current.reset(token)
    assert seen == [None]


# --- where -----------------------------------------------------------------------------------------------------------


def test_everywhere_but_in_a_container_it_is_local(announced: list[tuple[int, bool]]) -> None:
    assert not mesh.is_local()
    context._container = None
    assert mesh.is_local()


def test_a_container_knows_its_app_function_and_environment(announced: list[tuple[int, bool]]) -> None:
    here = context.container()
    assert here is not None
    assert (here.app, here.function, here.environment) == ("shop", "f", "main")


# --- waiting for other calls -----------------------------------------------------------------------------------------


def test_a_container_lends_its_place_while_its_input_waits_inside_mesh(announced: list[tuple[int, bool]]) -> None:
    token = context.current.set(running())
    try:
        with waiting_in_mesh():
            assert announced == [(1, True)]
        assert announced == [(1, True), (1, False)]
    finally:
        context.current.reset(token)


def test_it_takes_its_place_back_also_when_what_it_waited_for_raised(announced: list[tuple[int, bool]]) -> None:
    token = context.current.set(running())
    try:
        with pytest.raises(ValueError), waiting_in_mesh():
            raise ValueError
    finally:
        context.current.reset(token)
    assert announced == [(1, True), (1, False)]


def test_waiting_within_waiting_is_told_once(announced: list[tuple[int, bool]]) -> None:
    token = context.current.set(running())
    try:
        with waiting_in_mesh():
            with waiting_in_mesh():
                pass
            assert announced == [(1, True)]
    finally:
        context.current.reset(token)
    assert announced == [(1, True), (1, False)]


async def test_an_input_that_gathers_several_calls_waits_until_the_last_has_come(
    announced: list[tuple[int, bool]],
) -> None:
    """Taking its place back after the first would keep the others from ever starting on a full worker."""
    first, last = asyncio.Event(), asyncio.Event()

    async def call(answered: asyncio.Event) -> None:
        with waiting_in_mesh():
            await answered.wait()

    context.current.set(running())
    calls = [asyncio.create_task(call(first)), asyncio.create_task(call(last))]
    await asyncio.sleep(0)
    first.set()
    await calls[0]
    assert announced == [(1, True)]
    last.set()
    await calls[1]
    assert announced == [(1, True), (1, False)]


def test_what_waits_elsewhere_lends_nothing(announced: list[tuple[int, bool]]) -> None:
    with waiting_in_mesh():  # code of the container that belongs to no input
        pass
    context._container = None
    token = context.current.set(running())
    try:
        with waiting_in_mesh():  # no container at all
            pass
    finally:
        context.current.reset(token)
    assert announced == []


# --- output ----------------------------------------------------------------------------------------------------------


def test_output_is_shown_within_the_block_only() -> None:
    assert not context.output_enabled()
    with mesh.enable_output():
        assert context.output_enabled()
        with mesh.enable_output():
            pass
        assert context.output_enabled()
    assert not context.output_enabled()


def test_output_is_shown_as_it_came_unless_times_are_asked_for() -> None:
    assert shown("one\ntwo") == "one\ntwo"
    context.show_times(True)
    assert re.fullmatch(r"\d\d:\d\d:\d\d one\n\d\d:\d\d:\d\d two", shown("one\ntwo"))
    assert shown("") == ""


def test_there_are_no_interactive_containers() -> None:
    with pytest.raises(InvalidError, match="interactive containers only, which mesh does not have"):
        mesh.interact()
