"""What becomes of an input, given how its execution went: the one table that all promises about ends hang on.

Acting on it (`Settler`) is tested with a server, in the end-to-end and kill tests.
"""

from __future__ import annotations

from typing import Any

import pytest

from mesh.exception import FunctionTimeoutError, InternalFailure, NotFoundError
from mesh.judge import About, Again, Execution, Final, Kind, judge
from mesh.protocol import Failure, Format, State, failure
from mesh.records import Attempt, AttemptLog, Ending
from mesh.spec import FunctionSpec, Retries

VALUE_ERROR = Failure(
    type="builtins.ValueError",
    text="no",
    bases=("builtins.ValueError", "builtins.Exception", "builtins.BaseException"),
)
FAILED = Execution(kind=Kind.FAILED, failure=VALUE_ERROR, started=5.0)
TIMED_OUT = Execution(kind=Kind.TIMED_OUT, started=5.0)
CRASHED = Execution(kind=Kind.CRASHED, text="killed by SIGSEGV", started=5.0)
OUT_OF_MEMORY = Execution(kind=Kind.OUT_OF_MEMORY, text="out of memory, limit 64 MiB, peak 70 MiB", started=5.0)


def decide(
    execution: Execution, *before: Attempt, retries: Retries | None = None, crash_budget: int = 3
) -> Final | Again:
    """The verdict on an input whose earlier deliveries went as `before` says."""
    log = AttemptLog(attempts=dict(enumerate(before, 1)))
    spec = FunctionSpec(name="f", timeout=2.5, retries=retries)
    about = About(app="shop", function="f", code="0a1b", worker="w1", spec=spec, crash_budget=crash_budget)
    return judge(execution, log, len(before) + 1, about)


def final(verdict: Final | Again) -> tuple[State, bool, str]:
    assert isinstance(verdict, Final)
    return verdict.result.state, verdict.bury, verdict.result.error


def again(verdict: Final | Again) -> tuple[Ending, float, str]:
    assert isinstance(verdict, Again)
    return verdict.attempt.ending, verdict.delay, verdict.attempt.error


def before(ending: Ending, error: str = "") -> Attempt:
    return Attempt(ending=ending, worker="w0", error=error)


TOO_LONG = "mesh.exception.FunctionTimeoutError: function 'f' ran longer than its timeout of 2.5 s"


# --- what is final at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("execution", "state", "bury", "error"),
    [
        (Execution(kind=Kind.SUCCEEDED, body=b"1"), State.SUCCEEDED, False, ""),
        (FAILED, State.FAILED, True, "ValueError: no"),
        (TIMED_OUT, State.TIMED_OUT, True, TOO_LONG),
        (
            Execution(kind=Kind.CANCELLED, text="cancelled by ann"),
            State.CANCELLED,
            False,
            "mesh.exception.RemoteError: cancelled by ann",
        ),
        (
            Execution(kind=Kind.EXPIRED, text="too late"),
            State.EXPIRED,
            False,
            "mesh.exception.TimeoutError: too late",
        ),
        (
            Execution(kind=Kind.REFUSED, failure=failure(NotFoundError, "removed")),
            State.FAILED,
            True,
            "mesh.exception.NotFoundError: removed",
        ),
        (
            Execution(kind=Kind.REFUSED, text="no code"),
            State.FAILED,
            True,
            "mesh.exception.InternalFailure: no code",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Execution) else None,
)
def test_without_retries_this_is_how_an_input_ends(execution: Execution, state: State, bury: bool, error: str) -> None:
    assert final(decide(execution)) == (state, bury, error)


@pytest.mark.parametrize(
    ("execution", "state"),
    [
        (Execution(kind=Kind.SUCCEEDED), State.SUCCEEDED),
        (Execution(kind=Kind.CANCELLED, text="x"), State.CANCELLED),
        (Execution(kind=Kind.EXPIRED, text="x"), State.EXPIRED),
        (Execution(kind=Kind.REFUSED, text="x"), State.FAILED),
    ],
    ids=lambda value: value.kind if isinstance(value, Execution) else None,
)
def test_these_are_never_retried(execution: Execution, state: State) -> None:
    assert final(decide(execution, retries=Retries(max_retries=100)))[0] is state


