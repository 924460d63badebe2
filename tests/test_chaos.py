"""A short chaos run, and whether its checker sees what it should."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mesh.protocol import State
from tests.chaos.__main__ import as_json, figures
from tests.chaos.check import Report, check, too_tame
from tests.chaos.fleet import left_over
from tests.chaos.kinds import KINDS
from tests.chaos.ledger import Book, Ledger
from tests.chaos.nemesis import Hit
from tests.chaos.plan import Fault, plan
from tests.chaos.run import Run
from tests.chaos.store import Contents, Ended

SEED, SECONDS = 11, 25.0

A, B = "fc-0000000000AAAAAAAATTTTTTTT", "fc-0000000000BBBBBBBBTTTTTTTT"


@pytest.mark.timeout(300)
def test_everything_is_killed_and_every_call_ends_once(tmp_path: Path) -> None:
    run = Run(SEED, SECONDS, directory=tmp_path / "run")
    report = run.run()
    assert not report.wrong, "\n".join(run.explained(report))
    assert report.accepted
    assert all(report.faults.values()), report.faults


@pytest.mark.load
@pytest.mark.timeout(300)
def test_restarts_of_the_server_alone_make_no_second_execution(tmp_path: Path) -> None:
    """With an ack wait that outlasts them, as the default does: whoever holds an input renews it when it is back."""
    run = Run(SEED, 60.0, faults=(Fault.SERVER_KILL,), ack_wait=15.0, directory=tmp_path / "run")
    report = run.run()
    assert not report.wrong, "\n".join(run.explained(report))
    assert report.faults[Fault.SERVER_KILL] > 10
    assert sum(report.extra.values()) == 0


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_plan() -> None:
    assert plan(SEED, SECONDS) == plan(SEED, SECONDS)
    assert plan(SEED, SECONDS) != plan(SEED + 1, SECONDS)
    assert {planned.fault for planned in plan(SEED, SECONDS)} == set(Fault)


def test_a_plan_of_ten_minutes_is_wild_enough() -> None:
    counts = Counter(planned.fault for planned in plan(SEED, 600))
    report = Report(accepted=20_000, faults=Counter({fault.value: count for fault, count in counts.items()}))
    assert too_tame(report, 600) == []
    report.accepted, report.faults[Fault.CUT] = 19_999, 4
    assert too_tame(report, 600) == [
        "only 4 times cut; 5 are the least",
        "only 19999 calls were accepted; 20000 are the least",
    ]


# --- the report ------------------------------------------------------------------------------------------------------


def test_a_report_can_be_read_by_people_and_programs() -> None:
    report = Report(accepted=1234, states=Counter(succeeded=1200), extra=Counter(cut=1), faults=Counter(cut=2))
    lines = figures(report, 7, 60)
    assert "accepted          1,234" in lines
    assert "extra executions  1 (cut 1), unexplained 0" in lines
    assert "faults            2 (cut 2)" in lines
    values = json.loads(as_json(report, 7, 60))
    assert (values["seed"], values["lost"], values["faults"], values["wrong"]) == (7, 0, {"cut": 2}, [])


# --- the checker -----------------------------------------------------------------------------------------------------


def story(directory: Path, *executions: tuple[float, int, int], given: str | None = "14") -> Book:
    """A book of one call of `quick` with 7, accepted, that ran so: when, in which container, of which worker."""
    ledger = Ledger(directory / "ledger-c")
    ledger.write("try", "c-1", kind="quick", n=7, how="spawn")
    ledger.write("accepted", "c-1", call=A)
    if given is not None:
        ledger.write("given", "c-1", value=given)
    lines = [f"{at} {A} 1 {container} {worker} c-1\n" for at, container, worker in executions]
    (directory / "effects").write_text("".join(lines))
    book = Book(directory)
    book.read()
    book.calls["c-1"].tried = 0.0
    return book


def contents(*, state: State = State.SUCCEEDED, value: str = "14", **changes: object) -> Contents:
    """A store that holds the result of that call, and nothing else."""
    facts: dict[str, object] = {
        "deployed": frozenset({"MESH_CALLS"}),
        "queued": (),
        "unsettled": 0,
        "overdue": (),
        "results": {A: Ended(state, value, 3.0, "w")},
        "stored": 1,
        **changes,
    }
    return Contents(**facts)  # type: ignore[arg-type]


def wrong(book: Book, after: Contents, *hits: Hit) -> list[str]:
    return [text for _, text in check(book, list(hits), contents(), after).wrong]


def test_a_call_that_went_well_is_right(tmp_path: Path) -> None:
    report = check(story(tmp_path, (1.0, 10, 20)), [], contents(), contents())
    assert report.wrong == []
    assert (report.accepted, report.executions, report.lost, report.doubled) == (1, 1, 0, 0)


def test_a_lost_call_is_seen(tmp_path: Path) -> None:
    after = contents(results={}, stored=0)
    report = check(story(tmp_path, given=None), [], contents(), after)
    assert report.lost == 1
    assert report.wrong == [(A, "lost: it was accepted, or ran, and has no result")]


def test_a_wrong_value_is_seen(tmp_path: Path) -> None:
    assert wrong(story(tmp_path, given=None), contents(value="15")) == ["ended succeeded with 15, not with 14"]


def test_two_values_of_one_call_are_seen(tmp_path: Path) -> None:
    report = check(story(tmp_path, given="15"), [], contents(), contents())
    assert report.doubled == 1
    assert report.wrong == [(A, "its client got 15, and 14 is stored")]


def test_two_calls_of_one_submission_are_seen(tmp_path: Path) -> None:
    book = story(tmp_path, (1.0, 10, 20))
    with (tmp_path / "effects").open("a") as file:
        file.write(f"2.0 {B} 1 10 20 c-1\n")
    book.read()
    results = {id: Ended(State.SUCCEEDED, "14", 3.0, "w") for id in (A, B)}
    assert check(book, [], contents(), contents(results=results, stored=2)).doubled == 1


def test_a_result_that_nobody_asked_for_is_seen(tmp_path: Path) -> None:
    results = {id: Ended(State.SUCCEEDED, "14", 3.0, "w") for id in (A, B)}
    assert wrong(story(tmp_path), contents(results=results, stored=2)) == ["ended succeeded, and nobody submitted it"]


def test_dead_letters_are_the_failures_exactly(tmp_path: Path) -> None:
    book = story(tmp_path, given=None)
    assert wrong(book, contents(dead=Counter({A: 1}))) == ["left a dead letter, and has not failed"]
    failed = contents(state=State.FAILED, dead=Counter({A: 2}))
    assert wrong(book, failed) == ["left 2 dead letters"]
    assert wrong(book, contents(state=State.FAILED)) == ["failed, and left no dead letter"]


@pytest.mark.parametrize(
    ("hit", "explains"),
    [
        (Hit(Fault.CONTAINER_KILL, 1.5, 1.5, containers={10}), True),
        (Hit(Fault.CONTAINER_KILL, 0.5, 0.5, containers={10}), False),  # before it ran there
        (Hit(Fault.CONTAINER_KILL, 1.5, 1.5, containers={11}), False),  # another one
        (Hit(Fault.WORKER_KILL, 1.5, 1.5, workers={20}), True),
        (Hit(Fault.WORKER_STOP, 0.2, 0.9, workers={21}), True),  # which held it, and lost its lease
        (Hit(Fault.WORKER_STOP, 2.5, 2.9, workers={20}), False),  # after it ran again
        (Hit(Fault.WORKER_KILL, 1.5, 1.5, workers={22}), False),
        (Hit(Fault.SERVER_KILL, 1.5, 1.9, everyone=True), True),
        (Hit(Fault.CUT, 1.5, 1.5, everyone=True), False),  # leases are renewed right after
    ],
)
def test_an_execution_more_needs_a_fault_that_explains_it(tmp_path: Path, hit: Hit, explains: bool) -> None:
    book = story(tmp_path, (1.0, 10, 20), (2.0, 11, 21))
    report = check(book, [hit], contents(), contents())
    assert (report.unexplained == 0) is explains
    assert report.extra == (Counter({hit.fault.value: 1}) if explains else Counter())


def test_one_fault_explains_one_execution_more(tmp_path: Path) -> None:
    book = story(tmp_path, (1.0, 10, 20), (2.0, 10, 20), (2.1, 10, 20))
    kill = Hit(Fault.SERVER_KILL, 0.5, 1.5, everyone=True)
    report = check(book, [kill], contents(), contents())
    assert (sum(report.extra.values()), report.unexplained) == (1, 1)


def test_one_more_than_the_cap_is_seen(tmp_path: Path) -> None:
    book = story(tmp_path, (1.0, 10, 20))
    (tmp_path / "seats").write_text("1.0 few 2 10 20\n1.5 single 0 11 20\n2.0 single -1 12 21\n")
    book.read()
    report = check(book, [], contents(), contents())
    assert report.most_at_once == {"few": 3, "single": 2}
    assert report.wrong == [("", "more than 1 ran single at 2.00: container 12 of worker 21")]


def test_what_is_left_behind_is_seen(tmp_path: Path) -> None:
    after = contents(deployed=frozenset({"MESH_X"}), queued=(A,), unsettled=1, overdue=("KV_mesh_workers w",))
    assert wrong(story(tmp_path), after) == [
        "left behind: MESH_X",
        "gone: MESH_CALLS",
        "should have ended by itself: KV_mesh_workers w",
        "is still queued",
        "consumers still know of 1 inputs",
    ]


def test_the_longest_stall_is_told(tmp_path: Path) -> None:
    book = story(tmp_path)
    results = {A: Ended(State.SUCCEEDED, "14", 90.0, "w")}
    report = check(book, [], contents(), contents(results=results))
    assert report.longest_stall == 90.0
    assert report.wrong == [("", "for 90.0 s nothing ended, while calls were under way")]


def test_the_shares_of_the_kinds_add_up() -> None:
    assert sum(kind.share for kind in KINDS.values()) == 400


def test_nothing_is_left_of_an_environment_that_never_was() -> None:
    assert left_over("no-such-environment") == []
