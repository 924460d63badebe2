"""The bench beside other queues: what it makes of values, and that it measures at all."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.support import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from peers import chaos, figures, report, summary
from peers.client import Client, check, quantiles
from peers.peer import Failed, Peer
from peers.results import Results
from peers.roster import ROSTER, contestants
from peers.stage import Broken, stage

KEPT = ROOT / "docs" / "benchmarks.json"
RUN = {
    "cpu": "2 × a processor",
    "load": "0.1 0.1 0.1",
    "python": "3.11.7",
    "commit": "abc",
    "date": "2026-11-24",
    "rounds": 3,
    "sizes": {"submit": 0.5, "rate": 1.0, "round_trip": 0.6, "open_loop": 0.6},
    "minutes": 2.0,
}


def results(file: Path, **more: Any) -> Results:
    """Three rounds of mesh, Huey and RQ: mesh is ahead of both end to end, and behind Huey in round trips."""
    made = Results(file, runs=[RUN], versions={"mesh": "1", "huey": "2", "rq": "3"}, **more)
    for key, rate, trip in (("mesh/second", 3000.0, 1.2), ("huey/second", 2000.0, 0.9), ("rq/second", 300.0, 4.0)):
        for off in (0.9, 1.0, 1.1):
            made.add(key, {"end to end": rate * off, "round trip p50": trip * off, "knee": 500.0})
            made.add(key, {f"open p99 at {rate}": trip * rate / 100 for rate in (200, 500)})
        made.rounds[key] = {"end_to_end": 3, "round_trip": 3, "open_loop": 3}
        made.chaos[key] = {
            "accepted": 240,
            "refused": 0,
            "lost": 0 if key.startswith("mesh") else 2,
            "doubled": 1,
            "wait": 1,
        }
    return made


# --- what is made of values ------------------------------------------------------------------------------------------


def test_results_are_the_same_after_they_were_kept(tmp_path: Path) -> None:
    made = results(tmp_path / "kept.json", missing={"dask/second": "does not install: no"})
    made.save()
    assert Results.load(tmp_path / "kept.json") == made


def test_values_become_a_median_with_its_range() -> None:
    assert summary.spread([3.0, 1.0, 2.0]) == summary.Spread(2.0, 1.0, 3.0)
    assert quantiles([float(n) for n in range(1, 101)]) == {"p50": 51.0, "p95": 96.0, "p99": 100.0, "count": 100}


def test_who_is_ahead_depends_on_what_is_better(tmp_path: Path) -> None:
    made = results(tmp_path / "kept.json")
    assert summary.ahead(made, "second", "end to end") == []
    assert [entry.name for entry, _ in summary.ahead(made, "second", "round trip p50")] == ["huey"]
    assert summary.ahead(made, "second", "knee") == [], "level is not ahead"
    assert summary.ahead(made, "always", "end to end") == [], "nothing was measured"


def test_the_page_marks_what_is_ahead_and_says_why(tmp_path: Path) -> None:
    page = report.written(results(tmp_path / "kept.json"))
    [mesh, huey, rq] = [line for line in page.splitlines() if line.startswith(("| mesh (", "| Huey (", "| RQ ("))][:3]
    assert "▲" not in mesh + rq
    assert "0.90 ▲ (0.81–0.99)" in huey
    assert "- round trip p50, on disk within a second: Huey 0.90; mesh 1.20 ms" in page
    assert summary.FIGURE["round trip p50"].why in page
    assert summary.FIGURE["memory"].why not in page, "nobody is ahead in it"


def test_the_page_says_who_is_missing_and_what_broke(tmp_path: Path) -> None:
    made = results(
        tmp_path / "kept.json",
        missing={"procrastinate/second": "no postgres: apt-get install postgresql"},
        broken={"rq/second": {"big": "TimeoutError"}},
    )
    page = report.written(made)
    assert "- Procrastinate (synchronous_commit off) did not take part: no postgres: apt-get install postgresql" in page
    assert "- RQ (appendfsync everysec), big: TimeoutError" in page


def test_three_lines_say_where_mesh_is_ahead_and_where_not(tmp_path: Path) -> None:
    first, behind, killed = summary.three_lines(results(tmp_path / "kept.json"))
    assert first.startswith(
        "- Ahead of the 2 other queues measured: end to end (3,000 calls/s; Huey 2,000). Level with"
    )
    assert behind == "- Behind the best of them: round trip p50 (1.20 ms; Huey 0.90)."
    assert killed.endswith("mesh lost 0 of 240 calls and ran 1 twice; lost by others: Huey 2 and RQ 2.")


def test_pictures_are_well_formed(tmp_path: Path) -> None:
    drawn = report.pictures(results(tmp_path / "kept.json"))
    assert set(drawn) == {"benchmarks-bars.svg", "benchmarks-open-loop.svg"}
    for picture in drawn.values():
        texts = [element.text for element in ET.fromstring(picture).iter() if element.tag.endswith("text")]
        assert {"mesh", "Huey", "RQ"} <= set(texts)


@pytest.mark.skipif(not KEPT.exists(), reason="nothing was measured in this checkout")
def test_page_and_readme_are_what_the_results_make() -> None:
    """If not: `python3 dev bench --peers --report`."""
    kept = Results.load(KEPT)
    assert KEPT.with_suffix(".md").read_text() == report.written(kept)
    assert report.README.read_text() == report.with_lines(report.README.read_text(), kept)
    for name, picture in report.pictures(kept).items():
        assert KEPT.with_name(name).read_text() == picture


# --- what became of calls --------------------------------------------------------------------------------------------


def test_chaos_counts_what_was_lost_and_what_ran_twice() -> None:
    answer = {"accepted": {"0": 10.0, "1": 11.0, "2": 12.0}, "refused": 1, "lost": [2]}
    found = chaos.judged(answer, "0 10.5\n1 15.0\n1 11.5\n2 99.0\n7 1.0\n7 2.0\n")
    assert found == {"accepted": 3, "refused": 1, "lost": 1, "doubled": 1, "wait": 4.0}


def test_every_result_is_checked() -> None:
    check("failing", [100, 101], [Failed(), 101])
    with pytest.raises(ValueError, match="noop of '2' came to '3'"):
        check("noop", [1, 2], [1, 3])
    with pytest.raises(ValueError, match="failing of '100'"):
        check("failing", [100], [100])


class Echo(Peer):
    """A queue that runs calls at once, and gives every tenth result back wrong if it is told to."""

    def __init__(self, blocking: bool, wrong: bool = False) -> None:
        self.blocking = blocking
        self.wrong = wrong

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def submit(self, kind: str, value: Any) -> Any:
        return value

    async def result(self, handle: Any, timeout: float) -> Any:
        return -1 if self.wrong and handle % 10 == 0 else handle


@pytest.mark.parametrize("blocking", [True, False])
def test_the_client_measures_a_peer_of_either_kind(blocking: bool) -> None:
    client = Client(Echo(blocking))
    found = asyncio.run(client.open_loop(rate=200, seconds=0.1))
    assert found["count"] == 20
    assert 0 <= found["p50"] <= found["p95"] <= found["p99"]
    assert asyncio.run(client.rate("noop", 0.01))["total"] >= 40
    with pytest.raises(ValueError, match="came to '-1'"):
        asyncio.run(Client(Echo(blocking, wrong=True)).open_loop(rate=1000, seconds=0.05))


# --- who takes part --------------------------------------------------------------------------------------------------


def test_every_peer_has_its_module_and_its_reasons() -> None:
    for entry in ROSTER:
        assert (ROOT / "bench" / "peers" / f"{entry.name}.py").exists()
        assert len(entry.workers(apart=True)) == 2
    kinds = {entry.name for entry in ROSTER}
    assert {one.entry.name for one in contestants([*kinds], ["always"])} == kinds - {"dask"}
    with pytest.raises(ValueError, match="no peer 'rabbit': there are mesh, raw"):
        contestants(["rabbit"], ["second"])


def ask(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command: Sequence[str | Path] = [sys.executable, ROOT / "bench" / "bench.py", "--peers", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_figure_that_is_not_there_is_refused() -> None:
    done = ask("--figures", "speed")
    assert done.returncode == 2
    assert f"no figure 'speed': there are {', '.join(figures.FIGURES)}" in done.stderr


def test_a_stage_has_server_workers_and_client_and_leaves_nothing() -> None:
    [raw] = contestants(["raw"], ["second"])
    with stage(raw, Path(sys.prefix)) as at:
        at.start_workers()
        found = at.ask(do="rate", kind="noop", seconds=0.02)
        assert found["rate"] > 0
        assert at.cpu()["workers"] > 0
        pids = [at.store.pid, at.client.pid, *(worker.pid for worker in at.workers)]
        with pytest.raises(Broken, match="TypeError"):  # what goes wrong in the client is told
            at.ask(do="rate", kind="noop", seconds="soon")
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.load
def test_a_small_run_measures_mesh_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.json"
    small = ["--only", "mesh,raw", "--durability", "second", "--scale", "0.2", "--results", file]
    first = ask(*small, "--rounds", "1", "--figures", "end_to_end,round_trip,failing,submit,chaos")
    assert first.returncode == 0, first.stderr
    values = json.loads(file.read_text())
    assert values["broken"] == {"mesh/second": {}, "raw/second": {}}
    assert set(values["values"]["mesh/second"]) > {"end to end", "round trip p50", "failing", "submit bulk", "memory"}
    assert values["chaos"]["mesh/second"]["lost"] == 0
    again = ask(*small, "--rounds", "2", "--figures", "end_to_end,cpu,chaos", "--resume")
    assert again.returncode == 0, again.stderr
    assert "chaos" not in again.stdout, "it was there already"
    values = json.loads(file.read_text())["values"]["mesh/second"]
    assert [len(values[name]) for name in ("end to end", "cpu kind", "failing")] == [2, 2, 1]
    assert "| mesh (`sync 1s`) |" in file.with_suffix(".md").read_text()