@pytest.mark.parametrize("kind", [Kind.RETURNED, Kind.NOT_STARTED])
def test_what_was_handed_back_is_tried_again_when_the_worker_says_and_costs_nothing(kind: Kind) -> None:
    execution = Execution(kind=kind, text="the worker stops", delay=2.5)
    assert again(decide(execution)) == (Ending(kind.value), 2.5, "the worker stops")


def test_every_kind_of_execution_has_a_verdict() -> None:
    for kind in Kind:
        assert isinstance(decide(Execution(kind=kind, text="x")), Final | Again), kind


# --- retries ---------------------------------------------------------------------------------------------------------

TWO = Retries(max_retries=2, backoff_coefficient=3.0)


@pytest.mark.parametrize(
    ("tries", "delay"),
    [(0, 1.0), (1, 3.0), (2, None)],
)
@pytest.mark.parametrize(
    ("execution", "ending", "state", "error"),
    [
        (FAILED, Ending.FAILED, State.FAILED, "ValueError: no"),
        (TIMED_OUT, Ending.TIMED_OUT, State.TIMED_OUT, TOO_LONG),
    ],
    ids=["failed", "timed out"],
)
def test_failures_and_timeouts_share_the_retries(
    tries: int, delay: float | None, execution: Execution, ending: Ending, state: State, error: str
) -> None:
    verdict = decide(execution, *[before(Ending.FAILED), before(Ending.TIMED_OUT)][:tries], retries=TWO)
    if delay is None:
        assert final(verdict) == (state, True, error)
    else:
        assert again(verdict) == (ending, delay, error)


@pytest.mark.parametrize("ending", [Ending.CRASHED, Ending.RETURNED, Ending.ADOPTED, Ending.NOT_STARTED, Ending.BEGAN])
def test_what_was_not_the_functions_fault_leaves_its_retries(ending: Ending) -> None:
    verdict = decide(FAILED, before(ending), before(ending), retries=Retries(max_retries=1))
    assert again(verdict)[:2] == (Ending.FAILED, 1.0)


@pytest.mark.parametrize(
    ("options", "execution", "retried"),
    [
        ({"retry_on": ValueError}, FAILED, True),
        ({"retry_on": Exception}, FAILED, True),
        ({"retry_on": KeyError}, FAILED, False),
        ({"abort_on": Exception}, FAILED, False),
        ({"retry_on": FunctionTimeoutError}, TIMED_OUT, True),
        ({"retry_on": ["mesh.exception.TimeoutError"]}, TIMED_OUT, True),  # a class above it
        ({"retry_on": ValueError}, TIMED_OUT, False),
        ({"abort_on": FunctionTimeoutError}, TIMED_OUT, False),
        ({"abort_on": ["mesh.exception.Error"]}, TIMED_OUT, False),
    ],
)
def test_retries_may_depend_on_what_was_raised(options: dict[str, Any], execution: Execution, retried: bool) -> None:
    verdict = decide(execution, retries=Retries(max_retries=5, **options))
    assert isinstance(verdict, Again) is retried


def test_a_failure_that_says_nothing_of_its_bases_goes_by_its_type() -> None:
    bare = Execution(kind=Kind.FAILED, failure=Failure(type="builtins.ValueError", text="no"))
    assert isinstance(decide(bare, retries=Retries(max_retries=1, retry_on=ValueError)), Again)
    assert isinstance(decide(bare, retries=Retries(max_retries=1, retry_on=KeyError)), Final)


# --- crashes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("earlier", "error"),
    [
        ([], "killed by SIGSEGV on w1"),
        ([before(Ending.CRASHED, "killed by SIGSEGV on w0")], "killed by SIGSEGV on w1"),
        ([before(Ending.FAILED), before(Ending.RETURNED)], "killed by SIGSEGV on w1"),
    ],
)
def test_a_crash_within_the_budget_is_tried_again_at_once_without_any_retries(
    earlier: list[Attempt], error: str
) -> None:
    assert again(decide(CRASHED, *earlier)) == (Ending.CRASHED, 0.0, error)


def test_the_crash_that_ends_the_budget_ends_the_input_and_tells_them_all() -> None:
    earlier = [before(Ending.CRASHED, "out of memory on w0"), before(Ending.BEGAN)]
    told = "crashed 3 times: out of memory on w0; worker w0 lost; killed by SIGSEGV on w1"
    verdict = decide(CRASHED, *earlier, retries=Retries(max_retries=9))
    assert final(verdict) == (State.FAILED, True, f"mesh.exception.InternalFailure: function 'f' {told}")


