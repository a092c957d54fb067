"""Run the attention kernels in `cutlass_kernels.emulator` and compare them with float64, as users can on any machine.

``python -m flashmla_ops verify`` needs the extra "cuda", which compiles kernels; no GPU and no nvcc. Each kernel runs
through the operators that it serves, in several calls, with copies that land as early and as late as they may. Nothing
here speaks of hardware.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cutlass_kernels import emulator
from cutlass_kernels.attention import libraries
from cutlass_kernels.attention.config import CallConfig, Config
from cutlass_kernels.attention.libraries import Built
from cutlass_kernels.errors import CutlassKernelsError
from flashmla_ops.cuda.catalogue import shipped
from flashmla_ops.cuda.verify import cost, report
from flashmla_ops.cuda.verify.emulated import Emulated, device
from flashmla_ops.cuda.verify.report import KernelResult
from flashmla_ops.cuda.verify.trials import Trial, counted, trials_of
from flashmla_ops.errors import BuildError

LANDINGS: tuple[emulator.Landing, ...] = ("late", "early")


def representatives(arch: str) -> list[Config]:
    """The first kernel of each kind: by its source, by what rows it reads, and the smallest and the largest blocks."""
    found: dict[tuple[object, ...], Config] = {}
    for config in shipped(arch):
        kind: tuple[object, ...] = (config.kind, bool(getattr(config, "codes", None)))
        if isinstance(config, CallConfig):
            kind += (config.source, config.second, config.rows)
        if getattr(config, "rows", 0) != 32:
            found.setdefault(kind, config)
    own = [config for config in found.values() if config.kind.endswith("sm90")]
    return own or [*found.values()]


LISTS = {"all": shipped, "representatives": representatives}


def run(arch: str, trial: Trial, options: emulator.Options) -> tuple[float, Emulated]:
    """One trial: the largest error over what is allowed. Raises `emulator.EmulatorError`."""
    emulated = Emulated(device(trial.multiprocessors, arch), options, arch, memory=1 << 26)
    return trial.run(emulated.engine), emulated


def verify(
    config: Config, arch: str, *, mutations: bool = False, trials: Sequence[Trial] | None = None
) -> KernelResult:
    """Every trial of a kernel, with each of `LANDINGS`. What is wrong is a result too."""
    built = libraries.build(config, arch)
    facts: dict[str, Any] = {"name": config.name, "arch": arch, "kind": config.kind}
    facts |= {"registers": built.registers, "stack_bytes": built.stack_bytes, "shared_bytes": config.shared_bytes}
    started, worst, runs = time.monotonic(), 0.0, 0
    for trial in trials_of(config) if trials is None else trials:
        for landing in LANDINGS:
            try:
                error, emulated = run(arch, trial, emulator.Options(landing=landing))
            except emulator.EmulatorError as raised:
                return _bad(facts, "wrong", f"{trial.name}, {landing}: {type(raised).__name__}: {raised}", runs)
            if config not in emulated.configs:
                return _bad(facts, "not run", f"{trial.name}: {emulated.configs or emulated.engine.chosen} ran", runs)
            if emulated.hazards:
                return _bad(facts, "hazards", f"{trial.name}, {landing}: {emulated.hazards[0]}", runs)
            if not error <= 1:
                return _bad(
                    facts, "wrong", f"{trial.name}, {landing}: an error of {error:.3g} of what is allowed", runs
                )
            worst, runs = max(worst, error), runs + 1
    result = KernelResult(**facts, state="verified", runs=runs, error=round(worst, 3), **_counted(config, built))
    result = replace(result, seconds=round(time.monotonic() - started, 1))
    return _mutated(config, built, result) if mutations else result


def _bad(facts: dict[str, Any], state: str, why: str, runs: int) -> KernelResult:
    return KernelResult(**facts, state=state, why=why, runs=runs)


def _counted(config: Config, built: Built) -> dict[str, Any]:
    if not isinstance(config, CallConfig):
        return {}
    _, emulated = run(built.arch, counted(config), emulator.Options(races=False))
    (counters,) = [launch.counters for launch in emulated.machine.launches if launch.kernel == built.entry]
    ratios = cost.ratios(config, counters)
    return {"ratios": ratios, "bounds": cost.bounds(config, built.arch, ratios["products"])}


def _mutated(config: Config, built: Built, result: KernelResult) -> KernelResult:
    found = survey_of(config, built, trials_of(config))
    return replace(
        result,
        mutants=len(found.mutants),
        detected=len(found.mutants) - len(found.undetected),
        undetected=[f"line {site.line}: {site.text.strip()}" for site in found.undetected],
    )


def survey_of(config: Config, built: Built, trials: Sequence[Trial]) -> emulator.Survey:
    """Drop each wait, barrier, arrival and fence of the kernel that the trials execute, one at a time."""

    def attempt(options: emulator.Options) -> emulator.Report[float]:
        worst, launches = 0.0, list[emulator.LaunchReport]()
        for trial in trials:
            error, emulated = run(built.arch, trial, options)
            worst, launches = max(worst, error), launches + emulated.machine.launches
            if options.drop and (emulated.hazards or not error <= 1):
                break  # noticed
        return emulator.Report(worst, tuple(launches))

    return emulator.survey(attempt, lambda worst: worst <= 1, landings=LANDINGS, kernel=built.entry)


def chosen(archs: Iterable[str], which: str, only: Sequence[str]) -> Iterator[tuple[Config, str]]:
    """The kernels that a command selects: of a list, those whose name has all of ``only``."""
    for arch in archs:
        yield from ((config, arch) for config in LISTS[which](arch) if all(part in config.name for part in only))


def command(
    wanted: Sequence[tuple[Config, str]], *, mutations: bool, results: Path | None, document: Path | None, jobs: int = 1
) -> int:
    """The command line: build, verify, print, and write. 1 unless all are verified.

    Raises `BuildError`.
    """
    if not wanted:
        raise BuildError("no kernel has all of these words in its name")
    try:
        libraries.build_all(wanted, jobs=jobs)
    except CutlassKernelsError as error:
        raise BuildError(str(error)) from error
    found: list[KernelResult] = []
    for done, (config, arch) in enumerate(wanted, 1):
        result = verify(config, arch, mutations=mutations)
        found.append(result)
        print(f"{done}/{len(wanted)} {result}", flush=True)
        if results:
            report.write(results, found, libraries.DSL)
    if results and document:
        document.write_text(report.page(report.load(results)))
    return 0 if all(result.state == "verified" for result in found) else 1
