"""Arguments, results and exceptions that are too large for a message: through the object store, and gone with them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mesh as modal
from mesh.broker import Broker
from mesh.exception import DataLossError, ExecutionError, OutputExpiredError, RequestSizeError, ResourceExhaustedError
from mesh.payload import Pieces, new_name
from mesh.protocol import new_call_id, new_client_token
from mesh.sweep import KEPT_PAYLOADS, Sweeper
from tests.support import Mesh, until

MB = 1_000_000
AT_ONCE = {"in": 0.0, "out": 0.0}

SOURCE = """
import hashlib, os, time
import numpy as np
import mesh
app = mesh.App("payloads")
ledger = {ledger!r}

class Refused(Exception):
    def __init__(self, data, text):
        super().__init__(data, text)

def note(line):
    with open(ledger, "a") as file:
        file.write(line + "\\n")

@app.function()
def digest(data):
    return hashlib.sha256(data).hexdigest()

@app.function()
def back(data):
    return data

@app.function()
def make(size):
    return os.urandom(1) * size

@app.function()
def double(array):
    array *= 2  # in place: what comes can be written to
    return array, array.flags.writeable

@app.function()
def refuse(data):
    raise Refused(data, "no")

@app.function(retries=1)
def refuse_once(data):
    note("try")
    if os.path.getsize(ledger) < 5:
        raise Refused(data, "not yet")
    return len(data)

@app.function()
def slow(data, path):
    note("began")
    while not os.path.exists(path):
        time.sleep(0.02)
    return data

@app.function()
def fail_unless(data, path):
    if not os.path.exists(path):
        raise ValueError("not yet")
    return len(data)

@app.function(keep_result=False)
def forgotten(data):
    return data

@app.function(is_generator=True)
def items(data, count):
    for number in range(count):
        yield bytes([number]) * len(data)

@app.function()
@mesh.batched(max_batch_size=2, wait_ms=200)
def pairs(data):
    return [each[:1] * len(each) for each in data]
