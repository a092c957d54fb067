"""Mutation testing of a kernel's synchronisation: leave out one wait, barrier, arrival or fence at a time.

A mutant that behaves like the kernel means that the emulator (with this call's shapes) cannot tell whether the
instruction is needed. It may be redundant: the caller argues so for each, or finds the check that is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cutlass_kernels.emulator.errors import EmulatorError
from cutlass_kernels.emulator.options import Landing, Options, Site
from cutlass_kernels.emulator.report import Report
from cutlass_kernels.emulator.runner import Call, run

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mutant:
    """One instruction left out. ``detected`` says by what: an error's name, "hazard: kind", "wrong result", or None."""

    site: Site
    detected: str | None


@dataclass(frozen=True)
class Survey:
    """The mutants of one call.

    ``together`` says how leaving out all undetected instructions at once was noticed: then they stand in for one
    another (two barriers with nothing between them), and only one of them is redundant.
    """

    mutants: tuple[Mutant, ...]
    together: str | None

    @property
    def detection(self) -> float:
        """The fraction of mutants that was noticed; 1.0 where nothing synchronises."""
        found = sum(mutant.detected is not None for mutant in self.mutants)
        return found / len(self.mutants) if self.mutants else 1.0

    @property
    def undetected(self) -> tuple[Site, ...]:
        """The instructions that nothing missed."""
        return tuple(mutant.site for mutant in self.mutants if mutant.detected is None)


class NotClean(EmulatorError):
    """The kernel itself is rejected, so that its mutants say nothing."""


def mutate(
    library: str | Path,
    call: Call[Result],
    accept: Callable[[Result], bool],
    *,
    arch: str = "sm_80",
    options: Options | None = None,
    memory: int = 1 << 26,
    landings: Sequence[Landing] = ("late", "early"),
    ptx: str | None = None,
) -> Survey:
    """Run ``call`` once for each synchronising instruction that it executes, without that instruction.

    ``accept`` judges a result. Each mutant runs under each of ``landings`` until it is noticed. Raises `NotClean` if
    the unchanged kernel is not accepted or shows hazards under one of them.
    """
    base = options or Options()

    def attempt(landing: Landing, drop: frozenset[Site]) -> Report[Result]:
        chosen = dataclasses.replace(base, landing=landing, drop=drop)
        return run(library, call, arch=arch, options=chosen, memory=memory, ptx=ptx)

    sites: set[Site] = set()
    for landing in landings:
        report = attempt(landing, frozenset())
        if report.hazards:
            raise NotClean(f"with landing {landing!r}: {report.hazards[0]}")
        if not accept(report.result):
            raise NotClean(f"with landing {landing!r} the result is rejected")
        sites.update(site for launch in report.launches for site in launch.sites)

    def judge(*left_out: Site) -> str | None:
        for landing in landings:
            try:
                report = attempt(landing, frozenset(left_out))
            except EmulatorError as error:
                return type(error).__name__
            if report.hazards:
                return f"hazard: {report.hazards[0].kind}"
            if not accept(report.result):
                return "wrong result"
        return None

    mutants = tuple(Mutant(site, judge(site)) for site in sorted(sites))
    undetected = [mutant.site for mutant in mutants if mutant.detected is None]
    return Survey(mutants, judge(*undetected) if len(undetected) > 1 else None)
