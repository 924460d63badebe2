"""What crosses the wire for a call. The literal headers and bytes here are the protocol: changing them breaks it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.exception import Error, FunctionTimeoutError, InvalidError, VersionError
from mesh.payload import Blob
from mesh.protocol import (
    Address,
    Failure,
    Format,
    Input,
    Result,
    State,
    call_time,
    escape,
    failure,
    format_time,
    is_call_id,
    new_call_id,
    new_client_token,
    parse_time,
    token_of,
    unescape,
)

CALL = "fc-01JXYZ0123ABCDEFGHT0KEN123"
ADDRESS = Address("shop", "resize", "_", CALL, 3)
NOON = 1_700_000_000.5

FULL_INPUT = Input(
    address=ADDRESS,
    body=b'{"args":[1],"kwargs":{}}',
    format=Format.JSON,
    kind="spawn",
    client="host/42",
    parent="fc-01JXYZ0123ABCDEFGHPARENT00.0",
    deadline=NOON,
    result_ttl=3600.0,
    keep_result=False,
    resubmit=True,
    retry_of="fc-01JXYZ0123ABCDEFGHF1RST000",
    preview='{"args":[1],"kwargs":{}}',
    blob=Blob("fc-01JXYZ0123ABCDEFGHT0KEN123.3.in.0a1b2c3d", 1048577, "ab" * 32),
)
FULL_INPUT_HEADERS = {
    "Mesh-Version": "1",
    "Mesh-Format": "json",
    "Mesh-Kind": "spawn",
    "Mesh-Client": "host/42",
    "Mesh-Parent": "fc-01JXYZ0123ABCDEFGHPARENT00.0",
    "Mesh-Retry-Of": "fc-01JXYZ0123ABCDEFGHF1RST000",
    "Mesh-Blob": f"fc-01JXYZ0123ABCDEFGHT0KEN123.3.in.0a1b2c3d 1048577 sha-256={'ab' * 32}",
    "Mesh-Preview": '{"args":[1],"kwargs":{}}',
    "Mesh-Deadline": "2023-11-14T22:13:20.500Z",
    "Mesh-Result-TTL": "3600",
    "Mesh-Keep-Result": "0",
    "Mesh-Resubmit": "1",
}

FULL_RESULT = Result(
    state=State.FAILED,
    body=b"\x80",
    format=Format.MSGPACK,
    error="ValueError: no",
    app="my.shop",
    function="Model.resize",
    code="0a1b2c",
    worker="w1",
    attempt=2,
    started=NOON,
    finished=NOON + 2,
    blob=Blob("fc-01JXYZ0123ABCDEFGHT0KEN123.3.out.0a1b2c3d", 3, "cd" * 32),
)
FULL_RESULT_HEADERS = {
    "Mesh-Version": "1",
    "Mesh-State": "failed",
    "Mesh-Format": "msgpack",
    "Mesh-Attempt": "2",
    "Mesh-Finished": "2023-11-14T22:13:22.500Z",
    "Mesh-Started": "2023-11-14T22:13:20.500Z",
    "Mesh-Function": "my=shop.Model=resize",
    "Mesh-Code": "0a1b2c",
    "Mesh-Worker": "w1",
    "Mesh-Blob": f"fc-01JXYZ0123ABCDEFGHT0KEN123.3.out.0a1b2c3d 3 sha-256={'cd' * 32}",
    "Mesh-Error": "ValueError: no",
}


# --- golden: inputs --------------------------------------------------------------------------------------------------


def test_the_headers_of_an_input_are_these() -> None:
    assert FULL_INPUT.headers() == FULL_INPUT_HEADERS


def test_the_headers_of_an_input_say_nothing_that_is_not_set() -> None:
    assert Input(address=ADDRESS, body=b"").headers() == {
        "Mesh-Version": "1",
        "Mesh-Format": "json",
        "Mesh-Kind": "nats",
    }


def test_an_input_is_read_from_these_headers() -> None:
    assert Input.decode(ADDRESS, FULL_INPUT_HEADERS, FULL_INPUT.body) == FULL_INPUT


def test_an_input_made_by_hand_needs_no_headers() -> None:
    assert Input.decode(ADDRESS, {}, b"{}") == Input(address=ADDRESS, body=b"{}", format=Format.JSON, kind="nats")


def test_unknown_headers_are_ignored() -> None:
    headers = {**FULL_INPUT_HEADERS, "Mesh-Colour": "blue", "traceparent": "00-1-2-3", "Nats-Msg-Id": "x"}
    assert Input.decode(ADDRESS, headers, FULL_INPUT.body) == FULL_INPUT


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "60"), (90.5, "90.5"), (604_800.0, "604800"), (604_799.0, "604799"), (None, None)]
)
def test_seconds_are_written_as_people_write_them(seconds: float | None, text: str | None) -> None:
    written = Input(address=ADDRESS, body=b"", result_ttl=seconds).headers()
    assert written.get("Mesh-Result-TTL") == text
    assert Input.decode(ADDRESS, written, b"").result_ttl == seconds


# --- golden: results -------------------------------------------------------------------------------------------------


def test_the_headers_of_a_result_are_these() -> None:
    assert FULL_RESULT.headers() == FULL_RESULT_HEADERS


def test_the_headers_of_a_result_say_nothing_that_is_not_set() -> None:
    assert Result(state=State.SUCCEEDED, finished=NOON).headers() == {
        "Mesh-Version": "1",
        "Mesh-State": "succeeded",
        "Mesh-Format": "json",
        "Mesh-Attempt": "1",
        "Mesh-Finished": "2023-11-14T22:13:20.500Z",
    }


def test_a_result_is_read_from_these_headers() -> None:
    assert Result.decode(FULL_RESULT_HEADERS, FULL_RESULT.body) == FULL_RESULT


def test_a_result_made_by_hand_is_a_success_in_json() -> None:
    expected = Result(state=State.SUCCEEDED, body=b"1", format=Format.JSON, finished=0.0)
    assert Result.decode({}, b"1") == expected


def test_a_result_is_finished_now_unless_it_says_when() -> None:
    before = time.time()
    assert before <= Result(state=State.SUCCEEDED).finished <= time.time()


@pytest.mark.parametrize(
    ("state", "text", "final"),
    [
        (State.QUEUED, "queued", False),
        (State.RUNNING, "running", False),
        (State.RETRYING, "retrying", False),
        (State.SUCCEEDED, "succeeded", True),
        (State.FAILED, "failed", True),
        (State.TIMED_OUT, "timed_out", True),
        (State.CANCELLED, "cancelled", True),
        (State.EXPIRED, "expired", True),
    ],
)
def test_the_states_of_a_call_are_these(state: State, text: str, final: bool) -> None:
    assert (state, state.final) == (text, final)
    assert len(State) == 8


def test_the_formats_are_these() -> None:
    assert [format.value for format in Format] == ["json", "msgpack", "pickle", "buffers"]


# --- golden: failures ------------------------------------------------------------------------------------------------

FULL_FAILURE = Failure(
    type="shop.SoldOut", text="no", traceback="tb", bases=("shop.SoldOut", "builtins.Exception"), pickle=b"\x80\x05"
)


def test_a_failure_is_these_bytes() -> None:
    assert FULL_FAILURE.encode() == (
        b"\x85"
        b"\xa4type\xacshop.SoldOut"
        b"\xa4text\xa2no"
        b"\xa9traceback\xa2tb"
        b"\xa5bases\x92\xacshop.SoldOut\xb2builtins.Exception"
        b"\xa6pickle\xc4\x02\x80\x05"
    )
    assert Failure.decode(FULL_FAILURE.encode()) == FULL_FAILURE


def test_a_failure_that_cannot_travel_has_no_pickle_at_all() -> None:
    bare = Failure(type="shop.SoldOut", text="no")
    assert msgpack.unpackb(bare.encode()) == {"type": "shop.SoldOut", "text": "no", "traceback": "", "bases": []}
    assert Failure.decode(bare.encode()) == bare


def test_a_failure_needs_no_more_than_type_and_text() -> None:
    written = msgpack.packb({"type": "T", "text": "t", "colour": "blue"})
    assert Failure.decode(written) == Failure(type="T", text="t")


@given(text=st.text(st.characters(exclude_categories=())), pickled=st.binary())
def test_a_failure_survives_the_wire_whatever_its_text(text: str, pickled: bytes) -> None:
    failed = Failure(type="T", text=text, traceback=text, bases=("T",), pickle=pickled)
    assert Failure.decode(failed.encode()) == failed


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b'{"type": "T"}', msgpack.packb([1, 2])])
def test_what_is_no_failure_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidError, match="the stored failure cannot be read"):
        Failure.decode(body)


def test_a_failure_is_summed_up_on_one_line() -> None:
    assert Failure(type="builtins.ValueError", text="no\n  such\tvalue").summary == "ValueError: no such value"
    assert Failure(type="shop.SoldOut", text="").summary == "shop.SoldOut:"


def test_a_failure_of_mesh_itself_names_its_class_and_all_its_bases() -> None:
    """`Retries(retry_on=…)` and `abort_on=` go by the bases, for mesh's own failures too."""
    own = failure(FunctionTimeoutError, "too long")
    assert (own.type, own.text, own.pickle) == ("mesh.exception.FunctionTimeoutError", "too long", b"")
    assert own.bases == (
        "mesh.exception.FunctionTimeoutError",
        "mesh.exception.TimeoutError",
        "mesh.exception.Error",
        "builtins.Exception",
        "builtins.BaseException",
    )


