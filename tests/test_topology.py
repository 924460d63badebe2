"""JetStream as data: names, subjects, and the settings the promises hang on, literally."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mesh.exception import InvalidError
from mesh.protocol import SHARED_POOL, Address, PoolKey
from mesh.topology import Config, Limits, MiB, Topology, differences

SECOND = 1_000_000_000
CALL = "fc-01JXYZ0123ABCDEFGHT0KEN123"
MAIN, STAGING = Topology(), Topology("staging")
ADDRESS = Address("my.shop", "Model.ask", SHARED_POOL, CALL, 7)

NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
ENVIRONMENTS = st.from_regex(r"[a-z0-9-]{1,32}", fullmatch=True).map(Topology)
POOLS = st.just(SHARED_POOL) | st.from_regex(r"[0-9a-f]{10}", fullmatch=True)


def matches(filter: str, subject: str) -> bool:
    """Whether NATS delivers `subject` to a subscription of `filter`."""
    pattern = re.escape(filter).replace(r"\*", "[^.]+").replace(">", ".+")
    return re.fullmatch(pattern, subject) is not None


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_environment_main_has_the_short_names() -> None:
    assert (MAIN.root, MAIN.calls, MAIN.dead, MAIN.logs) == ("mesh", "MESH_CALLS", "MESH_DEAD", "MESH_LOGS")
    assert (MAIN.bucket("results"), MAIN.bucket_stream("results")) == ("mesh_results", "KV_mesh_results")
    assert MAIN.key_subject("results", f"{CALL}.0") == f"$KV.mesh_results.{CALL}.0"


def test_another_environment_has_its_name_in_all_of_its_names() -> None:
    assert (STAGING.root, STAGING.calls) == ("mesh-staging", "MESH-STAGING_CALLS")
    assert (STAGING.bucket("results"), STAGING.bucket_stream("results")) == (
        "mesh-staging_results",
        "KV_mesh-staging_results",
    )
    assert STAGING.call_subject(ADDRESS) == f"mesh-staging.call.my=shop.Model=ask._.{CALL}.7"


@pytest.mark.parametrize("name", ["", "Main", "a.b", "a_b", "a*", "a" * 33])
def test_a_name_that_is_none_of_an_environment_is_refused(name: str) -> None:
    with pytest.raises(InvalidError, match="environment name"):
        Topology(name)


@given(ENVIRONMENTS, ENVIRONMENTS)
def test_two_environments_share_no_stream_and_no_subject(one: Topology, other: Topology) -> None:
    assume(one != other)
    ours, theirs = list(one.streams(Limits())), list(other.streams(Limits()))
    assert not {config["name"] for config in ours} & {config["name"] for config in theirs}
    assert not {s for config in ours for s in config["subjects"]} & {s for config in theirs for s in config["subjects"]}


# --- subjects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (MAIN.call_subject(ADDRESS), f"mesh.call.my=shop.Model=ask._.{CALL}.7"),
        (MAIN.dead_subject(ADDRESS), f"mesh.dead.my=shop.Model=ask.{CALL}.7"),
        (MAIN.done_subject(CALL, "7"), "mesh.done.fc-01JXYZ0123ABCDEFGH.T0KEN123.7"),
        (MAIN.done_subject(CALL), "mesh.done.fc-01JXYZ0123ABCDEFGH.T0KEN123.*"),
        (MAIN.done_filter("T0KEN123"), "mesh.done.*.T0KEN123.*"),
        (MAIN.cancel_subject(CALL, "7"), f"mesh.cancel.{CALL}.7"),
        (MAIN.cancel_subject(), "mesh.cancel.*.*"),
        (MAIN.deployed_subject("my.shop"), "mesh.deployed.my=shop"),
        (MAIN.deployed_subject(), "mesh.deployed.*"),
        (MAIN.log_subject("my.shop", "f", CALL, 7), f"mesh.log.my=shop.f.{CALL}.7"),
        (MAIN.log_subject("my.shop", "f", "_", "c1"), "mesh.log.my=shop.f._.c1"),
        (MAIN.log_filter(app="my.shop"), "mesh.log.my=shop.*.*.*"),
        (MAIN.log_filter(app="my.shop", call=CALL), f"mesh.log.my=shop.*.{CALL}.*"),
        (MAIN.call_filter(), "mesh.call.*.*.*.*.*"),
        (MAIN.call_filter(call=CALL), f"mesh.call.*.*.*.{CALL}.*"),
        (MAIN.call_filter(app="my.shop", function="Model.ask"), "mesh.call.my=shop.Model=ask.*.*.*"),
        (MAIN.function_key("my.shop", "Model.ask"), "my=shop.Model=ask"),
        (MAIN.head_key("my.shop"), "my=shop"),
        (MAIN.quarantine_subject("mesh.call.a.f._.junk.0"), "mesh.dead._malformed.a.f._.junk.0"),
    ],
)
def test_the_subjects_of_the_mesh_are_these(subject: str, expected: str) -> None:
    assert subject == expected


@given(NAMES, NAMES, POOLS, st.integers(0, 10**7), ENVIRONMENTS)
def test_the_subject_of_an_input_says_all_of_its_address(
    app: str, function: str, pool: str, index: int, topology: Topology
) -> None:
    address = Address(app, function, pool, CALL, index)
    subject = topology.call_subject(address)
    assert topology.parse_call(subject) == address
    assert matches(topology.call_filter(), subject)
    assert matches(topology.call_filter(call=CALL), subject)


@pytest.mark.parametrize(
    "subject",
    [
        "mesh.call.a.f._.junk.0",
        f"mesh.call.a.f._.{CALL}",
        f"mesh.call.a.f._.{CALL}.0.0",
        f"mesh.call.a.f._.{CALL}.-1",
        f"mesh.call.a.f._.{CALL}.01",
        f"mesh.call.a.f._.{CALL}.one",
        f"mesh.call.a.f._.{CALL}.²",
        f"mesh.call.a.f._.{CALL}.٣",
        f"mesh.call.a.f._.{CALL}.{'9' * 5000}",
        f"mesh.call.a.f._.{CALL.lower()}.0",
        f"mesh.call.ä.f._.{CALL}.0",
        f"mesh.call.a.{'f' * 65}._.{CALL}.0",
        f"mesh-staging.call.a.f._.{CALL}.0",
        "",
    ],
)
def test_what_is_not_the_subject_of_an_input_is_refused(subject: str) -> None:
    """As InvalidError: any other exception would end the worker's loop instead of putting the message aside."""
    with pytest.raises(InvalidError):
        MAIN.parse_call(subject)


