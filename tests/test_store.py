"""The store in trouble: full, away, or changed by hand. Calls still end exactly once, and who is to act is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh import Function, FunctionCall
from mesh.broker import Broker, StoreError
from mesh.exception import ConnectionError, NotFoundError, ResourceExhaustedError
from mesh.protocol import Result, State, failure
from mesh.records import WorkerRecord
from mesh.server import NatsServer
from mesh.sweep import Sweeper
from tests.support import Mesh, WorkerProcess, new_mesh, until

WORK = """
    import mesh, time
    app = mesh.App("store")

    def note(path, text):
        with open(path, "a") as file:
            file.write(text + "\\n")

    @app.function(timeout=100)
    def work(ledger, name, seconds=0.0):
        note(ledger, f"begin {name} ")
        time.sleep(seconds)
        note(ledger, f"end {name} ")
        return name

    @app.function()
    def take(data):
        return len(data)
"""
MiB = 1 << 20


def resize(mesh: Mesh, stream: Callable[[Broker], str], **changes: object) -> None:
    """What `nats stream edit` does."""

    async def edit(broker: Broker) -> None:
        name = stream(broker)
        config = (await broker.connection.api(f"STREAM.INFO.{name}"))["config"]
        await broker.connection.api(f"STREAM.UPDATE.{name}", {**config, **changes})

    mesh.ask(edit)


def calls(broker: Broker) -> str:
    return broker.topology.calls


def results(broker: Broker) -> str:
    return broker.topology.bucket_stream("results")


def size_of(mesh: Mesh, stream: Callable[[Broker], str]) -> tuple[int, int]:
    """Bytes used, and the size."""

    async def read(broker: Broker) -> tuple[int, int]:
        info = await broker.connection.api(f"STREAM.INFO.{stream(broker)}")
        return info["state"]["bytes"], info["config"]["max_bytes"]

    return mesh.ask(read)


def delete(mesh: Mesh, stream: Callable[[Broker], str]) -> None:
    """What `nats stream rm` does."""

    async def remove(broker: Broker) -> None:
        await broker.connection.api(f"STREAM.DELETE.{stream(broker)}")

    mesh.ask(remove)


def workers(mesh: Mesh) -> list[WorkerRecord]:
    return mesh.ask(lambda broker: broker.workers.all())


def ran_once(mesh: Mesh, names: list[str]) -> None:
    begun = sorted(line.split()[1] for line in mesh.ledger().lines() if line.startswith("begin"))
    assert begun == sorted(names)


# --- full: submitting ------------------------------------------------------------------------------------------------


def test_submissions_are_refused_when_the_queue_is_nearly_full(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(calls_size="2M")
    take = mesh.deploy(WORK).take
    accepted = [take.spawn("x" * 50_000) for _ in range(38)]
    until(lambda: not accepts(take), what="the client has heard that the queue is nearly full")
    used, size = size_of(mesh, calls)
    assert 0.9 <= used / size < 0.95
    with pytest.raises(ResourceExhaustedError) as refusal:
        take.spawn("x")
    text = str(refusal.value)
    assert text.startswith("submitting store.take: nothing was stored, because the queue, MESH-T-")
    for part in (" % full (1.", " of 2.0 MiB)", "workers have caught up", "nats stream edit", "calls_size"):
        assert part in text
    mesh.start_worker()
    assert FunctionCall.gather(*accepted) == [50_000] * len(accepted)
    until(lambda: accepts(take), what="the same client has heard that there is room")


def test_a_burst_is_refused_by_the_server_in_the_same_words(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(calls_size="1M")
    take = mesh.deploy(WORK).take
    with pytest.raises(ResourceExhaustedError) as refusal:
        burst(take)
    assert "the queue, MESH-T-" in str(refusal.value)
    assert "calls_size" in str(refusal.value)


def burst(take: Function[..., Any]) -> None:
    for _ in range(200):
        take.spawn("x" * 50_000)


def test_a_full_bucket_of_results_refuses_submissions(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(results_size="1M")
    take = mesh.deploy(WORK).take
    fill_results(mesh)
    with pytest.raises(ResourceExhaustedError, match=r"the bucket of results, KV_mesh-t-.* results_size"):
        take.spawn("x")
    resize(mesh, results, max_bytes=8 * MiB)
    until(lambda: accepts(take), what="the same client may submit again")


def accepts(take: Function[..., Any]) -> bool:
    try:
        take.spawn("x")
    except ResourceExhaustedError:
        return False
    return True


def fill_results(mesh: Mesh) -> None:
    """Put keys of somebody else into the bucket of results until it takes no more."""

    async def fill(broker: Broker) -> None:
        key = f"$KV.{broker.topology.bucket('results')}.by-hand"
        for size in (50_000, 100):  # until not even an empty result fits
            for n in range(10_000):
                try:
                    await broker.connection.store(f"{key}.{size}-{n}", b"x" * size)
                except StoreError:
                    break
            else:
                raise AssertionError("it takes everything")

    mesh.ask(fill)


def test_asking_whether_there_is_room_costs_little(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    take = mesh.deploy(WORK).take
    take.spawn("x")
    before = mesh.ask(requests)
    began = time.monotonic()
    for _ in range(500):
        take.spawn("x")
    looks = (time.monotonic() - began) / 2 + 2
    assert mesh.ask(requests) - before <= 3 * looks


async def requests(broker: Broker) -> int:
    """Requests of the JetStream API so far, in the whole account."""
    return int((await broker.connection.api("INFO"))["api"]["total"])


# --- full: settling --------------------------------------------------------------------------------------------------


def test_where_results_do_not_fit_workers_hold_on_and_take_nothing_new(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(results_size="1M", ack_wait=2)
    work = mesh.deploy(WORK).work
    worker = mesh.start_worker("--containers", "2")
    path = str(mesh.ledger().path)
    running = [work.spawn(path, f"running{n}", 3.0) for n in range(2)]
    until(lambda: mesh.ledger().count("begin") == 2)
    resize(mesh, results, max_bytes=200_000)
    queued = [work.spawn(path, f"queued{n}") for n in range(4)]
    fill_results(mesh)
    until(lambda: any(w.trouble for w in workers(mesh)), what="the worker says that it cannot settle")
    assert "begins nothing until the store takes results: maximum bytes exceeded" in workers(mesh)[0].trouble
    assert "begins nothing" in queued[-1].status().waiting_for
    begun = mesh.ledger().count("begin")
    time.sleep(3 * 2)  # several ack waits: the leases are kept, and nothing is delivered to anybody else
    assert mesh.ledger().count("begin") == begun < 6
    assert worker.log.count("the store takes nothing") == 1
    resize(mesh, results, max_bytes=8 * MiB)
    assert FunctionCall.gather(*running, *queued) == ["running0", "running1", *(f"queued{n}" for n in range(4))]
    ran_once(mesh, ["running0", "running1", *(f"queued{n}" for n in range(4))])
    assert worker.log.count("the store takes everything again") == 1
    until(lambda: not workers(mesh)[0].trouble)


# --- away ------------------------------------------------------------------------------------------------------------


def processor_time(worker: WorkerProcess) -> float:
    """Seconds of processor time that a worker has used, in its own process."""
    fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.parametrize("away", [8.0])
def test_the_server_is_away_while_calls_run(own_server: Callable[..., NatsServer], tmp_path: Path, away: float) -> None:
    """What runs finishes and is reported; who submits is told in time; nobody spins."""
    server = own_server(store=tmp_path / "store")
    with new_mesh(server, tmp_path, ack_wait=3, submit_timeout=2) as mesh:
        work = mesh.deploy(WORK).work
        worker = mesh.start_worker("--containers", "4")
        path = str(mesh.ledger().path)
        running = [work.spawn(path, f"running{n}", away / 4) for n in range(4)]
        until(lambda: mesh.ledger().count("begin") == 4)
        queued = [work.spawn(path, f"queued{n}") for n in range(4)]
        server.kill()
        until(lambda: "the server is away" in worker.log)
        began, used = time.monotonic(), processor_time(worker)
        with pytest.raises(ConnectionError, match=r"call fc-\w{26} to store.work: .*; it may have been accepted"):
            work.spawn(path, "lost")
        assert time.monotonic() - began < 2 + 3
        until(lambda: mesh.ledger().count("end running") == 4, timeout=away + 20, what="what runs goes on to its end")
        time.sleep(max(0.0, began + away - time.monotonic()))  # the server stays away so long
        elapsed = time.monotonic() - began
        assert processor_time(worker) - used < 0.1 * elapsed
        own_server(store=tmp_path / "store", port=server.port)
        assert FunctionCall.gather(*running, *queued) == [
            f"{kind}{n}" for kind in ("running", "queued") for n in range(4)
        ]
        assert mesh.ledger().count("begin lost ") <= 1
        for name in [f"{kind}{n}" for kind in ("running", "queued") for n in range(4)]:
            assert mesh.ledger().count(f"begin {name} ") == 1, f"{name} ran once"
        assert worker.process.poll() is None


# --- changed by hand -------------------------------------------------------------------------------------------------


async def remove_consumer(broker: Broker) -> None:
    await broker.consumers.remove("store+work+_")


async def consumer(broker: Broker) -> dict[str, Any]:
    info = await broker.connection.api(f"CONSUMER.INFO.{broker.topology.calls}.store+work+_")
    return dict(info["config"])


def test_a_consumer_deleted_while_calls_are_queued_and_run(own_mesh: Callable[..., Mesh]) -> None:
    """It is made again, and delivers everything anew: nothing runs twice, on whichever worker."""
    mesh = own_mesh(ack_wait=3)
    work = mesh.deploy(WORK).work
    logs = [mesh.start_worker("--containers", "2") for _ in range(2)]
    path = str(mesh.ledger().path)
    running = [work.spawn(path, f"running{n}", 2.5) for n in range(4)]
    until(lambda: mesh.ledger().count("begin") == 4)
    queued = [work.spawn(path, f"queued{n}", 0.05) for n in range(40)]
    mesh.ask(remove_consumer)
    names = [f"running{n}" for n in range(4)] + [f"queued{n}" for n in range(40)]
    assert FunctionCall.gather(*running, *queued) == names
    ran_once(mesh, names)
    until(lambda: size_of(mesh, calls)[0] == 0, what="the queue is empty")
    assert any("store+work+_ had been deleted, and is made again" in worker.log for worker in logs)


def test_a_consumer_deleted_again_and_again_under_short_calls(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=3)
    work = mesh.deploy(WORK).work
    for _ in range(2):
        mesh.start_worker("--containers", "2")
    path = str(mesh.ledger().path)
    spawned = [work.spawn(path, f"n{n}", 0.02) for n in range(300)]
    for count in (20, 100, 180):
        until(lambda count=count: mesh.ledger().count("begin") >= count)
        mesh.ask(remove_consumer)
    assert FunctionCall.gather(*spawned) == [f"n{n}" for n in range(300)]
    ran_once(mesh, [f"n{n}" for n in range(300)])


def test_a_consumer_changed_by_hand_is_set_right(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    work = mesh.deploy(WORK).work
    worker = mesh.start_worker("--containers", "4", MESH_SWEEP_INTERVAL="0.5")

    async def edit(broker: Broker) -> None:
        config = {**await consumer(broker), "max_ack_pending": 1, "ack_wait": 60 * 10**9}
        name = f"CONSUMER.CREATE.{broker.topology.calls}.store+work+_.{config['filter_subject']}"
        await broker.connection.api(name, {"stream_name": broker.topology.calls, "config": config})

    mesh.ask(edit)
    until(lambda: mesh.ask(consumer)["max_ack_pending"] == 1_000_000, what="it is set right")
    assert mesh.ask(consumer)["ack_wait"] == 15 * 10**9
    for text in ("max_ack_pending is 1, and should be 1000000", "store+work+_ is as it should be again"):
        until(lambda text=text: text in worker.log, what=text)
    assert work.remote(str(mesh.ledger().path), "a") == "a"


@pytest.mark.parametrize("bucket", ["attempts", "workers", "slots", "apps", "meta"])
def test_a_bucket_that_holds_nothing_to_keep_is_made_again(own_mesh: Callable[..., Mesh], bucket: str) -> None:
    mesh = own_mesh(ack_wait=2)
    module = mesh.deploy(
        WORK
        + """
    @app.function(retries=mesh.Retries(max_retries=1, initial_delay=0.1))
    def again(path):
        note(path, "try ")
        if open(path).read().count("try ") < 2:
            raise ValueError("not yet")
        return "done"
