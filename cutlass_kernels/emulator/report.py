"""A launch leaves a report: hazards, counters, and the synchronising instructions that it executed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cutlass_kernels.emulator.options import Site

Result = TypeVar("Result")


@dataclass(frozen=True)
class Hazard:
    """Something that a device need not punish, but that makes the result depend on luck.

    ``kind``: "race" (two warps, or a warp and an asynchronous copy, touch one word of shared memory without an order
    between them), "uninitialised" (the use of a value that nobody wrote to memory), "in flight" (an access to shared
    memory that an unfinished copy writes or an unfinished matrix product reads, or to such a product's registers),
    "proxy" (the asynchronous proxy reads what the generic proxy wrote without fence.proxy.async), "unwaited"
    (asynchronous work still pending when its thread exits).
    ``count`` lanes or words took part over the whole launch.
    """

    kind: str
    detail: str
    line: int
    text: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} ({self.count}x; PTX line {self.line}: {self.text.strip()})"


@dataclass
class Counters:
    """The cost of a launch that no machine changes.

    ``instructions``: warp instructions by class ("integer", "float", "convert", "move", "predicate", "control",
    "memory", "shuffle", "tensor", "async", "barrier"), predicated-off ones included, as an issue slot is spent on them.
    ``global_bytes_*`` what lanes asked for; ``global_sectors_*`` the 32-byte sectors that each warp touched.
    ``shared_wavefronts`` the passes that the 32 banks need; ``shared_ideal`` the passes without any conflict.
    ``mma`` multiply-adds of tensor-core instructions; ``async_bytes`` moved by bulk and tensor copies.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    global_bytes_read: int = 0
    global_bytes_written: int = 0
    global_sectors_read: int = 0
    global_sectors_written: int = 0
    shared_wavefronts: int = 0
    shared_ideal: int = 0
    async_bytes: int = 0
    mma: int = 0

    @property
    def bank_conflicts(self) -> int:
        """Passes over shared memory beyond the ideal."""
        return self.shared_wavefronts - self.shared_ideal


@dataclass(frozen=True)
class LaunchReport:
    """One kernel launch. ``shared_bytes``: static and dynamic, a CTA. ``sites``: synchronisation executed."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    hazards: tuple[Hazard, ...]
    counters: Counters
    sites: tuple[Site, ...]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Report(Generic[Result]):
    """The return value of `run`: the caller's result and a report of every launch, in order."""

    result: Result
    launches: tuple[LaunchReport, ...]

    @property
    def hazards(self) -> tuple[Hazard, ...]:
        """The hazards of all launches."""
        return tuple(hazard for launch in self.launches for hazard in launch.hazards)
