"""The limits of this machine, measured: peak FLOP/s by dtype and the read bandwidth of DRAM and of the caches.

The measuring program (`csrc/limits.cpp`) is compiled on the spot for the instruction sets in /proc/cpuinfo. It is run
again and again during a bench, so that limits and timings see the same machine; a limit is the median of all samples.
The speed of DRAM changes within a run. It is measured alone too, beside each case, whose limit is the median of those.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cpu import this_cpu

SOURCE = Path(__file__).parent / "csrc" / "limits.cpp"
MULTIPLY_ADDS_PER_CYCLE = 2  # no core issues more vector multiply-adds
L2_BYTES_PER_CYCLE = 64  # no core reads more from its L2 cache
HIGHEST_HZ = 8e9
SLACK = 1.1  # clocks move between two measurements
SMALLEST_DRAM_BUFFER = 256 << 20
DRAM_BUFFER_OF_L3 = 8  # a host may have more L3 than it shows
LARGEST_DRAM_BUFFER = 2 << 30
L3_SHARE = 2  # all threads together read 1 / L3_SHARE of the last-level cache
SMALLEST_L3_BUFFER = 4 << 20
#: The ways to read DRAM: plainly, with prefetches by software, and in four places at once.
DRAM = ("dram_read", "dram_read_prefetched", "dram_read_streams")

#: By name of the measurement, in Hz, FLOP/s and bytes/s.
Samples = dict[str, list[float]]


class LimitsError(RuntimeError):
    """The limits could not be measured: no compiler, or values that cannot be."""


@dataclass(frozen=True)
class Limits:
    """Medians over all threads together, in Hz (of one core), FLOP/s and bytes/s."""

    instruction_set: str
    threads: int
    hz: float
    fp32_flops: float
    bf16_flops: float | None  # vdpbf16ps, where the CPU has it
    l2_read: float
    l3_read: float
    dram_read: float

    def peak(self, dtype: torch.dtype) -> float:
        """The most FLOP/s that arithmetic on ``dtype`` can reach, accumulating in float32.

        bf16 can always be widened: on some processors float32 is faster than their bf16 instruction.
        """
        if dtype == torch.bfloat16 and self.bf16_flops is not None:
            return max(self.bf16_flops, self.fp32_flops)
        return self.fp32_flops

    def peak_name(self, dtype: torch.dtype) -> str:
        if dtype == torch.bfloat16 and self.bf16_flops is not None:
            return "vdpbf16ps"
        return f"fp32 multiply-add, {self.instruction_set}"


class LimitMeter:
    """Measures the machine's limits whenever asked, and knows the medians over all it has seen. A context manager."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.cpu = this_cpu()
        self.samples: Samples = {}
        self._folder = tempfile.TemporaryDirectory(prefix="flashmla-bench-")
        self._program = self._compile()

    def __enter__(self) -> LimitMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _compile(self) -> Path:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise LimitsError(f"the limits need a C++ compiler, and {compiler!r} is not there (set CXX)")
        program = Path(self._folder.name) / "limits"
        options = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", *self.cpu.instruction_set[1]]
        done = subprocess.run([compiler, *options, SOURCE, "-o", program], capture_output=True, text=True)
        if done.returncode != 0:
            raise LimitsError(f"{SOURCE.name} does not compile:\n{done.stderr}")
        return program

    def measure(self, seconds: float = 0.12) -> None:
        """Take samples of every limit, ``seconds`` for each."""
        self._take(seconds)

    def measure_dram(self, seconds: float = 0.03) -> Samples:
        """Take samples of the DRAM read speed alone, ``seconds`` for each way to read, and return them too."""
        return self._take(seconds, DRAM)

    def _take(self, seconds: float, names: Sequence[str] = ()) -> Samples:
        hz = max(self.samples.get("hz", [HIGHEST_HZ]))
        taken = parse_output(self.run_program(seconds, names), self.threads, hz)
        add(self.samples, taken)
        return taken

    def run_program(self, seconds: float, names: Sequence[str]) -> str:
        """Run the measuring program for the measurements named, or for all if none is; the text that it printed."""
        buffer = min(max(SMALLEST_DRAM_BUFFER, DRAM_BUFFER_OF_L3 * self.cpu.l3_bytes), LARGEST_DRAM_BUFFER)
        shared = max(SMALLEST_L3_BUFFER, self.cpu.l3_bytes // (L3_SHARE * self.threads))
        # Not our environment's OpenMP settings: here threads should wait for each other without sleeping.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        done = subprocess.run(
            [self._program, str(self.threads), str(buffer), str(shared), str(seconds), *names],
            capture_output=True,
            text=True,
            env=environment | {"OMP_WAIT_POLICY": "active", "OMP_DYNAMIC": "false"},
        )
        if done.returncode != 0:
            raise LimitsError(f"measuring the limits failed: {done.stderr.strip()}")
        return done.stdout

    def limits(self) -> Limits:
        return limits_of(self.samples, self.cpu.instruction_set[0], self.threads)


def add(samples: Samples, more: Mapping[str, Sequence[float]]) -> None:
    for name, values in more.items():
        samples.setdefault(name, []).extend(values)


def parse_output(text: str, threads: int, hz: float = HIGHEST_HZ) -> Samples:
    """The samples that the measuring program printed, without those that no machine can show.

    ``hz``, the frequency of a core, counts if the program did not measure it.
    """
    output: Mapping[str, Any] = json.loads(text)
    samples: Samples = output["samples"]
    if "hz" in samples:
        hz = max(possible("hz", samples["hz"], HIGHEST_HZ))
    cycles = hz * threads * SLACK
    fp32 = cycles * MULTIPLY_ADDS_PER_CYCLE * 2 * output["vector_bytes"] / 4
    bounds = {"hz": HIGHEST_HZ, "fp32_flops": fp32, "bf16_flops": 2 * fp32}
    # Memory behind a core's L2 comes through it. (Not the L2 samples beside: other load may have hit those alone.)
    memory = ("l2_read", "l3_read", *DRAM)
    bounds |= dict.fromkeys(memory, cycles * L2_BYTES_PER_CYCLE)
    return {name: possible(name, samples[name], bound) for name, bound in bounds.items() if name in samples}


def possible(name: str, samples: Sequence[float], bound: float) -> list[float]:
    """The samples in (0, ``bound``]; raises `LimitsError` if that is less than half of them."""
    kept = [sample for sample in samples if 0 < sample <= bound]
    if not samples or len(kept) * 2 < len(samples):
        raise LimitsError(f"{name}: {len(samples) - len(kept)} of {len(samples)} samples lie outside (0, {bound:.3g}]")
    return kept


def limits_of(samples: Mapping[str, Sequence[float]], instruction_set: str, threads: int) -> Limits:
    """The medians of all samples."""
    median = {name: statistics.median(values) for name, values in samples.items()}
    return Limits(
        instruction_set=instruction_set,
        threads=threads,
        hz=median["hz"],
        fp32_flops=median["fp32_flops"],
        bf16_flops=median.get("bf16_flops"),
        l2_read=median["l2_read"],
        l3_read=median["l3_read"],
        dram_read=dram_read_of(samples),
    )


def dram_read_of(samples: Mapping[str, Sequence[float]]) -> float:
    """Bytes/s: the fastest of the ways to read DRAM, by their medians."""
    return max(statistics.median(samples[name]) for name in DRAM)
