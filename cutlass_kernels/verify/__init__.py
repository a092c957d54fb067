"""Run built kernels in `cutlass_kernels.emulator` and compare them with float64. Nothing here speaks of hardware."""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from cutlass_kernels import emulator
from cutlass_kernels.build import libraries
from cutlass_kernels.build.libraries import Built
from cutlass_kernels.build.toolchain import nvcc
from cutlass_kernels.errors import CallError
from cutlass_kernels.gemm import abi, cppgen
from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.verify import report
from cutlass_kernels.verify.cases import Case, cases_of, mutation_cases
from cutlass_kernels.verify.problem import Problem
from cutlass_kernels.verify.problem import build as build_problem
from cutlass_kernels.verify.report import KernelResult
from cutlass_kernels.verify.run import Array, Outcome, execute, in_a_thread, launch


def landings(config: GemmConfig) -> tuple[emulator.Landing, ...]:
    """The timings of asynchronous work that a kernel is run under.

    Stream-K blocks spin on flags in memory until others have added their sums. "late" lets a TMA copy land only once
    nothing else can run, which never comes while a block spins: the emulator cannot show that timing.
    """
    return ("early",) if config.stream_k and config.arch == "sm_90a" else ("late", "early")


def verify(built: Built, cases: Sequence[Case] | None = None, *, mutations: bool = False) -> KernelResult:
    """Every case of a kernel, eager and lazy. What the emulator cannot do is a result too: "not run", and why."""
    config = built.config
    facts: dict[str, Any] = {
        "name": config.name,
        "arch": config.arch,
        "compile_seconds": built.seconds,
        "registers": max(entry.registers for entry in built.report.entries),
    }
    outcomes: list[Outcome] = []
    exact = 0
    for case in cases_of(config) if cases is None else cases:
        problem = build_problem(config, case)
        for landing in landings(config):
            try:
                outcome = execute(built, problem, emulator.Options(landing=landing))
            except emulator.UnsupportedInstruction as error:
                return KernelResult(**facts, state="not run", why=f"{case}: {error}", cases=len(outcomes))
            except (emulator.EmulatorError, CallError) as error:
                why = f"{case}, {landing}: {type(error).__name__}: {error}"
                return KernelResult(**facts, state="wrong", why=why, cases=len(outcomes))
            outcomes.append(outcome)
            exact += problem.exact and outcome.mismatches == 0
            if not outcome.good:
                state = "wrong" if outcome.mismatches else "hazards"
                why = f"{case}, {landing}: {outcome.mismatches} mismatches; {'; '.join(outcome.hazards)}"
                return _summary(facts, outcomes, exact, state, why)
    result = _summary(facts, outcomes, exact, "verified", "")
    return _mutated(built, result) if mutations else result


def _summary(facts: dict[str, Any], outcomes: list[Outcome], exact: int, state: str, why: str) -> KernelResult:
    return KernelResult(
        **facts,
        state=state,
        why=why,
        cases=len(outcomes),
        exact=exact,
        error_over_bound=round(max(outcome.error_over_bound for outcome in outcomes), 4),
        hazards=sum(len(outcome.hazards) for outcome in outcomes),
        seconds=round(sum(outcome.seconds for outcome in outcomes), 2),
        counters=outcomes[-1].counters,
    )


def _mutated(built: Built, result: KernelResult) -> KernelResult:
    problems = [build_problem(built.config, case) for case in mutation_cases(built.config)]
    mutants = list(survey_of(built, problems).mutants)
    left, runs = _redundant(built, [mutant.site for mutant in mutants if mutant.detected is None])
    return replace(
        result,
        mutants=len(mutants),
        detected=len(mutants) - len(left),
        undetected=[f"line {site.line}: {site.text.strip()}" for site in left],
        without_undetected=runs,
    )


def _redundant(built: Built, sites: Sequence[emulator.Site]) -> tuple[list[emulator.Site], int]:
    """Those of ``sites`` that no case of the kernel misses, all left out at once; and how many runs say so."""
    left, runs = list(sites), 0
    for case in cases_of(built.config) if left else ():
        problem = build_problem(built.config, case)
        for landing in landings(built.config):
            while left and not _passes(built, problem, landing, left):
                # One that is missed beside those before it; if that took them too, they stand in for it.
                left.remove(
                    next(site for i, site in enumerate(left) if not _passes(built, problem, landing, left[: i + 1]))
                )
            runs += 1
    return left, runs


def _passes(built: Built, problem: Problem, landing: emulator.Landing, drop: Sequence[emulator.Site]) -> bool:
    try:
        return execute(built, problem, emulator.Options(landing=landing, drop=frozenset(drop))).good
    except (emulator.EmulatorError, CallError):
        return False


def survey_of(built: Built, problems: Sequence[Problem]) -> emulator.Survey:
    """Drop each wait, barrier, arrival and fence that the problems execute, one at a time."""

    def call(device: emulator.Device, library: ctypes.CDLL) -> list[Array]:
        kernel = abi.Kernel(built.config, library)
        return in_a_thread(lambda: [launch(device, kernel, problem) for problem in problems])

    def accept(results: list[Array]) -> bool:
        return all(problem.mismatches(result)[0] == 0 for problem, result in zip(problems, results, strict=True))

    return emulator.mutate(built.library, call, accept, arch=built.config.arch, landings=landings(built.config))


def command(
    configs: Iterable[GemmConfig], *, jobs: int | None, results: Path | None, document: Path | None, mutations: bool
) -> int:
    """The command line: build, verify in processes of their own, print, and write. 1 unless all are verified."""
    built = libraries.build(configs, jobs=jobs)
    found: list[KernelResult] = []
    # Fresh processes: the mock CUDA runtime must come before any other that this process may have loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        tasks = [pool.submit(verify, each, mutations=mutations) for each in built]
        for done, task in enumerate(as_completed(tasks), 1):
            result = task.result()
            found.append(result)
            error = f"error {result.error_over_bound:.2f} of the bound, {result.seconds:.1f} s"
            print(f"{done}/{len(tasks)} {result.name}: {result.state}, {result.cases} cases, {error} {result.why}")
            sys.stdout.flush()
            if results:
                report.write(results, found, {"nvcc": nvcc().release, "cutlass": cppgen.version()})
    if results and document:
        report.update(document, report.load(results))
    return 0 if all(result.state == "verified" for result in found) else 1
