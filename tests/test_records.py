"""What the mesh writes down. The literal JSON here is what lies in people's buckets: to change it is a migration."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.exception import Error, InvalidError, VersionError
from mesh.records import (
    AppHead,
    AppState,
    Attempt,
    AttemptLog,
    Code,
    Ending,
    FunctionRecord,
    Removal,
    WorkerRecord,
    verify,
)
from mesh.spec import FunctionSpec, Retries

FUNCTION = FunctionRecord(
    app="shop",
    spec=FunctionSpec(name="resize", timeout=20, retries=Retries(max_retries=2)),
    code=Code(module="shop.images", entry="shop.main", app="shop", name="resize"),
    version="0a1b",
    bundle="2c3d",
    modules=("shop",),
    packages={"pillow": "11.0"},
    deployed_at=1_700_000_000.5,
    deployed_by="ann@laptop",
    removed=Removal(at=1_700_000_001.0, reason="app 'shop' was stopped"),
)
FUNCTION_JSON: dict[str, Any] = {
    "v": 1,
    "app": "shop",
    "spec": {
        "name": "resize",
        "timeout": 20,
        "retries": {
            "abort_on": [],
            "backoff_coefficient": 2.0,
            "initial_delay": 1.0,
            "jitter": 0.0,
            "max_delay": 60.0,
            "max_retries": 2,
            "min_delay": 1.0,
            "retry_on": [],
        },
    },
    "code": {"module": "shop.images", "entry": "shop.main", "app": "shop", "name": "resize"},
    "version": "0a1b",
    "bundle": "2c3d",
    "modules": ["shop"],
    "packages": {"pillow": "11.0"},
    "deployed_at": 1_700_000_000.5,
    "deployed_by": "ann@laptop",
    "signer": "",
    "signature": "",
    "removed": {"at": 1_700_000_001.0, "reason": "app 'shop' was stopped"},
}

HEAD = AppHead(
    app="ap-00ff",
    name="shop",
    version=3,
    state=AppState.EPHEMERAL,
    functions={"resize": "0a1b"},
    bundle="2c3d",
    tag="beta",
    deployed_at=1_700_000_000.5,
    deployed_by="ann@laptop",
    commit="deadbeef*",
    mesh_version="0.1.0",
)
HEAD_JSON: dict[str, Any] = {
    "v": 1,
    "app": "ap-00ff",
    "name": "shop",
    "version": 3,
    "state": "ephemeral",
    "functions": {"resize": "0a1b"},
    "bundle": "2c3d",
    "tag": "beta",
    "deployed_at": 1_700_000_000.5,
    "deployed_by": "ann@laptop",
    "commit": "deadbeef*",
    "mesh_version": "0.1.0",
}

LOG = AttemptLog(
    attempts={
        1: Attempt(ending=Ending.FAILED, worker="w1", at=1_700_000_000.5, error="ValueError: no"),
        3: Attempt(ending=Ending.BEGAN, worker="w2", at=1_700_000_001.5),
    },
    folded=0,
    folded_tries=0,
)
LOG_JSON: dict[str, Any] = {
    "v": 1,
    "attempts": {
        "1": {"ending": "failed", "worker": "w1", "at": 1_700_000_000.5, "error": "ValueError: no"},
        "3": {"ending": "began", "worker": "w2", "at": 1_700_000_001.5, "error": ""},
    },
    "folded": 0,
    "folded_tries": 0,
}

WORKER = WorkerRecord(
    worker="w1",
    host="laptop",
    pid=42,
    python="3.11",
    mesh_version="0.1.0",
    started=1_700_000_000.5,
    containers=8,
    used=2,
    draining=True,
    running=("fc-01JXYZ0123ABCDEFGHT0KEN123.0",),
    functions={"shop.resize": 2},
    unfit={"shop.big": "it needs 64 cores"},
    trouble="the store is full",
    cpus=4.0,
    used_cpus=1.5,
    memory=8192,
    used_memory=512,
    labels={"gpu": "l4"},
    inputs={"shop.resize": 1},
    headroom={"shop.resize": 1},
    in_use=("shop.resize",),
    pythons=("3.11", "3.12"),
    at=1_700_000_001.5,
)
WORKER_JSON: dict[str, Any] = {
    "v": 1,
    "worker": "w1",
    "host": "laptop",
    "pid": 42,
    "python": "3.11",
    "mesh_version": "0.1.0",
    "started": 1_700_000_000.5,
    "containers": 8,
    "used": 2,
    "draining": True,
    "running": ["fc-01JXYZ0123ABCDEFGHT0KEN123.0"],
    "functions": {"shop.resize": 2},
    "unfit": {"shop.big": "it needs 64 cores"},
    "trouble": "the store is full",
    "cpus": 4.0,
    "used_cpus": 1.5,
    "memory": 8192,
    "used_memory": 512,
    "labels": {"gpu": "l4"},
    "inputs": {"shop.resize": 1},
    "headroom": {"shop.resize": 1},
    "in_use": ["shop.resize"],
    "pythons": ["3.11", "3.12"],
    "at": 1_700_000_001.5,
}

Record = FunctionRecord | AppHead | AttemptLog | WorkerRecord
RECORDS: list[tuple[Record, dict[str, Any]]] = [
    (FUNCTION, FUNCTION_JSON),
    (HEAD, HEAD_JSON),
    (LOG, LOG_JSON),
    (WORKER, WORKER_JSON),
]
each_record = pytest.mark.parametrize(("record", "written"), RECORDS, ids=[type(r).__name__ for r, _ in RECORDS])


# --- golden ----------------------------------------------------------------------------------------------------------


@each_record
def test_a_record_is_this_json(record: Record, written: dict[str, Any]) -> None:
    assert json.loads(record.encode()) == written


@each_record
def test_a_record_is_compact_and_says_its_version_first(record: Record, written: dict[str, Any]) -> None:
    assert record.encode().startswith(b'{"v":1,"')


@each_record
def test_a_record_is_read_from_this_json(record: Record, written: dict[str, Any]) -> None:
    assert type(record).decode(json.dumps(written).encode()) == record


@each_record
def test_fields_of_newer_versions_are_ignored(record: Record, written: dict[str, Any]) -> None:
    assert type(record).decode(json.dumps({**written, "colour": "blue"}).encode()) == record


@each_record
def test_a_record_of_another_version_is_refused_with_both(record: Record, written: dict[str, Any]) -> None:
    with pytest.raises(VersionError, match="has version 2, this mesh knows 1: upgrade the older side"):
        type(record).decode(json.dumps({**written, "v": 2}).encode())


@each_record
@pytest.mark.parametrize("data", [b"", b"junk", b"[]", b"7", b"null", b"{}", b'{"v":"one"}', b"\xff"])
def test_what_is_no_record_is_refused_as_unreadable(record: Record, written: dict[str, Any], data: bytes) -> None:
    with pytest.raises(InvalidError, match="cannot be read"):
        type(record).decode(data)


@pytest.mark.parametrize(
    ("decode", "written"),
    [
        (FunctionRecord.decode, {**FUNCTION_JSON, "spec": {"name": "f", "timeout": -1}}),
        (FunctionRecord.decode, {**FUNCTION_JSON, "spec": {"timeout": 5}}),
        (FunctionRecord.decode, {**FUNCTION_JSON, "code": {"pickled": "no base64"}}),
        (FunctionRecord.decode, {**FUNCTION_JSON, "removed": {"why": 1}}),
        (AppHead.decode, {**HEAD_JSON, "state": "sleeping"}),
        (AttemptLog.decode, {"attempts": {"first": {"ending": "failed"}}}),
        (AttemptLog.decode, {"attempts": {"1": {"ending": "vanished"}}}),
        (AttemptLog.decode, {"attempts": {"1": {}}}),
    ],
)
def test_a_record_with_a_value_that_makes_no_sense_is_refused(
    decode: Callable[[bytes], Record], written: dict[str, Any]
) -> None:
    """As mesh's own error, which whoever reads many records can skip."""
    with pytest.raises(Error):
        decode(json.dumps(written).encode())