def test_the_result_of_a_failure_carries_it_and_its_summary() -> None:
    result = Result.of_failure(State.TIMED_OUT, FULL_FAILURE, app="shop", function="f", attempt=3)
    assert (result.state, result.format, result.error) == (State.TIMED_OUT, Format.MSGPACK, "shop.SoldOut: no")
    assert (result.app, result.function, result.attempt) == ("shop", "f", 3)
    assert Failure.decode(result.body) == FULL_FAILURE


# --- text in headers -------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=700)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nNats-Msg-Id: x", "a Nats-Msg-Id: x"),
        ("  a \t b\n", "a b"),
        ("a\0b\x1b[31m", "a�b�[31m"),
        ("\ud800", "�"),
        ("grüß 世界", "grüß 世界"),
        ("x" * 500, "x" * 500),
        ("x" * 501, "x" * 499 + "…"),
    ],
)
def test_an_error_is_one_printable_line_of_500_characters(text: str, shown: str) -> None:
    assert Result(state=State.FAILED, error=text).headers()["Mesh-Error"] == shown


@given(ANY_TEXT)
def test_nothing_in_an_error_can_forge_a_header(text: str) -> None:
    line = Result(state=State.FAILED, error=text).headers().get("Mesh-Error", "")
    assert line.isprintable()
    assert len(line) <= 500
    line.encode()


