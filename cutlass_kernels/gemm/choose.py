"""Which kernel runs a problem, and how it is split: nvidia-matmul-heuristics where it is installed, a model otherwise.

The model counts the clocks of the busiest multiprocessor: waves of tiles, times the longer of a tile's multiply-adds
and of its operands' way from L2. Rates are a multiprocessor's from NVIDIA's white papers (A100: 1024 fp16 multiply-adds
a clock, 64 bytes of L2 a clock; H100: 2048). It ranks tiles. Beside the times of an H100
(bench/results/gpu-check-*.json, k not split) what it takes is slower than the fastest kernel by 6 % in the mean of 78
problems, and by 74 % at worst: an L2 of 64 bytes a clock favours small tiles too much. Splits have not been timed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cutlass_kernels.gemm import heuristics
from cutlass_kernels.gemm.config import BYTES, GemmConfig
from cutlass_kernels.gemm.problem import Device, Problem

MULTIPLY_ADDS = {"sm_80": 1024, "sm_90a": 2048}  # of 2-byte elements, a clock and multiprocessor
L2_BYTES = 64
MOST_SPLITS = 8


@dataclass(frozen=True)
class Choice:
    config: GemmConfig
    splits: int
    reason: str


@dataclass(frozen=True)
class Fallback:
    """No kernel takes it; ``reason`` says why."""

    reason: str


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device, built: frozenset[GemmConfig]) -> Choice | Fallback:
    """The kernel among those built, or why none."""
    if not device.runs("sm_80"):
        return Fallback("kernels are for compute capability 8.0 and newer, this is {}.{}".format(*device.capability))
    fitting = [config for config in built if device.runs(config.arch) and _computes(config, problem)]
    if not fitting:
        kind = f"{problem.family} {problem.a} x {problem.weight} -> {problem.d}, epilogue {problem.epilogue.name}"
        return Fallback(f"no kernel is built for {kind} (python -m cutlass_kernels build)")
    aligned = [config for config in fitting if misshapen(config, problem) is None]
    if not aligned:
        return Fallback(str(misshapen(fitting[0], problem)))
    small = [config for config in aligned if config.shared_memory() <= device.shared_memory]
    if not small:
        return Fallback(f"every kernel needs more than {device.shared_memory} bytes of shared memory")
    # Newer machine code first, so that an even estimate goes to it; then by name, so that order never depends on a set.
    ordered = sorted(small, key=lambda config: (config.arch != "sm_90a", config.name))
    if suggested := heuristics.suggest(problem, device, ordered):
        return Choice(*suggested, reason=f"nvidia-matmul-heuristics {heuristics.version()}")
    options = [(config, splits) for config in ordered for splits in _splits(config, problem)]
    best = min(options, key=lambda option: clocks(option[0], option[1], problem, device))
    return Choice(*best, reason="the table of tiles, by a model of clocks")


def _computes(config: GemmConfig, problem: Problem) -> bool:
    """A linear kernel serves batches whose weight rows lie along k; the batched family those along n."""
    same = (config.a, config.weight, config.d) == (problem.a, problem.weight, problem.d)
    batch = problem.batch == 1 or config.batches
    return same and config.family == problem.family and config.epilogue == problem.epilogue and batch


def misshapen(config: GemmConfig, problem: Problem) -> str | None:
    """Why the extents do not divide into 16-byte pieces; None if they do."""
    step_k = config.alignment("a")
    step_n = config.alignment("d")
    if config.family == "batched":
        step_n = max(step_n, config.alignment("weight"))
    else:
        step_k = max(step_k, config.alignment("weight"))
    for name, size, step in (("k", problem.k, step_k), ("n", problem.n, step_n)):
        if size % step or size < 1:
            return f"{name} is {size}, and kernels move 16 bytes at a time: a multiple of {step} is needed"
    return None


def _splits(config: GemmConfig, problem: Problem) -> Iterable[int]:
    """Splits that leave every block at least two tiles of k."""
    most = MOST_SPLITS if config.splits and problem.batch == 1 else 1
    return [split for split in range(1, most + 1) if split == 1 or problem.k >= 2 * split * config.tile[2]]


def clocks(config: GemmConfig, splits: int, problem: Problem, device: Device) -> float:
    """The model: clocks of the busiest multiprocessor."""
    m, n, k = config.tile
    tiles = -(-problem.m // m) * -(-problem.n // n) * problem.batch * splits
    waves = tiles / device.multiprocessors  # stream-K: blocks share the last wave evenly
    if not config.stream_k or waves < 1:
        waves = float(-(-tiles // device.multiprocessors))
    depth = -(-problem.k // (splits * k)) * k
    rate = MULTIPLY_ADDS[config.arch] * 2 / BYTES[config.a]
    multiply = m * n * depth / rate
    load = (m * BYTES[config.a] + n * BYTES[config.weight]) * depth / L2_BYTES
    # Serial split-K: each block after the first reads and writes the tile that the one before it wrote. Stream-K: a
    # tile's float32 sums go once from one block to another.
    turns = (2 * splits - 1) * m * n * BYTES[config.d] / L2_BYTES
    turns += 2 * m * n * 4 / L2_BYTES if config.stream_k else 0
    return waves * max(multiply, load) + turns