# --- functions -------------------------------------------------------------------------------------------------------


def test_a_live_function_says_nothing_of_a_removal() -> None:
    live = dataclasses.replace(FUNCTION, removed=None)
    assert "removed" not in json.loads(live.encode())
    assert FunctionRecord.decode(live.encode()) == live


def test_code_by_reference_is_a_module_and_a_name() -> None:
    code = Code(module="shop", entry="shop", app=None, name="resize")
    assert not code.by_value
    assert code.to_json() == {"module": "shop", "entry": "shop", "name": "resize"}
    assert Code.from_json(code.to_json()) == code


def test_code_by_value_is_a_pickle_for_one_python() -> None:
    code = Code(name="resize", pickled=b"\x80\x05\xff", python="3.11")
    assert code.by_value
    assert code.to_json() == {"name": "resize", "pickled": "gAX/", "python": "3.11"}
    assert Code.from_json(json.loads(json.dumps(code.to_json()))) == code


def test_large_code_by_value_is_a_digest() -> None:
    code = Code(name="resize", digest="ab12", python="3.11")
    assert code.by_value
    assert Code.from_json(code.to_json()) == code


def test_code_of_a_newer_mesh_is_read_as_far_as_it_is_known() -> None:
    assert Code.from_json({"module": "shop", "language": "rust"}) == Code(module="shop")


def test_verification_is_the_way_to_code_and_lets_everything_pass_for_now() -> None:
    assert verify(FUNCTION) is FUNCTION


