"""Runs problems: times every implementation in turns, checks every result, measures the limits in between.

The bytes/s that DRAM can be read with are measured between the turns too: that of a case is what was measured there.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import footprints, occupancy, peers, programs
from bench.limits import LimitMeter, Limits, Samples, add, dram_read_of
from bench.timing import Budget, Timing, interleave, stolen
from flashmla_ops import capability

ROOT = Path(__file__).parent.parent
OURS = "flashmla"
SCHEMA = 1  # of the JSON


@dataclass(frozen=True)
class Work:
    """One case, and how much work it is."""

    title: str
    case: Mapping[str, Any]
    flops: float
    bytes: float  # what must be read from memory at least once; with flops 0 too, nothing limits the case
    dtype: torch.dtype
    tolerance: float  # largest `row_error`


@dataclass(frozen=True)
class Problem:
    """One case made concrete: what to call and what must come out."""

    work: Work
    calls: Mapping[str, Callable[[], Any]]  # a tensor each, or what `read` takes
    skipped: Mapping[str, str]  # implementations that cannot run here, with the reason
    expected: Tensor  # float64
    #: The part of a result that is compared with ``expected``; not timed.
    read: Callable[[Any], Tensor] = lambda result: result
    #: The expected results of implementations that compute something else, for comparison: float64, by name.
    others: Mapping[str, Tensor] = field(default_factory=dict)
    #: Whether threads wait for cores by design, those of processes that answer each other: wall time counts then.
    crowded: bool = False

    def error(self, name: str, result: Any) -> float:
        """The error of an implementation's result."""
        return row_error(self.read(result), self.others.get(name, self.expected))


@dataclass(frozen=True)
class Solved:
    """A case's timings and the largest error that each implementation showed while it was timed. Holds no tensor."""

    work: Work
    timings: Mapping[str, Timing]
    errors: Mapping[str, float]
    skipped: Mapping[str, str]  # the problem's, and implementations that failed
    dram_read: float  # bytes/s, measured beside the case

    def correct(self, name: str) -> bool:
        return self.errors[name] <= self.work.tolerance


def row_error(result: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row (last dimension), in the Euclidean norm; infinite if a result is NaN."""
    if result.shape != expected.shape:
        return float("inf")
    difference = (result.double() - expected).norm(dim=-1)
    error = difference / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(error.nan_to_num(nan=float("inf")).max())


def solve(problem: Problem, budget: Budget, measure_dram: Callable[[], Samples]) -> Solved:
    """Time the implementations and check what they return. One that fails is skipped, unless it is ours."""
    errors: dict[str, float] = {}
    dram: Samples = {}
    skipped = dict(problem.skipped)

    def check(name: str, result: Any) -> None:
        errors[name] = max(errors.get(name, 0.0), problem.error(name, result))

    for name, call in problem.calls.items():  # compiles and allocates
        try:
            check(name, call())
        except Exception as error:
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {first_line(error)}"
    working = {name: call for name, call in problem.calls.items() if name not in skipped}
    if problem.crowded:
        budget = replace(budget, max_delay=float("inf"))
    timings = interleave(working, budget, check, lambda: add(dram, measure_dram()))
    return Solved(problem.work, timings, errors, skipped, dram_read_of(dram))


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def run(suite: str, problems: Iterable[Problem], budget: Budget, meter: LimitMeter) -> dict[str, Any]:
    """Solve every problem and return the results, ready for JSON."""
    started, stolen_before = time.perf_counter(), stolen()
    solved = []
    for problem in problems:
        meter.measure()
        solved.append(solve(problem, budget, meter.measure_dram))
        del problem  # its tensors, before the next case makes its own
        print(one_line(solved[-1], meter.limits()), flush=True)
    meter.measure()
    limits = meter.limits()
    elapsed = time.perf_counter() - started
    return {
        "schema": SCHEMA,
        "suite": suite,
        "command": command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "host": host(meter),
        "explain": capability.explain().replace(str(Path.home()), "~"),
        "limits": asdict(limits),
        "seconds": round(elapsed, 1),
        "stolen_share": round((stolen() - stolen_before) / (elapsed * (os.cpu_count() or 1)), 4),
        "footprints": footprints.of_suite(suite),
        "occupancy": occupancy.of_suite(suite),
        "programs": programs.of_suite(suite),
        "results": [as_dict(each, limits) for each in solved],
    }


def as_dict(solved: Solved, limits: Limits) -> dict[str, Any]:
    work = solved.work
    peak = limits.peak(work.dtype)
    return {
        "case": dict(work.case),
        "flops": work.flops,
        "bytes": work.bytes,
        "peak_flops": peak,
        "peak": limits.peak_name(work.dtype),
        "compute_limit": work.flops / peak,
        "dram_read": solved.dram_read,
        "memory_limit": work.bytes / solved.dram_read,
        "tolerance": work.tolerance,
        "timings": {
            name: {
                **timing.as_dict(),
                "fraction_of_peak": work.flops / timing.median / peak,
                "fraction_of_dram": work.bytes / timing.median / solved.dram_read,
                "error": solved.errors[name],
                "correct": solved.correct(name),
            }
            for name, timing in solved.timings.items()
        },
        "skipped": dict(solved.skipped),
    }


def one_line(solved: Solved, limits: Limits) -> str:
    """The progress line of a case: milliseconds of each implementation, ``~`` where CPU time stands in."""
    work = solved.work
    cells = []
    for name, timing in solved.timings.items():
        mark = ("" if timing.clean else "~") + ("" if solved.correct(name) else " WRONG")
        cells.append(f"{name} {timing.median * 1e3:.3f} ms{mark}")
    seconds = solved.timings[OURS].median
    peak, dram = work.flops / seconds / limits.peak(work.dtype), work.bytes / seconds / solved.dram_read
    shares = f" ({peak:.0%} of peak, {dram:.0%} of DRAM)" if work.flops else ""
    return f"{work.title}{shares}: " + ", ".join(cells)


def wrong(results: Mapping[str, Any], name: str = OURS) -> list[Mapping[str, Any]]:
    """The cases for which an implementation returned a wrong result."""
    return [r["case"] for r in results["results"] if not r["timings"][name]["correct"]]


def command() -> str:
    """The command that started this process, as a user would type it, with what chose the kernels."""
    chosen = [f"{name}={os.environ[name]}" for name in ("FLASHMLA_CPU", "ATEN_CPU_CAPABILITY") if name in os.environ]
    return shlex.join([*chosen, "python", *sys.orig_argv[1:]])


def commit() -> str:
    """The commit of the working tree, with ``-dirty`` if anything but results differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md", ":!docs")
    return (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    compiler = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True)
    return {
        "flashmla-ops": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": compiler.stdout.split("\n", 1)[0],
        "kernel": platform.release(),
        **peers.versions(),
    }


def host(meter: LimitMeter) -> dict[str, Any]:
    return {
        "cpu": meter.cpu.model,
        "microarchitecture": meter.cpu.microarchitecture,
        "features": meter.cpu.features,
        "instruction_set": meter.cpu.instruction_set[0],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": meter.threads,
        "l3_bytes": meter.cpu.l3_bytes,
    }


def file_name(results: Mapping[str, Any], *, quick: bool) -> str:
    """One file a suite, microarchitecture, instruction set and thread count: a new run replaces the old."""
    words = [results["suite"], results["host"]["microarchitecture"], results["host"]["instruction_set"]]
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    return f"{slug}-{results['host']['threads']}-threads" + ("-quick.json" if quick else ".json")