@pytest.mark.parametrize(("length", "shown"), [(120, "x" * 120), (121, "x" * 119 + "…")])
def test_a_preview_that_was_cut_says_so(length: int, shown: str) -> None:
    assert Input(address=ADDRESS, body=b"", preview="x" * length).headers()["Mesh-Preview"] == shown


@given(ANY_TEXT)
def test_a_preview_is_one_printable_line_of_120_characters(text: str) -> None:
    line = Input(address=ADDRESS, body=b"", preview=text).headers().get("Mesh-Preview", "")
    assert line.isprintable()
    assert len(line) <= 120


# --- what makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"Mesh-Version": "one"}, "Mesh-Version must be a number, not 'one'"),
        ({"Mesh-Version": ""}, "Mesh-Version must be a number, not ''"),
        ({"Mesh-Version": "²"}, "Mesh-Version must be a number, not '²'"),
        ({"Mesh-Version": "9" * 5000}, "Mesh-Version must be a number, not '9999"),
        ({"Mesh-Format": "xml"}, "Mesh-Format must be one of json, msgpack, pickle, buffers, not 'xml'"),
        ({"Mesh-Deadline": "tomorrow"}, "not an RFC 3339 time: 'tomorrow'"),
        ({"Mesh-Result-TTL": "1h"}, "Mesh-Result-TTL must be a number, not '1h'"),
        ({"Mesh-Result-TTL": "nan"}, "Mesh-Result-TTL must be a number, not 'nan'"),
        ({"Mesh-Result-TTL": "inf"}, "Mesh-Result-TTL must be a number, not 'inf'"),
    ],
)
def test_a_header_of_an_input_that_makes_no_sense_is_named(headers: Mapping[str, str], text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        Input.decode(ADDRESS, headers, b"")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"Mesh-State": "done"}, "Mesh-State must be one of queued, running, retrying, succeeded, failed, timed_out"),
        ({"Mesh-Attempt": "first"}, "Mesh-Attempt must be a number, not 'first'"),
        ({"Mesh-Attempt": "inf"}, "Mesh-Attempt must be a number, not 'inf'"),
        ({"Mesh-Attempt": "nan"}, "Mesh-Attempt must be a number, not 'nan'"),
        ({"Mesh-Finished": "now"}, "not an RFC 3339 time: 'now'"),
    ],
)
def test_a_header_of_a_result_that_makes_no_sense_is_named(headers: Mapping[str, str], text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        Result.decode(headers, b"")
    assert text in str(caught.value)


@pytest.mark.parametrize("version", ["1", "1.7"])
def test_a_minor_version_makes_no_difference(version: str) -> None:
    assert Input.decode(ADDRESS, {"Mesh-Version": version}, b"").address == ADDRESS
    assert Result.decode({"Mesh-Version": version}, b"").state is State.SUCCEEDED


def test_another_major_version_is_refused_with_both_sides_and_which_to_upgrade() -> None:
    with pytest.raises(VersionError, match=r"speaks version 2 .*, this mesh speaks version 1: .* the older side"):
        Input.decode(ADDRESS, {"Mesh-Version": "2"}, b"")
    with pytest.raises(VersionError, match=r"speaks version 0 .*, this mesh speaks version 1: .* the sender"):
        Result.decode({"Mesh-Version": "0.9"}, b"")


def _decodes_or_refuses(decode: Any) -> None:
    try:
        decode()
    except Error:
        pass


ANY_HEADERS = st.dictionaries(
    st.sampled_from(sorted({*FULL_INPUT_HEADERS, *FULL_RESULT_HEADERS})),
    st.text() | st.sampled_from(["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "24:00", "1e400", "-0"]),
)


@given(ANY_HEADERS)
def test_whatever_the_headers_hold_a_message_is_read_or_refused(headers: dict[str, str]) -> None:
    """Any other exception would end the worker's loop, or leave a caller waiting."""
    _decodes_or_refuses(lambda: Input.decode(ADDRESS, headers, b""))
    _decodes_or_refuses(lambda: Result.decode(headers, b""))


# --- round trips -----------------------------------------------------------------------------------------------------

BLOBS = st.builds(
    Blob,
    name=st.from_regex(r"fc-[0-9A-Z]{26}\.[0-9]\.in\.[0-9a-f]{8}", fullmatch=True),
    size=st.integers(0, 10**15),
    digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
TOKENS = st.text("abcXYZ019-_./", max_size=20)
TIMES = st.integers(1, 4_000_000_000_000).map(lambda milliseconds: milliseconds / 1000)
NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)

INPUTS = st.builds(
    Input,
    address=st.just(ADDRESS),
    body=st.binary(),
    format=st.sampled_from(Format),
    kind=st.sampled_from(["spawn", "remote", "map", "schedule", "nats"]),
    client=TOKENS,
    parent=TOKENS,
    deadline=st.none() | TIMES,
    result_ttl=st.none() | st.integers(60, 604_800).map(float),
    keep_result=st.booleans(),
    resubmit=st.booleans(),
    retry_of=TOKENS,
    preview=TOKENS,
    blob=st.none() | BLOBS,
)
RESULTS = st.builds(
    Result,
    state=st.sampled_from(State),
    body=st.binary(),
    format=st.sampled_from(Format),
    error=TOKENS,
    app=NAMES,
    function=NAMES,
    code=TOKENS,
    worker=TOKENS,
    attempt=st.integers(1, 10**6),
    started=TIMES,
    finished=TIMES,
    blob=st.none() | BLOBS,
)


@given(INPUTS)
def test_an_input_survives_the_wire(input: Input) -> None:
    assert Input.decode(input.address, input.headers(), input.body) == input


@given(RESULTS)
def test_a_result_survives_the_wire(result: Result) -> None:
    assert Result.decode(result.headers(), result.body) == result


def test_an_app_and_a_function_with_dots_in_their_names_are_told_apart() -> None:
    one = Result(state=State.SUCCEEDED, app="a.b", function="c").headers()
    other = Result(state=State.SUCCEEDED, app="a", function="b.c").headers()
    assert one["Mesh-Function"] != other["Mesh-Function"]


def test_what_crosses_the_wire_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL_INPUT.body = b""  # type: ignore[misc]


# --- ids -------------------------------------------------------------------------------------------------------------


def test_a_call_id_is_fc_and_26_characters_that_end_with_the_clients_token() -> None:
    token = new_client_token()
    call = new_call_id(token)
    assert len(token) == 8
    assert len(call) == 29
    assert is_call_id(call)
    assert token_of(call) == token


def test_call_ids_are_all_different() -> None:
    assert len({new_call_id("T0KEN123") for _ in range(1000)}) == 1000
    assert len({new_client_token() for _ in range(1000)}) == 1000


def test_a_call_id_tells_when_it_was_made() -> None:
    before = time.time()
    assert before - 0.001 <= call_time(new_call_id("T0KEN123")) <= time.time()
    assert call_time("fc-01HF7YAT00" + 16 * "0") == 1_700_000_000.0


def test_call_ids_sort_by_the_time_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([NOON, NOON + 0.001, NOON + 40, NOON + 10**9])
    monkeypatch.setattr(time, "time", lambda: next(moments))
    calls = [new_call_id("T0KEN123") for _ in range(4)]
    assert calls == sorted(calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        "fc-",
        CALL[:-1],
        CALL + "0",
        CALL.lower(),
        CALL.replace("fc-", "fu-"),
        "fc-" + "I" * 26,  # I, L, O and U are no Crockford characters
        "fc-" + "U" * 26,
        "fc-" + "*" * 26,
        "fc-*" + CALL[4:],
        CALL[:-1] + "\n",
    ],
)
def test_nothing_else_is_a_call_id(text: str) -> None:
    assert is_call_id(CALL)
    assert not is_call_id(text)


def test_an_inputs_id_is_its_calls_with_its_number() -> None:
    assert ADDRESS.key == f"{CALL}.3"
    assert ADDRESS.path == "shop.resize"
    assert Address("a", "f", "_", CALL).index == 0


@given(NAMES)
def test_every_name_is_one_token_on_the_wire_and_comes_back(name: str) -> None:
    token = escape(name)
    assert "." not in token
    assert unescape(token) == name


@given(NAMES, NAMES)
def test_two_names_are_never_one_token(one: str, other: str) -> None:
    assert (escape(one) == escape(other)) == (one == other)


# --- times -----------------------------------------------------------------------------------------------------------


def test_a_time_is_rfc_3339_in_utc_to_the_millisecond() -> None:
    assert format_time(0) == "1970-01-01T00:00:00.000Z"
    assert format_time(NOON) == "2023-11-14T22:13:20.500Z"
    assert format_time(1.001) == "1970-01-01T00:00:01.001Z"  # 1.001 * 1000 is a little less than 1001


@pytest.mark.parametrize(
    "text",
    [
        "2023-11-14T22:13:20.500Z",
        "2023-11-14T22:13:20.5Z",
        "2023-11-14T23:13:20.500000+01:00",
        "2023-11-14 22:13:20.500",
    ],
)
def test_a_time_is_read_as_people_write_it(text: str) -> None:
    assert parse_time(text) == NOON


@given(TIMES)
def test_a_time_survives_being_written_to_the_millisecond(moment: float) -> None:
    assert parse_time(format_time(moment)) == pytest.approx(moment, abs=0.001)