@given(st.text())
def test_whatever_somebody_publishes_is_read_or_refused(tail: str) -> None:
    with pytest.raises(InvalidError):
        MAIN.parse_call(f"mesh.call.{tail}")


# --- consumers -------------------------------------------------------------------------------------------------------


KEYS = st.builds(PoolKey, NAMES, NAMES.filter(lambda name: "." not in name), POOLS)


@given(KEYS, KEYS)
def test_no_two_pools_share_a_consumer(one: PoolKey, other: PoolKey) -> None:
    assert (MAIN.consumer(one) == MAIN.consumer(other)) == (one == other)
    assert MAIN.parse_consumer(MAIN.consumer(one)) == one


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a", "b.c"), ("a.b", "c")), (("a-b", "c"), ("a", "b-c")), (("a_", "b"), ("a", "_b")), (("A", "f"), ("a", "f"))],
)
def test_names_that_look_alike_have_consumers_of_their_own(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert MAIN.consumer(PoolKey(*one)) != MAIN.consumer(PoolKey(*other))


@given(KEYS)
def test_the_name_of_a_consumer_is_one_the_server_takes(pool: PoolKey) -> None:
    assert re.fullmatch(r"[^\s.*>/\\]{1,255}", MAIN.consumer(pool))


def test_a_consumer_is_configured_so() -> None:
    assert MAIN.consumer_config(PoolKey("my.shop", "price"), ack_wait=15.0) == {
        "durable_name": "my=shop+price+_",
        "filter_subject": "mesh.call.my=shop.price._.*.*",
        "ack_policy": "explicit",
        "ack_wait": 15 * SECOND,
        "deliver_policy": "all",
        "max_deliver": -1,
        "max_ack_pending": 1_000_000,
        "max_waiting": 4096,
        "num_replicas": 1,
        "metadata": {"mesh.app": "my.shop", "mesh.function": "price", "mesh.pool": "_"},
    }


def test_a_class_has_one_consumer_for_all_its_methods() -> None:
    config = MAIN.consumer_config(PoolKey("my.shop", "Model", "0123456789"), ack_wait=15.0, methods=["tell", "ask"])
    assert config["durable_name"] == "my=shop+Model+0123456789"
    assert "filter_subject" not in config
    filters = ["mesh.call.my=shop.Model=ask.0123456789.*.*", "mesh.call.my=shop.Model=tell.0123456789.*.*"]
    assert config["filter_subjects"] == filters
    assert MAIN.methods_in(filters) == {"ask", "tell"}


@given(KEYS, KEYS, st.booleans())
def test_an_input_reaches_the_consumer_of_its_pool_and_no_other(ours: PoolKey, theirs: PoolKey, is_class: bool) -> None:
    called = f"{ours.function}.ask" if is_class else ours.function
    assume(len(called) <= 64)
    address = Address(ours.app, called, ours.pool, CALL, 0)
    assert address.pool_key == ours
    methods = ["ask", "tell"] if is_class else []
    for pool in (ours, theirs):
        filters = MAIN.filters(pool, methods)
        assert any(matches(filter, MAIN.call_subject(address)) for filter in filters) == (ours == pool)


# --- streams ---------------------------------------------------------------------------------------------------------


def config_of(name: str, **limits: Any) -> Config:
    (found,) = [config for config in MAIN.streams(Limits(**limits)) if config["name"] == name]
    return found


STREAMS = [
    "MESH_CALLS",
    "KV_mesh_results",
    "OBJ_mesh_blobs",
    "MESH_DEAD",
    "MESH_LOGS",
    "KV_mesh_functions",
    "KV_mesh_pools",
    "KV_mesh_code",
    "OBJ_mesh_code",
    "KV_mesh_calls",
    "KV_mesh_attempts",
    "KV_mesh_workers",
    "KV_mesh_slots",
    "KV_mesh_apps",
    "KV_mesh_clients",
    "KV_mesh_secrets",
    "KV_mesh_meta",
]


def test_an_environment_is_these_streams() -> None:
    assert [config["name"] for config in MAIN.streams(Limits())] == STREAMS


def test_no_message_is_stored_in_two_streams() -> None:
    patterns = [(config["name"], s) for config in MAIN.streams(Limits()) for s in config["subjects"]]
    for (one, pattern), (other, subject) in combinations(patterns, 2):
        example = subject.replace("*", "x").replace(">", "x")
        assert not matches(pattern, example), f"{one} and {other} both take {example}"


def test_the_queue_is_configured_so() -> None:
    assert config_of("MESH_CALLS", calls=64 * MiB) == {
        "name": "MESH_CALLS",
        "storage": "file",
        "num_replicas": 1,
        "max_bytes": 64 * MiB,
        "max_age": 0,
        "metadata": {"mesh.schema": "1", "mesh.environment": "main"},
        "subjects": ["mesh.call.*.*.*.*.*"],
        "retention": "workqueue",
        "max_msgs_per_subject": 1,
        "discard": "new",
        "discard_new_per_subject": True,
        "duplicate_window": 120 * SECOND,
        "max_consumers": 10_000,
        "allow_direct": True,
        "allow_atomic": True,
        "allow_batched": True,
        "allow_rollup_hdrs": False,
    }


def test_nothing_but_an_ack_can_take_a_call_out_of_the_queue() -> None:
    """A rollup strands other calls of the function, a TTL deletes calls in flight, a schedule forbids `discard new`."""
    queue = config_of("MESH_CALLS")
    assert not any(queue.get(name) for name in ("allow_rollup_hdrs", "allow_msg_ttl", "allow_msg_schedules", "max_age"))


def test_results_are_configured_so() -> None:
    assert config_of("KV_mesh_results", results=64 * MiB) == {
        "name": "KV_mesh_results",
        "storage": "file",
        "retention": "limits",
        "num_replicas": 1,
        "max_bytes": 64 * MiB,
        "metadata": {"mesh.schema": "1", "mesh.environment": "main"},
        "subjects": ["$KV.mesh_results.>"],
        "max_age": 7 * 86_400 * SECOND,
        "max_msgs_per_subject": 1,
        "discard": "new",
        "discard_new_per_subject": True,
        "allow_rollup_hdrs": False,
        "deny_delete": True,
        "deny_purge": True,
        "allow_direct": True,
        "allow_msg_ttl": True,
        "allow_atomic": True,
        "duplicate_window": 120 * SECOND,
        "republish": {
            "src": "$KV.mesh_results.*.*",
            "dest": "mesh.done.{{splitfromright(1,8)}}.{{wildcard(2)}}",
        },
    }


def test_a_result_is_republished_where_its_client_listens() -> None:
    """What the server's transform makes of a key must be what `done_subject` says."""
    call, index = CALL, "7"
    left, right = call[:-8], call[-8:]  # splitfromright(1,8) puts a dot before the last 8 characters
    dest = config_of("KV_mesh_results")["republish"]["dest"]
    published = dest.replace("{{splitfromright(1,8)}}", f"{left}.{right}").replace("{{wildcard(2)}}", index)
    assert published == MAIN.done_subject(call, index)
    assert matches(MAIN.done_filter("T0KEN123"), published)


def test_a_deployment_is_republished_where_workers_listen() -> None:
    functions = config_of("KV_mesh_functions")
    assert functions["republish"] == {"src": "$KV.mesh_functions.*", "dest": "mesh.deployed.{{wildcard(1)}}"}
    assert functions["max_msgs_per_subject"] == 20  # the history of an app
    assert functions["allow_atomic"] is True  # records and head come together


def test_a_plain_bucket_and_an_object_store_are_configured_so() -> None:
    base = {
        "storage": "file",
        "retention": "limits",
        "num_replicas": 1,
        "max_bytes": -1,
        "max_age": 0,
        "metadata": {"mesh.schema": "1", "mesh.environment": "main"},
        "discard": "new",
        "allow_direct": True,
        "allow_rollup_hdrs": True,
    }
    bucket = {"name": "KV_mesh_meta", "subjects": ["$KV.mesh_meta.>"], "max_msgs_per_subject": 1}
    objects = {"name": "OBJ_mesh_code", "subjects": ["$O.mesh_code.C.>", "$O.mesh_code.M.>"]}
    assert config_of("KV_mesh_meta") == base | bucket
    assert config_of("OBJ_mesh_code") == base | objects
    payloads = {"name": "OBJ_mesh_blobs", "subjects": ["$O.mesh_blobs.C.>", "$O.mesh_blobs.M.>"]}
    assert config_of("OBJ_mesh_blobs", blobs=64 * MiB) == base | payloads | {"max_bytes": 64 * MiB}


@pytest.mark.parametrize("name", ["workers", "slots", "apps", "clients"])
def test_what_lives_as_long_as_it_is_renewed_may_expire_by_key(name: str) -> None:
    bucket = config_of(f"KV_mesh_{name}")
    assert bucket["allow_msg_ttl"] is True
    assert "subject_delete_marker_ttl" not in bucket  # with markers, `create` of an expired key fails


@pytest.mark.parametrize(("name", "age"), [("KV_mesh_attempts", 60.0), ("KV_mesh_results", 60.0)])
def test_a_duplicate_window_is_never_longer_than_what_is_kept(name: str, age: float) -> None:
    bucket = config_of(name, max_age=age)
    assert (bucket["max_age"], bucket["duplicate_window"]) == (60 * SECOND, 60 * SECOND)


def test_logs_and_dead_letters_make_room_for_new_ones() -> None:
    logs, dead = config_of("MESH_LOGS"), config_of("MESH_DEAD")
    assert (logs["subjects"], logs["discard"], logs["max_age"]) == (["mesh.log.*.*.*.*"], "old", 3 * 86_400 * SECOND)
    assert (dead["subjects"], dead["discard"]) == (["mesh.dead.>"], "old")
    assert matches("mesh.dead.>", MAIN.quarantine_subject("mesh.call.a.f._.junk.0"))


def test_everything_is_on_disk_and_read_directly() -> None:
    for config in MAIN.streams(Limits()):
        assert (config["storage"], config["allow_direct"]) == ("file", True), config["name"]


def test_sizes_and_copies_go_where_they_belong() -> None:
    sizes = {"calls": 1, "results": 2, "blobs": 3, "dead": 4, "logs": 5}
    configs = {config["name"]: config for config in MAIN.streams(Limits(**sizes, replicas=3))}
    assert [configs[name]["max_bytes"] for name in STREAMS[:5]] == [1, 2, 3, 4, 5]
    assert {configs[name]["max_bytes"] for name in STREAMS[5:]} == {-1}
    assert {config["num_replicas"] for config in configs.values()} == {3}
    assert MAIN.consumer_config(PoolKey("a", "f"), ack_wait=1, replicas=3)["num_replicas"] == 3


# --- comparing with what is there ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, {}),
        ({"a": 1}, {"a": 2}, {"a": (2, 1)}),
        ({"a": 1}, {}, {"a": (None, 1)}),
        ({"a": False, "b": 0, "c": None, "d": []}, {}, {}),  # the server leaves out what is empty
        ({"a": False}, {"a": True}, {"a": (True, False)}),
        ({"a": {"x": 1}}, {"a": {"x": 2}}, {"a": ({"x": 2}, {"x": 1})}),
        ({"metadata": {"x": 1}}, {"metadata": {"x": 2}}, {}),
    ],
)
def test_differences_are_settings_that_are_not_as_wanted(wanted: Config, found: Config, expected: Config) -> None:
    assert differences(wanted, found) == expected