"""


def deployed(mesh: Mesh, name: str) -> ModuleType:
    ledger = mesh.directory / f"{name}-ledger"
    return mesh.deploy(SOURCE.replace('App("payloads")', f'App("{name}")').replace("{ledger!r}", repr(str(ledger))))


def names(mesh: Mesh) -> set[str]:
    """All that is in the store."""

    async def read(broker: Broker) -> set[str]:
        return await broker.blobs.names()

    return mesh.ask(read)


def ways(mesh: Mesh, call: modal.FunctionCall[Any]) -> list[str]:
    """What the store has of a call: `in`, `out`, or both."""
    return sorted(name.split(".")[2] for name in names(mesh) if name.startswith(call.object_id))


@pytest.fixture
def payloads(mesh: Mesh) -> ModuleType:
    return deployed(mesh, f"payloads-{secrets.token_hex(4)}")


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [os.urandom(3 * MB), "é" * MB, {"list": ["x" * 600_000, 1]}, (b"t" * MB, {1})],
    ids=["bytes", "text", "json", "pickle"],
)
def test_a_value_comes_back_as_it_went(mesh: Mesh, payloads: ModuleType, data: Any) -> None:
    call = payloads.back.spawn(data)
    assert call.get(30) == data
    assert call.get(30) == data  # reading it does not use it up
    assert modal.FunctionCall.from_id(call.object_id).get(0) == data
    until(lambda: ways(mesh, call) == ["out"], what="its arguments are gone, and its result is kept")


def test_arrays_are_not_copied_and_can_be_written_to(payloads: ModuleType) -> None:
    array = np.arange(500_000, dtype=np.float64)
    got, was_writeable = payloads.double.remote(array)
    assert (got == 2 * array).all()
    assert was_writeable
    assert not got.flags.owndata, "it lies in the memory that the payload was read into"
    got[0] = 7  # and can be written to here, too


def test_a_small_array_stays_in_its_message(mesh: Mesh, payloads: ModuleType) -> None:
    call = payloads.double.spawn(np.arange(20_000, dtype=np.float64))
    assert call.get(30)[0][1] == 2
    assert ways(mesh, call) == []


def test_an_exception_that_holds_much(mesh: Mesh, payloads: ModuleType) -> None:
    data = os.urandom(2 * MB)
    call = payloads.refuse.spawn(data)
    with pytest.raises(payloads.Refused) as caught:
        call.get(30)
    assert caught.value.args == (data, "no")
    assert "Remote traceback" in "".join(caught.value.__notes__)
    assert ways(mesh, call) == ["in", "out"], "its dead letter names its arguments"


def test_a_try_that_raises_much_is_followed_by_another(mesh: Mesh, payloads: ModuleType) -> None:
    call = payloads.refuse_once.spawn(b"x" * MB)
    assert call.get(30) == MB
    until(lambda: ways(mesh, call) == [], what="nothing of it is left")


def test_a_value_nobody_wants_is_not_stored(mesh: Mesh, payloads: ModuleType) -> None:
    call = payloads.forgotten.spawn(b"x" * MB)
    assert call.get(30) is None
    until(lambda: ways(mesh, call) == [], what="nothing of it is left")


def test_maps_generators_and_batches(payloads: ModuleType) -> None:
    inputs = [bytes([number]) * (MB + number) for number in range(6)]
    assert list(payloads.back.map(inputs)) == inputs
    assert list(payloads.pairs.map(inputs)) == inputs
    assert list(payloads.items.remote_gen(b"x" * MB, 5)) == [bytes([number]) * MB for number in range(5)]


def test_a_map_sends_an_array_as_it_was_when_it_was_read(payloads: ModuleType) -> None:
    reused = np.zeros(200_000)

    def growing() -> Iterator[np.ndarray[Any, Any]]:
        for number in range(4):
            reused[:] = number
            yield reused

    assert [array[0] for array, _ in payloads.double.map(growing())] == [0, 2, 4, 6]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_above_the_limit_a_call_is_refused_and_a_result_fails_its_call(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(payload_limit=2 * MB)
    module = deployed(mesh, "limited")
    mesh.start_worker(MESH_PAYLOAD_LIMIT=str(2 * MB))
    with pytest.raises(RequestSizeError) as refused:
        module.digest.spawn(os.urandom(2 * MB))
    assert re.search(
        r"^the arguments of this call to limited\.digest take 2,000,0\d\d bytes; the limit is 2,000,000, the setting "
        r"payload_limit \(MESH_PAYLOAD_LIMIT\)\. Pass a path",
        str(refused.value),
    )
    call = module.make.spawn(3 * MB)
    with pytest.raises(RequestSizeError, match=r"^the result of 'make' takes 3,000,005 bytes; the limit is 2,000,000"):
        call.get(30)
    assert call.status().state == "failed"
    assert len(module.make.remote(MB)) == MB, "its container goes on"
    with pytest.raises(ExecutionError, match="Refused") as cut:
        module.refuse.remote(b"x" * (2 * MB - 100))  # which fits, but not with what an exception has around it
    assert len(str(cut.value)) < 500_000
    assert ways(mesh, call) == []


def test_no_payload_takes_more_than_half_of_the_store_and_a_full_one_refuses(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(blobs_size="8M")
    module = deployed(mesh, "full")
    with pytest.raises(
        RequestSizeError, match=r"the limit is 4,194,304, half of what the store of payloads has.*blobs_"
    ):
        module.digest.spawn(os.urandom(5 * MB))
    first, second = module.digest.spawn(os.urandom(3 * MB)), module.digest.spawn(os.urandom(3 * MB))
    before = names(mesh)
    with pytest.raises(ResourceExhaustedError) as full:
        module.digest.spawn(os.urandom(3 * MB))
    assert re.search(r"nothing was stored, because the store of payloads, OBJ_.*_blobs, is 7\d % full", str(full.value))
    assert names(mesh) == before
    small = module.digest.spawn(b"small")  # what fits its message needs no room there
    assert "the store of payloads" in mesh.cli("check", check=False).stdout
    mesh.start_worker()
    assert all(len(call.get(30)) == 64 for call in (first, second, small))
    until(lambda: not names(mesh), what="what has ended gives its room back")
    assert module.digest.remote(b"x" * 3 * MB) == hashlib.sha256(b"x" * 3 * MB).hexdigest()


def test_a_result_waits_for_room_in_a_full_store(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(blobs_size="8M")
    module = deployed(mesh, "waiting")
    worker = mesh.start_worker()
    kept = [module.make.spawn(3 * MB) for _ in range(2)]
    assert all(len(call.get(30)) == 3 * MB for call in kept)
    waiting = module.make.spawn(3 * MB)
    until(lambda: "the store takes nothing" in worker.log, what="the worker says so")
    name = next(name for name in names(mesh) if name.startswith(kept[0].object_id))
    mesh.ask(lambda broker: broker.blobs.delete(name))
    assert len(waiting.get(30)) == 3 * MB
    with pytest.raises(DataLossError, match="its payload is not"):
        kept[0].get(30)


# --- what is wrong with what is stored -------------------------------------------------------------------------------


def test_a_payload_that_is_not_what_was_stored_is_refused(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = deployed(mesh, "corrupt")
    spoiled, lost = module.digest.spawn(os.urandom(MB)), module.digest.spawn(os.urandom(MB))

    async def spoil(broker: Broker) -> None:
        stream, topology = broker.topology.objects_stream("blobs"), broker.topology
        for name in await broker.blobs.names():
            subject = topology.object_subject("blobs", f"C.{name}")
            chunks = await broker.connection.get_range(stream, 1, 100, subject)
            await broker.connection.delete(stream, chunks[-1].sequence)
            if name.startswith(spoiled.object_id):
                await broker.connection.store(subject, bytes(len(chunks[-1].body)))

    mesh.ask(spoil)
    mesh.start_worker()
    with pytest.raises(DataLossError, match=r"its arguments are lost: .* does not match its digest"):
        spoiled.get(30)
    with pytest.raises(
        DataLossError, match=r"its arguments are lost: of the payload .* 9\d\d,\d\d\d of 1,000,0\d\d bytes"
    ):
        lost.get(30)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_cancelled_call_leaves_nothing(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = deployed(mesh, "cancelled")
    queued = module.digest.spawn(os.urandom(MB))
    assert ways(mesh, queued) == ["in"]
    queued.cancel()
    assert names(mesh) == set()
    mesh.start_worker()
    running = module.slow.spawn(os.urandom(MB), "/nowhere")
    until(lambda: running.status().state == "running")
    running.cancel()
    until(lambda: not names(mesh))


def test_a_dead_letter_keeps_its_arguments_and_is_sent_again_with_them(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = deployed(mesh, "dead")
    mesh.start_worker()
    now_well = mesh.directory / "well"
    call = module.fail_unless.spawn(os.urandom(MB), str(now_well))
    with pytest.raises(ValueError, match="not yet"):
        call.get(30)
    assert ways(mesh, call) == ["in"]
    [blob] = names(mesh)
    assert blob in mesh.cli("dead", "show", call.object_id).stdout
    now_well.touch()
    again = modal.FunctionCall.from_id(mesh.cli("dead", "requeue", call.object_id, "--yes").stdout.split()[-1])
    assert again.get(30) == MB
    until(lambda: names(mesh) == {blob}, what="the copy goes with the call, the letter keeps its own")
    mesh.cli("dead", "purge", call.object_id, "--yes")
    assert names(mesh) == set()


def test_the_sweep_removes_what_nothing_names(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(max_age=4)
    module = deployed(mesh, "swept")
    call, other = new_call_id(new_client_token()), new_call_id(new_client_token())

    async def leave(broker: Broker) -> None:
        await broker.blobs.put(f"{call}.0", "in", Pieces([bytes(MB)]))  # its submitter died before it was queued
        subject = broker.topology.object_subject("blobs", f"C.{new_name(f'{other}.0', 'in')}")
        await broker.connection.store(subject, bytes(1000))  # or half-way
        await broker.connection.store(broker.topology.object_subject("blobs", "C.theirs"), b"theirs")

    async def sweep(broker: Broker, kept: Mapping[str, float]) -> int:
        return await Sweeper(broker, "w", 15.0, 60.0).payloads(kept)

    mesh.ask(leave)
    queued = module.back.spawn(os.urandom(MB))
    assert mesh.ask(lambda broker: sweep(broker, KEPT_PAYLOADS)) == 0, "all of it is young"
    assert mesh.ask(lambda broker: sweep(broker, AT_ONCE)) == 2
    assert {name[:-9] for name in names(mesh)} == {f"{queued.object_id}.0.in", ""}
    mesh.start_worker()
    assert len(queued.get(30)) == MB
    until(lambda: {name[:-9] for name in names(mesh)} == {f"{queued.object_id}.0.out", ""})
    assert mesh.ask(lambda broker: sweep(broker, AT_ONCE)) == 0, "its result is there"

    def expired() -> bool:
        with contextlib.suppress(OutputExpiredError):
            queued.get(timeout=0)
            return False
        return True

    until(expired)
    assert mesh.ask(lambda broker: sweep(broker, AT_ONCE)) == 1
    assert names(mesh) == {"theirs"}