def test_a_worker_record_is_of_now_unless_it_says_when() -> None:
    before = time.time()
    fresh = WorkerRecord(worker="w", host="h", pid=1, python="3.11", mesh_version="0", started=before, containers=1)
    assert before <= fresh.at <= time.time()


# --- attempts --------------------------------------------------------------------------------------------------------

FAILED = Attempt(ending=Ending.FAILED, worker="w1", error="ValueError: no")
TIMED_OUT = Attempt(ending=Ending.TIMED_OUT, worker="w1", error="too long")
CRASHED = Attempt(ending=Ending.CRASHED, worker="w1", error="SIGSEGV on w1")
OUT_OF_MEMORY = Attempt(ending=Ending.OUT_OF_MEMORY, worker="w1", error="out of memory on w1")
BEGAN = Attempt(ending=Ending.BEGAN, worker="w2")
RETURNED = Attempt(ending=Ending.RETURNED, worker="w1")
ADOPTED = Attempt(ending=Ending.ADOPTED, worker="w1")
NOT_STARTED = Attempt(ending=Ending.NOT_STARTED, worker="w1", error="no memory")
KEPT = 50


def log_of(*attempts: Attempt | None) -> AttemptLog:
    """The log of deliveries 1, 2, …; `None` for one that left no trace."""
    log = AttemptLog()
    for delivery, attempt in enumerate(attempts, 1):
        log = log if attempt is None else log.with_attempt(delivery, attempt)
    return log


def test_a_happy_call_has_an_empty_log() -> None:
    empty = AttemptLog()
    assert (empty.tries, empty.crashes(1), empty.last_error) == (0, [], "")


@pytest.mark.parametrize(
    ("attempt", "tries"),
    [
        (FAILED, 1),
        (TIMED_OUT, 1),
        (CRASHED, 0),
        (OUT_OF_MEMORY, 0),
        (BEGAN, 0),
        (RETURNED, 0),
        (ADOPTED, 0),
        (NOT_STARTED, 0),
    ],
    ids=lambda value: getattr(value, "ending", None),
)
def test_only_what_the_users_code_did_wrong_counts_as_a_try(attempt: Attempt, tries: int) -> None:
    assert log_of(attempt).tries == tries


def test_every_ending_is_in_the_table_above() -> None:
    listed = (FAILED, TIMED_OUT, CRASHED, OUT_OF_MEMORY, BEGAN, RETURNED, ADOPTED, NOT_STARTED)
    assert {a.ending for a in listed} == set(Ending)


def test_a_delivery_counts_once_whoever_reports_it_again() -> None:
    log = log_of(FAILED)
    assert log.with_attempt(1, FAILED) is log
    assert log.with_attempt(1, CRASHED) is log  # what it ended as stays
    assert log.tries == 1


def test_only_having_begun_makes_way_for_how_it_ended() -> None:
    log = log_of(None, BEGAN).with_attempt(2, FAILED)
    assert log.attempts == {2: FAILED}
    assert log.with_attempt(2, BEGAN) is log


def test_an_input_that_its_worker_goes_on_with_under_a_new_delivery_was_not_lost() -> None:
    adopted = log_of(ADOPTED, BEGAN)
    assert (adopted.tries, adopted.crashes(2)) == (0, [])
    failed = adopted.with_attempt(2, FAILED)
    assert (failed.tries, failed.crashes(3)) == (1, [])
    assert [crash.error for crash in adopted.crashes(3)] == ["worker w2 lost"]


@pytest.mark.parametrize(
    ("endings", "delivery", "number"),
    [
        ({}, 1, 1),
        ({}, 3, 3),
        ({1: Ending.FAILED}, 2, 2),
        ({2: Ending.BEGAN}, 2, 2),  # its mark makes way for how it ends
        ({1: Ending.FAILED}, 1, 2),  # a server that was killed counts anew
        ({1: Ending.FAILED, 2: Ending.BEGAN}, 1, 3),
        ({1: Ending.FAILED, 2: Ending.RETURNED, 3: Ending.CRASHED}, 2, 4),
    ],
)
def test_no_two_deliveries_are_written_down_as_one(endings: dict[int, Ending], delivery: int, number: int) -> None:
    log = AttemptLog(attempts={n: Attempt(ending=ending) for n, ending in endings.items()})
    assert log.number(delivery) == number


def test_what_is_folded_is_no_number_of_a_new_delivery() -> None:
    log = AttemptLog(attempts={60: Attempt(ending=Ending.FAILED)}, folded=10, folded_tries=10)
    assert (log.number(3), log.number(61)) == (61, 61)
    assert AttemptLog(folded=10).number(3) == 11


def test_a_log_is_never_changed_in_place() -> None:
    log = log_of(FAILED)
    log.with_attempt(2, FAILED)
    assert log == log_of(FAILED)


