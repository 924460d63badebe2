"""What `@mesh.concurrent` and `@mesh.batched` accept, where they may stand, and what they come to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest

import mesh
from mesh.decorators import batching, class_options, concurrency, function_options
from mesh.exception import InvalidError
from mesh.spec import FunctionSpec


def declared(*marks: Callable[[Any], Any], raw: Callable[..., Any] | None = None, **options: Any) -> FunctionSpec:
    """The spec of a function under these marks, the lowest last."""

    def run(x: int) -> int:
        return x

    marked = raw or run
    for mark in reversed(marks):
        marked = mark(marked)
    spec = mesh.App("a").function(serialized=True, **options)(marked).spec
    assert spec is not None
    return spec


def test_concurrent_says_how_many_inputs_a_container_runs() -> None:
    spec = declared(mesh.concurrent(max_inputs=10, target_inputs=4))
    assert (spec.max_inputs, spec.target_inputs, spec.inputs_wanted) == (10, 4, 4)
    assert declared(mesh.concurrent(max_inputs=10)).inputs_wanted == 10
    assert declared().inputs_wanted == 1


def test_batched_says_how_many_inputs_a_run_takes() -> None:
    spec = declared(mesh.batched(max_batch_size=8, wait_ms=50))
    assert (spec.max_batch_size, spec.wait_ms, spec.inputs_wanted) == (8, 50, 8)


def test_both_together_are_several_batches_at_once() -> None:
    marks = mesh.concurrent(max_inputs=3), mesh.batched(max_batch_size=8, wait_ms=50)
    spec = declared(*marks, retries=2)
    assert spec == declared(*reversed(marks), retries=2)
    assert (spec.max_inputs, spec.max_batch_size, spec.inputs_wanted) == (3, 8, 24)


def test_a_decorator_between_them_that_wraps_keeps_the_mark() -> None:
    def traced(raw: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(raw)(lambda *args: raw(*args))

    assert declared(traced, mesh.concurrent(max_inputs=5)).max_inputs == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_inputs": 0}, "max_inputs must be a whole number of at least 1, not 0"),
        ({"max_inputs": 2.5}, "max_inputs must be a whole number"),
        ({"max_inputs": None}, "max_inputs must be a whole number"),
        ({"max_inputs": 5, "target_inputs": 0}, "target_inputs must be a whole number of at least 1"),
        ({"max_inputs": 5, "target_inputs": 6}, r"target_inputs \(6\) must not be above max_inputs \(5\)"),
    ],
)
def test_concurrent_states_what_is_allowed(options: dict[str, Any], text: str) -> None:
    for decorator in (mesh.concurrent, concurrency):
        with pytest.raises(InvalidError, match=text):
            decorator(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_batch_size": 0, "wait_ms": 1}, "max_batch_size must be a whole number from 1 to 1000, not 0"),
        ({"max_batch_size": 1001, "wait_ms": 1}, "max_batch_size must be a whole number from 1 to 1000, not 1001"),
        ({"max_batch_size": 1, "wait_ms": -1}, "wait_ms must be a whole number from 0 to 600000, not -1"),
        ({"max_batch_size": 1, "wait_ms": 600_001}, "wait_ms must be a whole number from 0 to 600000, not 600001"),
    ],
)
def test_batched_states_what_is_allowed(options: dict[str, Any], text: str) -> None:
    for decorator in (mesh.batched, batching):
        with pytest.raises(InvalidError, match=text):
            decorator(**options)
    assert declared(mesh.batched(max_batch_size=1000, wait_ms=600_000)).wait_ms == 600_000


def test_the_options_are_keywords_and_needed() -> None:
    for wrong in ("concurrent()", "concurrent(5)", "batched(8, 50)", "batched(max_batch_size=8)", "batched(wait_ms=8)"):
        with pytest.raises(TypeError):
            eval(f"mesh.{wrong}", {"mesh": mesh})


@pytest.mark.parametrize("mark", [mesh.concurrent(max_inputs=2), mesh.batched(max_batch_size=2, wait_ms=1)])
def test_above_function_or_twice_is_refused(mark: Callable[[Any], Any]) -> None:
    app = mesh.App("a")
    with pytest.raises(InvalidError, match=r"must stand below @app.function\(\) .*swap them"):
        mark(app.function(serialized=True)(print_it))
    with pytest.raises(InvalidError, match=r"is on '.*' twice"):
        declared(mark, mark)


def print_it(x: int) -> None:
    print(x)


def test_concurrent_on_a_method_belongs_on_the_class() -> None:
    with pytest.raises(InvalidError, match=r"is on the method '.*Model.ask': put it on the class"):

        class Model:
            @mesh.concurrent(max_inputs=2)
            def ask(self, x: int) -> int:
                return x


def test_batched_and_method_stand_in_any_order() -> None:
    class Model:
        @mesh.batched(max_batch_size=8, wait_ms=50)
        @mesh.method()
        def ask(self, x: list[int]) -> list[int]:
            return x

    assert function_options(vars(Model)["ask"].raw) == batching(8, 50)
    with pytest.raises(InvalidError, match=r"is on the method '.*Other.tell': put it on the class"):

        class Other:
            @mesh.concurrent(max_inputs=2)
            @mesh.method()
            def tell(self, x: int) -> int:
                return x


def gives(x: list[int]) -> Generator[int]:
    yield from x


async def gives_later(x: list[int]) -> AsyncGenerator[int]:
    yield x[0]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (gives, "is a generator, which cannot be batched"),
        (gives_later, "is a generator, which cannot be batched"),
        (lambda x, y=1: x, "parameter 'y' cannot have a default"),
        (lambda *xs: xs, r"cannot have the parameter '\*xs'"),
        (lambda **xs: xs, r"cannot have the parameter '\*\*xs'"),
        (type("Model", (), {}), "is on the class 'Model': put it on the method"),
    ],
)
def test_what_cannot_be_batched_is_refused(raw: Callable[..., Any], text: str) -> None:
    with pytest.raises(InvalidError, match=text):
        mesh.batched(max_batch_size=2, wait_ms=1)(raw)


def test_a_container_for_one_input_cannot_have_several() -> None:
    with pytest.raises(InvalidError, match="single_use_containers and max_inputs=2 exclude each other"):
        declared(mesh.concurrent(max_inputs=2), single_use_containers=True)


def test_a_class_has_its_own_mark_and_that_of_its_one_method() -> None:
    @mesh.concurrent(max_inputs=4)
    class Model:
        @mesh.batched(max_batch_size=8, wait_ms=50)
        def ask(self, x: list[int]) -> list[int]:
            return x

        def other(self) -> None: ...

    alone = class_options(Model, {"ask": Model.ask})
    assert FunctionSpec(name="Model", **alone).inputs_wanted == 32
    assert function_options(Model.ask) == batching(8, 50)
    with pytest.raises(InvalidError, match="'ask' is batched, so it must be the only one; there is also other"):
        class_options(Model, {"ask": Model.ask, "other": Model.other})
    assert class_options(Model, {"other": Model.other}) == concurrency(4)
    assert class_options(type("Derived", (Model,), {}), {"other": Model.other}) == {}


def test_options_of_a_handle_replace_those_of_the_function() -> None:
    spec = FunctionSpec(name="f", max_inputs=2)
    assert dataclasses.replace(spec, **concurrency(6, 3)).inputs_wanted == 3
    assert dataclasses.replace(spec, **batching(5, 10)).inputs_wanted == 10


def test_a_spec_without_these_options_is_stored_as_before() -> None:
    assert FunctionSpec(name="f").to_json() == {"name": "f"}
    spec = declared(mesh.concurrent(max_inputs=3, target_inputs=2), mesh.batched(max_batch_size=8, wait_ms=50))
    assert FunctionSpec.from_json(spec.to_json()) == spec