"""
    )
    worker = mesh.start_worker(MESH_SWEEP_INTERVAL="0.5")
    path = str(mesh.ledger().path)
    running = module.work.spawn(path, "a", 2.0)
    until(lambda: mesh.ledger().count("begin") == 1)
    delete(mesh, lambda broker: broker.topology.bucket_stream(bucket))
    assert module.again.remote(str(mesh.directory / "tries")) == "done"
    assert running.get() == "a"
    until(lambda: "had been deleted, and is made again, empty" in worker.log)
    until(lambda: workers(mesh), what="the worker is listed")
    assert mesh.ledger().count("begin") == 1
    assert worker.stop() == 0


def test_what_holds_data_is_not_made_again_by_itself(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    work = mesh.deploy(WORK).work
    worker = mesh.start_worker(MESH_SWEEP_INTERVAL="0.5")
    path = str(mesh.ledger().path)
    running = work.spawn(path, "a", 1.0)
    until(lambda: mesh.ledger().count("begin") == 1)
    delete(mesh, results)
    gone = "_results is gone, with what it held: restore it from a backup, or make it anew with `mesh init`"
    until(lambda: gone in worker.log)
    until(lambda: workers(mesh)[0].trouble, what="the worker says that it cannot settle")
    before = mesh.ask(requests)
    time.sleep(3)
    assert mesh.ask(requests) - before < 3 * 40  # looks twice a second here, at a dozen streams
    assert worker.log.count(gone) == 1
    mesh.cli("init")
    assert running.get(timeout=30) == "a"
    assert mesh.ledger().count("begin") == 1
    until(lambda: "_results is as it should be again" in worker.log)


def test_the_queue_deleted_by_hand(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(ack_wait=2)
    work = mesh.deploy(WORK).work
    worker = mesh.start_worker("--containers", "1")
    path = str(mesh.ledger().path)
    running = work.spawn(path, "running", 2.0)
    until(lambda: mesh.ledger().count("begin") == 1)
    delete(mesh, calls)
    until(lambda: "_CALLS is gone, with what it held" in worker.log)
    with pytest.raises(NotFoundError, match="mesh init"):
        work.spawn(path, "refused")
    assert running.get(timeout=20) == "running"  # it was accepted, and ran: that much is kept
    before, used = mesh.ask(requests), processor_time(worker)
    time.sleep(5)
    assert mesh.ask(requests) - before < 5 * 15
    assert processor_time(worker) - used < 1
    mesh.cli("init")
    assert work.spawn(path, "new").get(timeout=40) == "new"
    ran_once(mesh, ["running", "new"])


# --- what an operator sees -------------------------------------------------------------------------------------------


def test_check_of_a_mesh_that_is_well(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    mesh.deploy(WORK)
    done = mesh.cli("check")
    assert "note: no worker takes calls" in done.stderr
    mesh.start_worker("--containers", "3")
    done = mesh.cli("check")
    assert done.stderr == ""
    for text in (
        "nats-server 2.",
        "only the server's configuration says",
        "1, 0 of 3 containers",
        "the queue, MESH-T-",
    ):
        assert text in done.stdout
    report = json.loads(mesh.cli("check", "--json").stdout)
    assert (report["ok"], report["problems"], report["notes"]) == (True, [], [])
    assert [level["size"] for level in report["levels"][:2]] == [64 * MiB, 64 * MiB]


def test_check_says_what_was_deleted_and_changed(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh(results_size="1M")
    mesh.deploy(WORK)
    fill_results(mesh)
    resize(mesh, calls, max_age=3600 * 10**9)
    delete(mesh, lambda broker: broker.topology.bucket_stream("attempts"))
    mesh.ask(remove_consumer)
    mesh.ask(stranger)
    done = mesh.cli("check", check=False)
    assert done.returncode == 1
    for text in (
        "_CALLS was changed: max_age is 3600000000000, and should be 0",
        "_attempts is gone: a worker makes it again",
        "store+work+_ is gone: a worker makes it again",
        "by-hand is no consumer of mesh's",
        "% full (1.0 MiB of 1.0 MiB), so calls are refused: keep results shorter",
    ):
        assert text in done.stderr
    assert len(json.loads(mesh.cli("check", "--json", check=False).stdout)["problems"]) == 5


async def stranger(broker: Broker) -> None:
    """A consumer that somebody made, on calls of their own."""
    subject = broker.topology.call_filter(app="nobody")
    config = {"durable_name": "by-hand", "ack_policy": "explicit", "filter_subject": subject}
    name = f"CONSUMER.CREATE.{broker.topology.calls}.by-hand.{subject}"
    await broker.connection.api(name, {"stream_name": broker.topology.calls, "config": config})


def test_check_without_bucket_or_environment_or_server(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    for bucket in ("meta", "workers", "functions"):
        delete(mesh, lambda broker, bucket=bucket: broker.topology.bucket_stream(bucket))
        done = mesh.cli("check", check=False)
        assert (done.returncode, f"_{bucket} is gone" in done.stderr) == (1, True)
    nowhere = mesh.cli("check", "--env", "nowhere", check=False)
    assert nowhere.returncode == 3
    assert "there is no environment 'nowhere'" in nowhere.stderr
    unreachable = mesh.cli("check", "--url", "nats://127.0.0.1:1", check=False)
    assert unreachable.returncode == 6
    assert "cannot reach nats://127.0.0.1:1" in unreachable.stderr


def test_workers_are_listed(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    work = mesh.deploy(WORK).work
    assert mesh.cli("worker", "list").stdout == ""
    assert json.loads(mesh.cli("worker", "list", "--json").stdout) == []
    worker = mesh.start_worker("--containers", "3")
    call = work.spawn(str(mesh.ledger().path), "a", 20.0)
    until(lambda: call.status().state == "running")
    [record] = json.loads(mesh.cli("worker", "list", "--json").stdout)
    assert (record["pid"], record["containers"], record["used"]) == (worker.pid, 3, 1)
    assert (record["running"], record["functions"]) == ([f"{call.object_id}.0"], {"store.work": 1})
    [line] = mesh.cli("worker", "list").stdout.splitlines()
    cells = line.split("\t")
    assert cells[0] == record["worker"]
    assert cells[2:5] == [str(worker.pid), record["python"], "1/3"]
    assert cells[9:12] == ["", f"{call.object_id}.0", "store.work"]
    worker.process.terminate()
    until(lambda: "draining" in mesh.cli("worker", "list").stdout)


def test_logs_are_one_json_object_a_line(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(
        """
        import mesh, os
        app = mesh.App("json")

        @app.function(retries=mesh.Retries(max_retries=1, initial_delay=0))
        def fail():
            print("printed")
            raise ValueError("no luck")

        @app.function()
        def crash():
            os._exit(3)
        """
    )
    worker = mesh.start_worker("--verbose", "--log-format", "json")
    failing, crashing = module.fail.spawn(), module.crash.spawn()
    for call in (failing, crashing):
        until(lambda call=call: call.status().state == "failed")
    worker.stop()
    lines = [json.loads(line) for line in worker.log.splitlines()]
    assert all({"time", "level", "logger", "text"} <= line.keys() for line in lines)
    events = [line for line in lines if line.get("call") == failing.object_id]
    assert [(e["event"], e["attempt"]) for e in events] == [
        ("call.began", 1), ("call.again", 1), ("call.began", 2), ("call.ended", 2),
    ]  # fmt: skip
    assert all((e["app"], e["function"], e["index"]) == ("json", "fail", 0) for e in events)
    assert {e["worker"] for e in events} == {w["worker"] for w in events if w["event"] == "call.ended"}
    assert (events[-1]["state"], events[-1]["error"]) == ("failed", "ValueError: no luck")
    assert [e["text"] for e in lines if e.get("event") == "output"] == ["printed"] * 2
    lost = [line for line in lines if line.get("event") == "container.ended" and line["lost"]]
    assert {(line["level"], line["function"]) for line in lost} == {("warning", "crash")}


def test_calls_that_come_back_after_they_were_acknowledged_are_cleared_away(
    own_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server that was killed may bring them back; the chaos run sees it do so. No server does it when asked, so
    here the consumers are said to know of nothing."""
    mesh = own_mesh()
    module = mesh.deploy(WORK)
    ended, left = module.work.spawn(0, "ended"), module.work.spawn(0, "left")

    async def nothing_known() -> tuple[int, int]:
        return 2, 0

    async def strand(broker: Broker) -> list[str]:
        monkeypatch.setattr(broker.consumers, "queue_sizes", nothing_known)
        failed = Result.of_failure(State.FAILED, failure(ValueError, "no"), app="store", function="work")
        await broker.results.create(f"{ended.object_id}.0", failed)
        sweeper = Sweeper(broker, "test", 15, 60)
        assert [await sweeper.orphans(), await sweeper.orphans()] == [0, 1], "what is seen twice is cleared away"
        assert await broker.dead.of_call(ended.object_id), "its dead letter is there"
        return [call.object_id for call in (ended, left) if await broker.calls.find(call.object_id) is not None]

    assert mesh.ask(strand) == [left.object_id], "what has not ended stays"