@pytest.mark.parametrize(
    ("log", "delivery", "crashes"),
    [
        (log_of(), 1, []),
        (log_of(), 2, ["worker lost"]),  # the first delivery leaves no trace if its worker dies
        (log_of(), 9, ["worker lost"]),  # of the others we know that the input had not begun
        (log_of(CRASHED), 2, ["SIGSEGV on w1"]),
        (log_of(CRASHED, CRASHED), 3, ["SIGSEGV on w1", "SIGSEGV on w1"]),
        (log_of(FAILED), 2, []),
        (log_of(RETURNED), 2, []),
        (log_of(ADOPTED), 2, []),
        (log_of(NOT_STARTED), 2, []),
        (log_of(RETURNED, BEGAN), 2, []),  # it runs
        (log_of(RETURNED, BEGAN), 3, ["worker w2 lost"]),
        (log_of(None, BEGAN), 3, ["worker lost", "worker w2 lost"]),
        (log_of(None, CRASHED, BEGAN), 4, ["worker lost", "SIGSEGV on w1", "worker w2 lost"]),
        (log_of(OUT_OF_MEMORY, NOT_STARTED, CRASHED), 4, ["out of memory on w1", "SIGSEGV on w1"]),
        (log_of(FAILED, None, None), 4, []),
    ],
)
def test_crashes_are_told_in_the_order_they_happened(log: AttemptLog, delivery: int, crashes: list[str]) -> None:
    assert [crash.error for crash in log.crashes(delivery)] == crashes


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (log_of(FAILED), "ValueError: no"),
        (log_of(FAILED, CRASHED), "SIGSEGV on w1"),
        (log_of(FAILED, RETURNED, BEGAN), "ValueError: no"),
        (log_of(RETURNED), ""),
    ],
)
def test_the_last_error_is_the_newest_there_is(log: AttemptLog, error: str) -> None:
    assert log.last_error == error


def test_a_log_of_days_of_retries_stays_small() -> None:
    log = log_of(*[FAILED] * 1000)
    assert log.tries == 1000
    assert sorted(log.attempts) == list(range(951, 1001))
    assert len(log.encode()) < 10_000


def test_what_was_folded_counts_nothing_a_second_time() -> None:
    log = log_of(*[FAILED] * 60)
    assert log.folded == 10
    assert log.with_attempt(3, FAILED) is log.with_attempt(10, FAILED) is log
    assert log.tries == 60
    assert log.crashes(61) == []


def test_a_lost_worker_counts_however_many_retries_came_after() -> None:
    log = log_of(FAILED, CRASHED, BEGAN, OUT_OF_MEMORY, *[FAILED] * 200)
    assert [c.error for c in log.crashes(205)] == ["SIGSEGV on w1", "worker w2 lost", "out of memory on w1"]
    assert log.tries == 201


ATTEMPTS = st.builds(
    Attempt,
    ending=st.sampled_from(Ending),
    worker=st.sampled_from(["w1", "w2"]),
    at=st.floats(0, 2e9),
    error=st.text(max_size=20),
)
HISTORIES = st.lists(st.tuples(st.integers(1, 200), ATTEMPTS), max_size=150)


def replay(history: list[tuple[int, Attempt]]) -> AttemptLog:
    log = AttemptLog()
    for delivery, attempt in history:
        log = log.with_attempt(delivery, attempt)
    return log


@given(HISTORIES)
def test_a_log_survives_being_written_down(history: list[tuple[int, Attempt]]) -> None:
    log = replay(history)
    assert AttemptLog.decode(log.encode()) == log


@given(HISTORIES)
def test_tries_and_crashes_are_never_forgotten(history: list[tuple[int, Attempt]]) -> None:
    log = AttemptLog()
    for delivery, attempt in history:
        longer = log.with_attempt(delivery, attempt)
        assert log.tries <= longer.tries <= log.tries + 1
        assert len(log.crashes(1)) <= len(longer.crashes(1)) <= len(log.crashes(1)) + 1
        log = longer


@given(st.lists(ATTEMPTS, max_size=150))
def test_tries_are_the_failures_and_timeouts_of_all_deliveries(attempts: list[Attempt]) -> None:
    expected = sum(a.ending in (Ending.FAILED, Ending.TIMED_OUT) for a in attempts)
    assert log_of(*attempts).tries == expected


@given(st.lists(st.sampled_from([FAILED, TIMED_OUT, RETURNED]), max_size=150))
def test_without_crashes_a_log_keeps_the_newest_fifty_deliveries(attempts: list[Attempt]) -> None:
    log = log_of(*attempts)
    newest = range(1, len(attempts) + 1)[-KEPT:]
    assert log.attempts == {n: attempts[n - 1] for n in newest}