def test_out_of_memory_is_a_crash_of_a_name_of_its_own() -> None:
    told = "out of memory, limit 64 MiB, peak 70 MiB on w1"
    assert again(decide(OUT_OF_MEMORY)) == (Ending.OUT_OF_MEMORY, 0.0, told)
    earlier = [before(Ending.CRASHED, "SIGSEGV on w0"), before(Ending.OUT_OF_MEMORY, "out of memory on w0")]
    state, bury, error = final(decide(OUT_OF_MEMORY, *earlier, retries=Retries(max_retries=9)))
    assert (state, bury) == (State.FAILED, True)
    assert error == (
        f"mesh.exception.OutOfMemoryError: function 'f' crashed 3 times: SIGSEGV on w0; out of memory on w0; {told}"
    )


@pytest.mark.parametrize(
    ("execution", "earlier", "name"),
    [
        (OUT_OF_MEMORY, [Ending.CRASHED, Ending.BEGAN], "OutOfMemoryError"),
        (CRASHED, [Ending.OUT_OF_MEMORY, Ending.OUT_OF_MEMORY], "InternalFailure"),
        (Execution(kind=Kind.CRASHED), [Ending.CRASHED, Ending.CRASHED, Ending.OUT_OF_MEMORY], "OutOfMemoryError"),
        (Execution(kind=Kind.CRASHED), [Ending.OUT_OF_MEMORY, Ending.OUT_OF_MEMORY, Ending.BEGAN], "InternalFailure"),
    ],
)
def test_the_last_crash_names_the_error(execution: Execution, earlier: list[Ending], name: str) -> None:
    _, _, error = final(decide(execution, *[before(ending, "x") for ending in earlier]))
    assert error.startswith(f"mesh.exception.{name}: function 'f' crashed 3 times: ")


def test_one_crash_is_told_as_one() -> None:
    assert final(decide(CRASHED, crash_budget=1))[2].endswith("function 'f' crashed once: killed by SIGSEGV on w1")


def test_the_budget_is_a_setting() -> None:
    assert isinstance(decide(CRASHED, crash_budget=1), Final)
    assert isinstance(decide(CRASHED, *[before(Ending.CRASHED, "x")] * 3, crash_budget=5), Again)


def test_an_input_that_lost_its_workers_ends_before_it_runs_again() -> None:
    """The worker that finds the budget used up settles it as crashed, with nothing of its own to add."""
    lost = [before(Ending.BEGAN), before(Ending.BEGAN), before(Ending.BEGAN)]
    state, _, error = final(decide(Execution(kind=Kind.CRASHED), *lost))
    assert state is State.FAILED
    assert error.endswith("crashed 3 times: worker w0 lost; worker w0 lost; worker w0 lost")


def test_the_caller_gets_an_internal_failure() -> None:
    verdict = decide(CRASHED, crash_budget=1)
    assert isinstance(verdict, Final)
    assert Failure.decode(verdict.result.body).type == f"{InternalFailure.__module__}.InternalFailure"


# --- what a result says ----------------------------------------------------------------------------------------------


def test_a_success_carries_the_value_and_who_made_it() -> None:
    execution = Execution(kind=Kind.SUCCEEDED, format=Format.PICKLE, body=b"\x80", started=5.0)
    verdict = decide(execution, before(Ending.FAILED), before(Ending.CRASHED))
    assert isinstance(verdict, Final)
    result = verdict.result
    assert (result.format, result.body, result.started) == (Format.PICKLE, b"\x80", 5.0)
    assert (result.app, result.function, result.code, result.worker) == ("shop", "f", "0a1b", "w1")
    assert result.attempt == 2  # crashes are no tries


def test_a_failure_carries_what_was_raised_and_who_ran_it() -> None:
    verdict = decide(FAILED, before(Ending.TIMED_OUT))
    assert isinstance(verdict, Final)
    result = verdict.result
    assert Failure.decode(result.body) == VALUE_ERROR
    assert (result.app, result.function, result.code, result.worker) == ("shop", "f", "0a1b", "w1")
    assert (result.attempt, result.started) == (2, 5.0)


def test_an_attempt_says_which_worker_and_when() -> None:
    verdict = decide(FAILED, retries=TWO)
    assert isinstance(verdict, Again)
    assert verdict.attempt.worker == "w1"
    assert verdict.attempt.at > 0
