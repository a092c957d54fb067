"""Mutation testing of a kernel's synchronisation: leave out one wait, barrier, arrival or fence at a time.

Two barriers with nothing between them stand in for one another: neither is missed alone. So the instructions that are
not missed alone are then left out one on top of the other, as long as nothing is noticed. What remains undetected is a
set that can be left out all at once; either it is redundant for this call's shapes, which the caller argues, or a check
is missing.
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
    """One instruction left out. ``detected`` says by what: an error's name, "hazard: kind", "wrong result", or None.

    ``beside``: the instructions that were left out with it, because they stand in for it.
    """

    site: Site
    detected: str | None
    beside: frozenset[Site] = frozenset()


@dataclass(frozen=True)
class Survey:
    """The mutants of one call."""

    mutants: tuple[Mutant, ...]

    @property
    def detection(self) -> float:
        """The fraction of mutants that was noticed; 1.0 where nothing synchronises."""
        found = sum(mutant.detected is not None for mutant in self.mutants)
        return found / len(self.mutants) if self.mutants else 1.0

    @property
    def undetected(self) -> tuple[Site, ...]:
        """The instructions that nothing missed, not even all of them at once."""
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
    """Run ``call`` once for each synchronising instruction that it executes, without that instruction; see `survey`."""

    def attempt(chosen: Options) -> Report[Result]:
        return run(library, call, arch=arch, options=chosen, memory=memory, ptx=ptx)

    return survey(attempt, accept, options=options, landings=landings)


def survey(
    attempt: Callable[[Options], Report[Result]],
    accept: Callable[[Result], bool],
    *,
    options: Options | None = None,
    landings: Sequence[Landing] = ("late", "early"),
    kernel: str | None = None,
) -> Survey:
    """What is noticed of the instructions of ``kernel`` (None: of all) that ``attempt`` executes, each left out.

    ``accept`` judges a result. Each mutant runs under each of ``landings`` until it is noticed. Raises `NotClean` if
    the unchanged kernel is not accepted or shows hazards under one of them.
    """
    base = options or Options()
    sites: set[Site] = set()
    for landing in landings:
        report = attempt(dataclasses.replace(base, landing=landing))
        if report.hazards:
            raise NotClean(f"with landing {landing!r}: {report.hazards[0]}")
        if not accept(report.result):
            raise NotClean(f"with landing {landing!r} the result is rejected")
        sites.update(site for launch in report.launches for site in launch.sites if kernel in (None, site.kernel))

    def judge(*left_out: Site) -> str | None:
        for landing in landings:
            try:
                report = attempt(dataclasses.replace(base, landing=landing, drop=frozenset(left_out)))
            except Exception as error:  # Also what ``attempt`` raises on a result that makes no sense to it.
                return type(error).__name__
            if report.hazards:
                return f"hazard: {report.hazards[0].kind}"
            if not accept(report.result):
                return "wrong result"
        return None

    alone = [Mutant(site, judge(site)) for site in sorted(sites)]
    spare: frozenset[Site] = frozenset()
    mutants = []
    for mutant in alone:
        if mutant.detected is None and spare:
            mutant = Mutant(mutant.site, judge(mutant.site, *spare), spare)
        if mutant.detected is None:
            spare |= {mutant.site}
        mutants.append(mutant)
    return Survey(tuple(mutants))
