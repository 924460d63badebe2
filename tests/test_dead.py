"""Dead letters, and the commands that work on many calls: what failed for good is kept, and can be sent again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from mesh import FunctionCall
from mesh.broker import Broker
from tests.support import Mesh, until

JOBS = """
    import mesh, os, time
    app = mesh.App("dead")

    @app.function()
    def picky(path, number):
        with open(path, "a") as file:
            file.write(f"{number}\\n")
        if not os.path.exists(path + ".repaired"):
            raise ValueError(f"no use for {number}")
        return number * 2

    @app.function(timeout=1)
    def slow(number):
        time.sleep(60)

    @app.function()
    def fine(number):
        return number

    @app.function()
    def waits(seconds):
        time.sleep(seconds)
        return seconds
"""


@pytest.fixture
def mesh(own_mesh: Callable[..., Mesh]) -> Mesh:
    """An environment of its own: the commands are about everything there is."""
    mesh = own_mesh()
    mesh.start_worker()
    return mesh


def letters(mesh: Mesh, *arguments: str) -> list[dict[str, Any]]:
    return list(json.loads(mesh.cli("dead", "list", "--json", *arguments).stdout)["letters"])


def dead(mesh: Mesh, *calls: FunctionCall[Any]) -> None:
    """Wait until these calls have failed."""
    for call in calls:
        with pytest.raises(Exception, match=r"no use|timeout"):
            call.get(timeout=20)


def test_what_failed_for_good_is_sent_again_as_a_new_call(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    path = str(mesh.ledger().path)
    call = module.picky.spawn(path, 21)
    dead(mesh, call)
    mesh.ledger("ledger.repaired").path.touch()
    [letter] = letters(mesh)
    assert (letter["call"], letter["app"], letter["function"]) == (call.object_id, "dead", "picky")
    assert letter["error"] == "ValueError: no use for 21"

    [done] = json.loads(mesh.cli("dead", "requeue", call.object_id, "--json").stdout)
    new = FunctionCall.from_id(done["new_call"])
    assert done["call"] == call.object_id != new.object_id
    assert new.get(timeout=20) == 42
    with pytest.raises(ValueError, match="no use for 21"):
        call.get()  # the old result stays
    assert [entry["requeued_as"] for entry in letters(mesh)] == [new.object_id]


def test_the_new_call_names_the_old_one(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    call = module.picky.spawn(str(mesh.ledger().path), 21)
    dead(mesh, call)
    mesh.workers[0].stop()
    new = json.loads(mesh.cli("call", "retry", call.object_id, "--json").stdout)[0]["new_call"]

    async def retry_of(broker: Broker) -> str:
        stored = await broker.calls.find(new)
        assert stored is not None
        return stored.headers["Mesh-Retry-Of"]

    assert mesh.ask(retry_of) == call.object_id


def test_sending_a_letter_again_twice_needs_again(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    call = module.picky.spawn(str(mesh.ledger().path), 21)
    dead(mesh, call)
    first = json.loads(mesh.cli("call", "retry", call.object_id, "--json").stdout)[0]["new_call"]
    refused = mesh.cli("call", "retry", call.object_id, check=False)
    assert refused.returncode == 7
    assert f"was sent again before, as {first}; --again does it once more" in refused.stderr
    assert mesh.cli("dead", "requeue", call.object_id, "--again").returncode == 0
    until(lambda: len(letters(mesh)) == 3, what="both new calls fail as well")
    assert mesh.ledger().lines() == ["21"] * 3


def test_letters_are_chosen_by_app_function_error_and_time(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    path = str(mesh.ledger().path)
    dead(mesh, *(module.picky.spawn(path, n) for n in (1, 2, 30)), module.slow.spawn(4))
    assert len(letters(mesh)) == 4
    assert len(letters(mesh, "--app", "dead")) == 4
    assert letters(mesh, "--app", "other") == []
    assert [entry["state"] for entry in letters(mesh, "--function", "slow")] == ["timed_out"]
    assert len(letters(mesh, "--error", "USE FOR 30")) == 1
    assert len(letters(mesh, "--since", "1h")) == 4
    assert letters(mesh, "--until", "1h") == []
    assert letters(mesh, "--since", "2100-01-01T00:00:00Z") == []
    cut = mesh.cli("dead", "list", "-n", "2")
    assert len(cut.stdout.splitlines()) == 2
    assert "only the newest 2 are shown" in cut.stderr
    wrong = mesh.cli("dead", "list", "--since", "yesterday", check=False)
    assert wrong.returncode == 2
    assert "--since 'yesterday': say an age such as 30m, 2h or 3d" in wrong.stderr


def test_many_are_sent_again_with_a_count_and_a_confirmation(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    path = str(mesh.ledger().path)
    dead(mesh, *(module.picky.spawn(path, n) for n in range(5)), module.slow.spawn(4))
    mesh.ledger("ledger.repaired").path.touch()
    nobody = mesh.cli("dead", "requeue", "--function", "picky", check=False)
    assert nobody.returncode == 2
    assert "Send 5 dead letters again? Say --yes where nobody can be asked" in nobody.stderr
    assert "5 sent again" in mesh.cli("dead", "requeue", "--function", "picky", "--yes").stderr
    until(lambda: mesh.ledger().count() == 10)
    assert "0 sent again" in mesh.cli("call", "retry", "--function", "picky", "--yes").stderr
    assert mesh.cli("dead", "requeue", check=False).returncode == 2


def test_letters_are_forgotten(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    path = str(mesh.ledger().path)
    calls = [module.picky.spawn(path, n) for n in range(3)]
    dead(mesh, *calls)
    assert mesh.cli("dead", "purge", calls[0].object_id, "--yes").returncode == 0
    assert len(letters(mesh)) == 2
    assert mesh.cli("dead", "purge", "--all", "--yes").returncode == 0
    assert letters(mesh) == []
    missing = mesh.cli("dead", "show", calls[0].object_id, check=False)
    assert missing.returncode == 3
    assert "the call is failed, and only what failed for good keeps its arguments" in missing.stderr


def test_a_letter_shows_its_arguments(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    path = str(mesh.ledger().path)
    call = module.picky.spawn(path, 7)
    dead(mesh, call)
    shown = mesh.cli("dead", "show", call.object_id).stdout
    assert "ValueError: no use for 7" in shown
    assert f'"{path}"' in shown


def test_what_is_no_call_is_listed_and_cannot_be_sent_again(mesh: Mesh) -> None:
    mesh.deploy(JOBS)

    async def publish(broker: Broker) -> None:
        await broker.connection.store(f"{broker.topology.root}.call.dead.fine._.nonsense.0", b"?")

    mesh.ask(publish)
    until(lambda: letters(mesh))
    [letter] = letters(mesh)
    assert letter["call"] == ""
    refused = mesh.cli("dead", "requeue", str(letter["number"]), check=False)
    assert refused.returncode == 2
    assert "is no call, so it cannot be sent again" in refused.stderr
    assert mesh.cli("dead", "purge", str(letter["number"]), "--yes").returncode == 0
    assert letters(mesh) == []


def test_a_letter_as_large_as_a_message_may_be_is_kept(mesh: Mesh) -> None:
    """Its headers leave no room beside the original: they go first, then the end of the body does."""
    mesh.deploy(JOBS)

    async def publish(broker: Broker) -> int:
        room = broker.connection.largest_body({"Mesh-Client": "c"})
        subject = f"{broker.topology.root}.call.dead.fine._.nonsense.0"
        await broker.connection.store(subject, b"x" * room, {"Mesh-Client": "c"})
        return room

    size = mesh.ask(publish)
    until(lambda: letters(mesh))
    assert 0.9 * size < letters(mesh)[0]["size"] < size
    assert mesh.ask(lambda broker: broker.calls.newest(1)) == []


def test_calls_are_cancelled_by_id_and_by_filter(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    calls = [module.waits.spawn(60.0) for _ in range(3)]
    ended = module.fine.spawn(1)
    assert ended.get(timeout=20) == 1
    assert "1 cancelled" in mesh.cli("call", "cancel", calls[0].object_id).stderr
    assert "had ended before: it is succeeded" in mesh.cli("call", "cancel", ended.object_id).stderr
    assert mesh.cli("call", "cancel", check=False).returncode == 2
    done = json.loads(mesh.cli("call", "cancel", "--function", "waits", "--yes", "--json").stdout)
    assert {entry["call"] for entry in done} == {call.object_id for call in calls[1:]}
    assert {entry["state"] for entry in done} == {"cancelled"}
    missing = mesh.cli("call", "cancel", "fc-0000000000AAAAAAAAAAAAAAAA", check=False)
    assert missing.returncode == 3


def test_hundreds_of_queued_calls_are_cancelled_at_once(own_mesh: Callable[..., Mesh]) -> None:
    mesh = own_mesh()
    module = mesh.deploy(JOBS)
    calls = [module.fine.spawn(n) for n in range(500)]
    began = time.monotonic()
    assert "500 cancelled" in mesh.cli("call", "cancel", "--app", "dead", "--yes").stderr
    assert time.monotonic() - began < 30
    assert {call.status().state for call in calls} == {"cancelled"}


def test_failed_calls_are_listed_by_their_error(mesh: Mesh) -> None:
    module = mesh.deploy(JOBS)
    path = str(mesh.ledger().path)
    dead(mesh, *(module.picky.spawn(path, n) for n in (1, 2)))
    listed = json.loads(mesh.cli("call", "list", "--error", "no use for 2", "--json").stdout)
    assert [entry["last_error"] for entry in listed["calls"]] == ["ValueError: no use for 2"]
