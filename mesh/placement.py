"""Which functions a worker can run, and how much of it a container takes: decisions without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mesh.labels import lacking
from mesh.records import FunctionRecord, WorkerRecord
from mesh.spec import FunctionSpec

_ROUNDING = 1e-9  # of sums of cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What containers take of a worker, or what a worker has: containers, cores, and MiB of memory."""

    containers: int = 0
    cpus: float = 0.0
    memory: int = 0

    @classmethod
    def of(cls, spec: FunctionSpec) -> Self:
        """What one container of a function takes. One that says nothing of cores and memory claims none."""
        return cls(containers=1, cpus=spec.cpu or 0.0, memory=spec.memory or 0)

    @classmethod
    def free_at(cls, worker: WorkerRecord) -> Self:
        """What another worker has left, as far as it has said."""
        return cls(
            containers=worker.containers - worker.used,
            cpus=worker.cpus - worker.used_cpus,
            memory=worker.memory - worker.used_memory,
        )

    def __add__(self, other: Size) -> Size:
        return Size(
            containers=self.containers + other.containers,
            cpus=self.cpus + other.cpus,
            memory=self.memory + other.memory,
        )

    def __sub__(self, other: Size) -> Size:
        return Size(
            containers=self.containers - other.containers,
            cpus=self.cpus - other.cpus,
            memory=self.memory - other.memory,
        )

    def fits(self, free: Size) -> bool:
        """Whether there is room for it. What it does not claim is not looked at."""
        return (
            self.containers <= free.containers
            and (not self.cpus or self.cpus <= free.cpus + _ROUNDING)
            and (not self.memory or self.memory <= free.memory)
        )

    def times(self, free: Size) -> int:
        """How often there is room for it."""
        times = [free.containers // self.containers]
        if self.cpus:
            times.append(int((free.cpus + _ROUNDING) / self.cpus))
        if self.memory:
            times.append(free.memory // self.memory)
        return max(0, min(times))

    def eases(self, wanted: Size, free: Size) -> bool:
        """Whether `wanted`, which does not fit, comes nearer to it when this becomes free."""
        return (
            (wanted.containers > free.containers and self.containers > 0)
            or (wanted.cpus > free.cpus + _ROUNDING and self.cpus > 0)
            or (wanted.memory > free.memory and self.memory > 0)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a worker has to offer.

    Attributes:
        worker: its name. python: its minor version, such as `3.12`. labels: what it is said to have.
        pythons: minor versions that images may have, as far as that is seen without looking far.
    """

    worker: str
    python: str
    size: Size
    labels: Mapping[str, str]
    pythons: tuple[str, ...] = ()


def unfit(record: FunctionRecord, spec: FunctionSpec, offer: Offer) -> str:
    """Why a worker can never run a function with these options; empty if it can."""
    name = f"{record.app}.{record.spec.name}"
    python = (spec.image.python if spec.image else "") or offer.python
    if record.code.by_value and record.code.python != python:
        return (
            f"{name} was deployed by value from Python {record.code.python}, and can only run there; worker "
            f"{offer.worker} has Python {python}"
        )
    if spec.cpu and spec.cpu > offer.size.cpus + _ROUNDING:
        return f"{name} needs {spec.cpu:g} cores; worker {offer.worker} offers {offer.size.cpus:g} (--cpus)"
    if spec.memory and spec.memory > offer.size.memory:
        return (
            f"{name} needs {spec.memory:,} MiB of memory; worker {offer.worker} offers {offer.size.memory:,} (--memory)"
        )
    missing = lacking(spec.gpu, spec.labels, offer.labels)
    return f"{name} needs {missing}, which worker {offer.worker} does not have (--label)" if missing else ""
