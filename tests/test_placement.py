"""Which functions fit a worker, and what containers take of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh import machine
from mesh.exception import InvalidError
from mesh.labels import lacking, parse_gpu, parse_labels
from mesh.placement import Offer, Size, unfit
from mesh.records import Code, FunctionRecord
from mesh.spec import FunctionSpec


def reason(offered: dict[str, str], by_value: str, options: dict[str, Any]) -> str:
    """Why a worker with 4 cores, 1,000 MiB and these labels does not run a function with these options."""
    spec = FunctionSpec(name="f", **options)
    code = Code(pickled=b"x", python=by_value) if by_value else Code(module="m", name="f")
    record = FunctionRecord(app="shop", spec=spec, code=code, version="1")
    size = Size(containers=8, cpus=4, memory=1000)
    return unfit(record, spec, Offer(worker="w1", python="3.12", size=size, labels=offered))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, ""),
        ({"cpu": 4.0, "memory": 1000}, ""),
        ({"cpu": 4.5}, "shop.f needs 4.5 cores; worker w1 offers 4 (--cpus)"),
        ({"memory": 2000}, "shop.f needs 2,000 MiB of memory; worker w1 offers 1,000 (--memory)"),
        ({"by_value": "3.12"}, ""),
        ({"by_value": "3.11"}, "shop.f was deployed by value from Python 3.11, and can only run there; worker w1 has"),
        ({"gpu": "l4"}, "shop.f needs the label gpu=l4, which worker w1 does not have (--label)"),
        ({"gpu": "l4", "labels_": {"gpu": "l4"}}, ""),
        ({"gpu": "l4", "labels_": {"gpu": "L4"}}, ""),
        ({"gpu": "any", "labels_": {"gpu": "h100"}}, ""),
        ({"gpu": "any"}, "the label gpu=any"),
        ({"gpu": "a10g,l4", "labels_": {"gpu": "l4"}}, ""),
        ({"gpu": "a10g,h100", "labels_": {"gpu": "l4"}}, "the label gpu=a10g or the label gpu=h100"),
        ({"gpu": "l4:2", "labels_": {"gpu": "l4"}}, "the label gpu=l4 with gpu.count=2 or more"),
        ({"gpu": "l4:2", "labels_": {"gpu": "l4", "gpu.count": "2"}}, ""),
        ({"gpu": "l4:2", "labels_": {"gpu": "l4", "gpu.count": "many"}}, "with gpu.count=2 or more"),
        ({"labels": {"zone": "a"}, "labels_": {"zone": "a", "disk": "fast"}}, ""),
        ({"labels": {"zone": "a"}, "labels_": {"zone": "b"}}, "shop.f needs the label zone=a"),
    ],
)
def test_a_worker_says_why_a_function_does_not_fit(options: dict[str, Any], text: str) -> None:
    given = dict(options)
    found = reason(given.pop("labels_", {}), given.pop("by_value", ""), given)
    assert found.startswith(text) or text in found
    assert bool(found) == bool(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        ([], None),
        ("L4", "l4"),
        ("l4:1", "l4"),
        ("H100!", "h100"),
        ("A100-80GB:8", "a100-80gb:8"),
        (["l4", "A10G:2"], "l4,a10g:2"),
        ("l4, a10g", "l4,a10g"),
    ],
)
def test_gpus_are_written_in_one_way(value: object, text: str | None) -> None:
    assert parse_gpu(value) == text
    assert parse_gpu(text) == text


@pytest.mark.parametrize("value", ["", "l4:0", "l4:x", 4, ["l4", None], "two words"])
def test_what_names_no_gpu_is_refused(value: object) -> None:
    with pytest.raises(InvalidError, match="gpu"):
        parse_gpu(value)


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ("gpu=l4,zone=a", {"gpu": "l4", "zone": "a"}),
        (["gpu=l4", " zone = a "], {"gpu": "l4", "zone": "a"}),
        ({"gpu": "l4"}, {"gpu": "l4"}),
        ("", {}),
        ("path=a=b", None),
        ("gpu", None),
        (4, None),
        ({"gpu": 4}, None),
    ],
)
def test_labels_of_settings(value: object, labels: dict[str, str] | None) -> None:
    if labels is None:
        with pytest.raises(ValueError, match=r"must be|not allowed"):
            parse_labels(value)
    else:
        assert parse_labels(value) == labels


def test_a_label_is_looked_for_before_a_gpu() -> None:
    assert lacking("l4", {"zone": "a"}, {}) == "the label zone=a"


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_what_a_container_does_not_claim_is_not_looked_at() -> None:
    plain, heavy = Size.of(FunctionSpec(name="f")), Size.of(FunctionSpec(name="f", cpu=2, memory=64))
    assert plain == Size(containers=1)
    assert plain.fits(Size(containers=1, cpus=-1, memory=-5))  # those that wait have lent theirs
    assert heavy.fits(Size(containers=1, cpus=2, memory=64))
    assert not heavy.fits(Size(containers=0, cpus=2, memory=64))
    assert not heavy.fits(Size(containers=1, cpus=1.9, memory=64))
    assert not heavy.fits(Size(containers=1, cpus=2, memory=63))


def test_many_small_claims_add_up_to_the_whole() -> None:
    tenth = Size.of(FunctionSpec(name="f", cpu=0.1))
    taken = Size()
    for _ in range(9):
        taken += tenth
    assert tenth.fits(Size(containers=10, cpus=1.0) - taken)
    assert not tenth.fits(Size(containers=10, cpus=1.0) - taken - tenth)


def test_only_what_is_lacking_helps() -> None:
    wanted, small, plain = Size(containers=1, cpus=4), Size(containers=1, cpus=1), Size(containers=1)
    short_of_cores = Size(containers=3, cpus=2)
    assert small.eases(wanted, short_of_cores)
    assert not plain.eases(wanted, short_of_cores)
    assert plain.eases(wanted, Size(containers=0, cpus=4))


# --- the machine -----------------------------------------------------------------------------------------------------


def test_the_machine_says_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:        8388608 kB\nMemFree:  1 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    bound = machine.cores()
    assert bound >= 1
    assert machine.memory() == 8192
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (machine.cores(), machine.memory()) == (0.5, 8192)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text(f"{512 << 20}\n")
    assert (machine.cores(), machine.memory()) == (bound, 512)


def test_the_machine_says_what_it_has_under_old_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    for path, text in (
        ("cpu/cpu.cfs_quota_us", "25000"),
        ("cpu/cpu.cfs_period_us", "100000"),
        ("memory/memory.limit_in_bytes", str(64 << 20)),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")
    assert (machine.cores(), machine.memory()) == (0.25, 64)
