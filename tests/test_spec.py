"""What users may say of a function: every value checks itself, and its error states the legal range."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mesh
from mesh.exception import FunctionTimeoutError, InvalidError
from mesh.spec import (
    DAY,
    Cron,
    FunctionSpec,
    Period,
    Retries,
    check_app_name,
    check_env,
    check_environment,
    check_name,
    parse_retries,
    qualified_name,
)

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f", "Model.ask", "resize-2_x", "0", "a" * 64, "..."])
def test_a_name_of_letters_digits_dots_underscores_and_hyphens_is_allowed(name: str) -> None:
    assert check_name("function", name) == name


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a/b", "a+b", "a=b", "a*", "a>", "ä", "a\n", "٣"])
def test_any_other_name_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(InvalidError, match=r"function name .* is not allowed: 1 to 64 characters out of letters"):
        check_name("function", name)


@pytest.mark.parametrize("name", [None, 5, b"f", ["f"]])
def test_a_name_that_is_no_string_is_refused(name: object) -> None:
    with pytest.raises(InvalidError, match="app name must be a string, not"):
        check_name("app", name)


def test_an_app_may_not_be_named_like_an_app_of_a_single_run() -> None:
    assert check_app_name("apples") == "apples"
    with pytest.raises(InvalidError, match="names starting with 'ap-' are those of single runs"):
        check_app_name("ap-ples")


@pytest.mark.parametrize("name", ["main", "staging-2", "a" * 32])
def test_an_environment_is_named_with_small_letters_digits_and_hyphens(name: str) -> None:
    assert check_environment(name) == name


@pytest.mark.parametrize("name", ["", "Main", "a_b", "a.b", "a" * 33, "main\n"])
def test_any_other_environment_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidError, match="1 to 32 characters out of small letters, digits, hyphen"):
        check_environment(name)


# --- retries ---------------------------------------------------------------------------------------------------------


def test_retries_default_to_modals_values() -> None:
    retries = Retries(max_retries=3)
    assert (retries.backoff_coefficient, retries.initial_delay, retries.max_delay) == (2.0, 1.0, 60.0)
    assert (retries.min_delay, retries.jitter, retries.retry_on, retries.abort_on) == (1.0, 0.0, (), ())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_retries": -1}, "max_retries must be a whole number of at least 0, not -1"),
        ({"max_retries": 1.5}, "max_retries must be a whole number of at least 0, not 1.5"),
        ({"max_retries": "3"}, "max_retries must be a whole number of at least 0, not '3'"),
        ({"max_retries": True}, "max_retries must be a whole number of at least 0, not True"),
        ({"max_retries": None}, "max_retries must be a whole number of at least 0, not None"),
        ({"backoff_coefficient": 0.9}, "backoff_coefficient must be a number from 1 to 10, not 0.9"),
        ({"backoff_coefficient": 10.1}, "backoff_coefficient must be a number from 1 to 10, not 10.1"),
        ({"backoff_coefficient": math.nan}, "backoff_coefficient must be a number from 1 to 10, not nan"),
        ({"initial_delay": -0.1}, "initial_delay must be a number from 0 to 60, not -0.1"),
        ({"initial_delay": 61}, "initial_delay must be a number from 0 to 60, not 61"),
        ({"max_delay": 0.5}, "max_delay must be a number from 1 to 604800, not 0.5"),
        ({"max_delay": 604_801}, "max_delay must be a number from 1 to 604800, not 604801"),
        ({"min_delay": -1}, "min_delay must be a number from 0 to 60, not -1"),
        ({"jitter": 1.1}, "jitter must be a number from 0 to 1, not 1.1"),
        ({"retry_on": 5}, "retry_on takes exception classes, not 5"),
        ({"retry_on": [int]}, "retry_on takes exception classes, not <class 'int'>"),
        ({"abort_on": "ValueError"}, "abort_on takes exception classes, not 'ValueError'"),
    ],
)
def test_a_retry_option_out_of_its_range_is_refused_with_the_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        Retries(**{"max_retries": 1, **options})
    assert str(caught.value) == f"Retries: {text}"


@pytest.mark.parametrize("options", [{"backoff_coefficient": 1, "initial_delay": 0}, {"max_delay": 1}, {"jitter": 1}])
def test_the_ends_of_each_range_belong_to_it(options: dict[str, Any]) -> None:
    assert Retries(max_retries=0, **options).max_retries == 0


def test_the_number_of_retries_has_no_upper_bound() -> None:
    assert Retries(max_retries=10**9).max_retries == 10**9


@pytest.mark.parametrize("call", [lambda: Retries(), lambda: Retries(3)])
def test_retries_takes_keywords_only_and_needs_a_number(call: Any) -> None:
    with pytest.raises(TypeError):
        call()


@pytest.mark.parametrize(
    ("options", "delays"),
    [
        ({}, [1, 2, 4, 8, 16, 32, 60, 60]),
        ({"backoff_coefficient": 1.0, "initial_delay": 5.0}, [5, 5, 5]),
        ({"initial_delay": 0.0}, [1, 1, 1]),  # Modal's floor of one second
        ({"initial_delay": 0.25}, [1, 1, 1, 2]),
        ({"initial_delay": 0.25, "min_delay": 0}, [0.25, 0.5, 1, 2]),
        ({"initial_delay": 0, "min_delay": 0}, [0, 0]),
        ({"backoff_coefficient": 10.0, "initial_delay": 60, "max_delay": 7 * DAY}, [60, 600, 6000, 60_000, 600_000]),
        ({"max_delay": 1}, [1, 1]),
    ],
)
def test_the_delay_grows_by_the_coefficient_between_its_bounds(options: dict[str, Any], delays: list[float]) -> None:
    retries = Retries(max_retries=8, **options)
    assert [retries.delay(n) for n in range(1, len(delays) + 1)] == delays


@pytest.mark.parametrize("coefficient", [1, 1.0, 1.0001, 2, 2.0, 10.0])
@pytest.mark.parametrize("retry", [1_025, 100_000, 10**9])
def test_the_delay_stays_within_its_bounds_however_often_an_input_was_retried(coefficient: float, retry: int) -> None:
    retries = Retries(max_retries=10**9, backoff_coefficient=coefficient)
    assert 1 <= retries.delay(retry) <= 60


def test_without_a_first_delay_there_is_none_however_often_an_input_was_retried() -> None:
    assert Retries(max_retries=10**9, initial_delay=0, min_delay=0).delay(5_000) == 0


@given(chance=st.floats(0, 1), jitter=st.floats(0, 1), retry=st.integers(1, 2_000))
def test_jitter_takes_away_its_share_of_the_delay_at_most(chance: float, jitter: float, retry: int) -> None:
    steady, shaken = Retries(max_retries=1), Retries(max_retries=1, jitter=jitter)
    assert steady.delay(retry) * (1 - jitter) <= shaken.delay(retry, chance) <= steady.delay(retry)


def test_jitter_is_random_unless_its_chance_is_given() -> None:
    retries = Retries(max_retries=1, jitter=0.5)
    assert (retries.delay(3, 0.0), retries.delay(3, 0.5), retries.delay(3, 1.0)) == (4.0, 3.0, 2.0)
    assert len({retries.delay(3) for _ in range(20)}) > 1


class Flaky(ConnectionError): ...


@pytest.mark.parametrize(
    ("options", "raised", "covered"),
    [
        ({}, ValueError, True),
        ({"retry_on": OSError}, Flaky, True),
        ({"retry_on": [OSError]}, ValueError, False),
        ({"retry_on": (KeyError, Flaky)}, Flaky, True),
        ({"retry_on": [Flaky]}, ConnectionError, False),
        ({"abort_on": OSError}, Flaky, False),
        ({"abort_on": [Flaky]}, ConnectionError, True),
        ({"retry_on": OSError, "abort_on": Flaky}, Flaky, False),
        ({"retry_on": ["tests.test_spec.Flaky"]}, Flaky, True),
        ({"retry_on": FunctionTimeoutError}, FunctionTimeoutError, True),
        ({"retry_on": TimeoutError}, FunctionTimeoutError, False),  # mesh's own is no builtin TimeoutError
    ],
)
def test_retries_may_depend_on_the_class_that_was_raised(
    options: dict[str, Any], raised: type[Exception], covered: bool
) -> None:
    bases = [qualified_name(cls) for cls in raised.__mro__[:-1]]
    assert Retries(max_retries=1, **options).covers(bases) is covered


def test_exceptions_of_a_script_are_known_by_the_name_it_is_imported_under() -> None:
    named = Retries(max_retries=2, jitter=0.5, retry_on=["__main__.A", "builtins.OSError"], abort_on=["__main__.A.B"])
    expected = Retries(max_retries=2, jitter=0.5, retry_on=["shop.A", "builtins.OSError"], abort_on=["shop.A.B"])
    assert named.with_main_as("shop") == expected


def test_equal_retries_are_equal_and_say_all_of_themselves() -> None:
    one, same, other = Retries(max_retries=1), Retries(max_retries=1), Retries(max_retries=1, retry_on=KeyError)
    assert one == same != other
    assert hash(one) == hash(same)
    assert one != 1
    assert repr(other).startswith("Retries(abort_on=(), backoff_coefficient=2.0,")
    assert "retry_on=('builtins.KeyError',)" in repr(other)


@pytest.mark.parametrize("value", [None, 0])
def test_no_retries_are_none(value: object) -> None:
    assert parse_retries(value) is None


def test_a_number_of_retries_means_a_fixed_second_between_them() -> None:
    retries = parse_retries(3)
    assert retries is not None
    assert retries.max_retries == 3
    assert [retries.delay(n) for n in (1, 2, 3)] == [1.0, 1.0, 1.0]


def test_retries_are_taken_as_they_are() -> None:
    retries = Retries(max_retries=2)
    assert parse_retries(retries) is retries


@pytest.mark.parametrize("value", ["3", 1.5, True, [3], -1])
def test_anything_else_is_no_number_of_retries(value: object) -> None:
    with pytest.raises(InvalidError, match="retries must be a whole number of at least 0"):
        parse_retries(value)


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "* * * * *",
        "0 9 * * 1-5",
        "*/15 0,12 1 jan-DEC mon",
        "59 23 31 12 7",
        "5/10 * * * *",
        "0 0 1 1-3/2 sun-sat",
        "*/59 */23 */31 */12 */1",
    ],
)
def test_a_five_field_cron_line_is_a_schedule(line: str) -> None:
    assert Cron(line).cron_string == line
    assert Cron(line).timezone == "UTC"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("nonsense", "needs five fields: minute, hour, day of month, month, day of week"),
        ("", "needs five fields"),
        ("* * * * * *", "needs five fields"),
        ("60 * * * *", "'60' is no minute; 0 to 59, *, a-b, */n"),
        ("* 24 * * *", "'24' is no hour; 0 to 23"),
        ("* * 0 * *", "'0' is no day of month; 1 to 31"),
        ("* * * 13 *", "'13' is no month; 1 to 12"),
        ("* * * * 8", "'8' is no day of week; 0 to 7"),
        ("* * * * fun", "'fun' is no day of week"),
        ("* * jan * *", "'jan' is no day of month"),
        ("5-1 * * * *", "'5-1' is no minute"),
        ("*/0 * * * *", "'*/0' is no minute"),
        ("*/60 * * * *", "'*/60' is no minute"),
        ("1,,2 * * * *", "'' is no minute"),
        ("-5 * * * *", "'-5' is no minute"),
        ("² * * * *", "'²' is no minute"),
        ("٣ * * * *", "'٣' is no minute"),
        ("*/٣ * * * *", "'*/٣' is no minute"),
    ],
)
def test_a_cron_line_that_no_server_would_take_is_refused_where_it_is_written(line: str, text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        Cron(line)
    assert text in str(caught.value)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
def test_a_cron_line_is_meant_in_its_time_zone(zone: str) -> None:
    assert Cron("0 6 * * *", timezone=zone).timezone == zone


@pytest.mark.parametrize("zone", ["Europe/Bonn", "Europe", "", "../etc/passwd", "a\0b", "x" * 300])
def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(InvalidError, match=r"no time zone .*; use an IANA name such as 'Europe/Berlin'"):
        Cron("* * * * *", timezone=zone)


def test_a_period_adds_up_its_parts() -> None:
    assert Period(days=1, seconds=0.5) == Period(days=1, hours=0, seconds=0.5)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "needs at least one part above zero"),
        ({"minutes": 0}, "needs at least one part above zero"),
        ({"minutes": -1}, "Period: minutes must be a whole number of at least 0, not -1"),
        ({"hours": 0.5}, "Period: hours must be a whole number of at least 0, not 0.5"),
        ({"seconds": "5"}, "Period: seconds must be a number of at least 0, not '5'"),
        ({"seconds": math.inf}, "Period: seconds must be a number of at least 0, not inf"),
        ({"seconds": math.nan}, "Period: seconds must be a number of at least 0, not nan"),
    ],
)
def test_a_period_of_nothing_or_of_no_number_is_refused(parts: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        Period(**parts)
    assert text in str(caught.value)


def test_a_period_takes_keywords_only() -> None:
    with pytest.raises(TypeError):
        Period(5)  # type: ignore[misc]


# --- functions -------------------------------------------------------------------------------------------------------


def test_a_function_has_modals_defaults() -> None:
    """Records leave out what is a default, so to change one changes functions that are deployed."""
    assert dataclasses.asdict(FunctionSpec(name="f")) == {
        "name": "f",
        "timeout": 300.0,
        "startup_timeout": None,
        "retries": None,
        "min_containers": 0,
        "max_containers": None,
        "buffer_containers": 0,
        "scaledown_window": 60.0,
        "single_use_containers": False,
        "max_inputs": 1,
        "target_inputs": None,
        "max_batch_size": None,
        "wait_ms": 0,
        "cpu": None,
        "memory": None,
        "result_ttl": None,
        "keep_result": True,
        "detach": False,
        "is_generator": False,
        "env": {},
        "max_uses": None,
        "recycle_memory": None,
        "gpu": None,
        "labels": {},
        "methods": None,
        "parameters": None,
        "secrets": (),
        "web": None,
        "image": None,
    }


def test_a_pool_may_have_exactly_so_many_containers() -> None:
    assert FunctionSpec(name="f", min_containers=2, max_containers=2).max_containers == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "a b"}, "function name 'a b' is not allowed"),
        ({"timeout": None}, "timeout must be a number from 1 to 86400, not None"),
        ({"timeout": 0}, "timeout must be a number from 1 to 86400, not 0"),
        ({"timeout": 10**9}, "timeout must be a number from 1 to 86400, not 1000000000"),
        ({"startup_timeout": 0.5}, "startup_timeout must be a number from 1 to 86400, not 0.5"),
        ({"min_containers": -1}, "min_containers must be a whole number of at least 0, not -1"),
        ({"max_containers": 0}, "max_containers must be a whole number of at least 1, not 0"),
        ({"buffer_containers": 1.0}, "buffer_containers must be a whole number of at least 0, not 1.0"),
        (
            {"min_containers": 3, "max_containers": 2},
            "min_containers (3) must not be above max_containers (2)",
        ),
        ({"scaledown_window": 0}, "scaledown_window must be a number from 1 to 86400, not 0"),
        ({"cpu": 0}, "cpu must be a number from 0.01 to 1024, not 0"),
        ({"memory": 15}, "memory must be a whole number of at least 16, not 15"),
        ({"result_ttl": 59}, "result_ttl must be a number from 60 to 604800, not 59"),
        ({"result_ttl": 8 * DAY}, "result_ttl must be a number from 60 to 604800, not 691200.0"),
        ({"keep_result": "no"}, "keep_result must be True or False, not 'no'"),
        ({"detach": 1}, "detach must be True or False, not 1"),
        ({"single_use_containers": None}, "single_use_containers must be True or False, not None"),
        (
            {"is_generator": True, "retries": Retries(max_retries=1)},
            "retries cannot be used on the generator function 'f'",
        ),
        ({"env": {"A": 1}}, "env: the value of A must be a string, not int"),
    ],
)
def test_a_function_option_out_of_its_range_is_refused_with_the_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        FunctionSpec(**{"name": "f", **options})
    assert text in str(caught.value)


def test_a_container_may_take_as_long_to_start_as_an_input_to_run_unless_told_otherwise() -> None:
    assert FunctionSpec(name="f", timeout=20).start_limit == 20
    assert FunctionSpec(name="f", timeout=20, startup_timeout=5).start_limit == 5


def test_a_spec_is_written_down_as_what_differs_from_the_defaults() -> None:
    assert FunctionSpec(name="f").to_json() == {"name": "f"}
    spec = FunctionSpec(name="f", timeout=5, max_containers=2, env={"A": "1"}, retries=Retries(max_retries=1))
    assert spec.to_json() == {
        "name": "f",
        "timeout": 5,
        "max_containers": 2,
        "env": {"A": "1"},
        "retries": {
            "abort_on": (),
            "backoff_coefficient": 2.0,
            "initial_delay": 1.0,
            "jitter": 0.0,
            "max_delay": 60.0,
            "max_retries": 1,
            "min_delay": 1.0,
            "retry_on": (),
        },
    }


SPECS = st.builds(
    FunctionSpec,
    name=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    timeout=st.floats(1, DAY),
    startup_timeout=st.none() | st.floats(1, DAY),
    retries=st.none()
    | st.builds(
        Retries,
        max_retries=st.integers(0, 100),
        jitter=st.floats(0, 1),
        retry_on=st.lists(st.sampled_from([ValueError, OSError])),
    ),
    max_containers=st.none() | st.integers(1, 1000),
    memory=st.none() | st.integers(16, 10**6),
    result_ttl=st.none() | st.floats(60, 7 * DAY),
    keep_result=st.booleans(),
    env=st.dictionaries(st.from_regex(r"[A-Z_]\w*", fullmatch=True), st.from_regex(r"[^\0]*", fullmatch=True)),
)


@given(SPECS)
def test_a_spec_survives_being_written_down(spec: FunctionSpec) -> None:
    assert FunctionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_options_of_newer_versions_are_ignored() -> None:
    written = {"name": "f", "priority": 5, "retries": {"max_retries": 2, "budget": 10}}
    assert FunctionSpec.from_json(written) == FunctionSpec(name="f", retries=Retries(max_retries=2))


# --- variables -------------------------------------------------------------------------------------------------------


def test_variables_of_letters_digits_and_underscores_are_allowed() -> None:
    check_env({"PATH": "/bin", "_x1": "", "A" * 16_384: "v" * 32_768})


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"1A": "x"}, "'1A' is no variable name; letters, digits and underscore, no digit first"),
        ({"": "x"}, "'' is no variable name"),
        ({"A=B": "x"}, "'A=B' is no variable name"),
        ({"A" * 16_385: "x"}, "is no variable name"),
        ({5: "x"}, "5 is no variable name"),
        ({"A": None}, "the value of A must be a string, not NoneType"),
        ({"A": "v" * 32_769}, "the value of A must be at most 32,768 characters, without a zero byte"),
        ({"A": "a\0b"}, "the value of A must be at most 32,768 characters, without a zero byte"),
    ],
)
def test_what_cannot_be_a_variable_is_refused(env: dict[Any, Any], text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        check_env(env)
    assert text in str(caught.value)


def test_the_values_that_users_write_are_exported() -> None:
    assert (mesh.Retries, mesh.Cron, mesh.Period) == (Retries, Cron, Period)


def test_jitter_takes_nothing_below_the_shortest_delay() -> None:
    retries = Retries(max_retries=3, initial_delay=2.0, jitter=1.0)
    assert retries.delay(1, chance=0.25) == 1.5
    assert retries.delay(1, chance=1.0) == 1.0
