"""Made-up machines and runs for the tests of the bench."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from bench import limits, runner, timing

#: Samples of a 3 GHz machine with 32-byte vectors: at most 192 GFLOP/s on two threads.
USUAL: limits.Samples = {
    "hz": [3e9],
    "fp32_flops": [190e9],
    "l2_read": [200e9],
    "l3_read": [100e9],
    "dram_read": [40e9],
    "dram_read_prefetched": [38e9],
    "dram_read_streams": [39e9],
}


def printed(samples: limits.Samples) -> str:
    return json.dumps({"vector_bytes": 32, "threads": 2, "dram_bytes": 1, "samples": samples})


def output(**samples: list[float]) -> str:
    """The measuring program's output on all limits."""
    return printed(USUAL | samples)


def dram(*samples: float) -> limits.Samples:
    """DRAM samples; all ways to read but the plain one are slower."""
    return {name: [sample * (1.0 if name == "dram_read" else 0.9) for sample in samples] for name in limits.DRAM}


def fail() -> torch.Tensor:
    raise RuntimeError("this build has no such kernel\nand a long story")


def small_run(
    monkeypatch: pytest.MonkeyPatch, wrong: bool = False, dram_reads: Sequence[float] = (40e9,)
) -> dict[str, Any]:
    """A run of one case for each of ``dram_reads``, the bytes/s of DRAM beside it."""
    expected = torch.ones(2, 4, dtype=torch.float64)
    ours = expected * (2 if wrong else 1)
    work = runner.Work(
        title="tiny",
        case={"b": 1, "h_q": 2, "s_kv": 3, "dtype": "fp32"},
        flops=1e3,
        bytes=1e3,
        dtype=torch.float32,
        tolerance=1e-3,
    )
    calls = {runner.OURS: lambda: ours, "peer": lambda: expected, "broken": fail}
    beside = 0.0

    def problems() -> Iterator[runner.Problem]:
        nonlocal beside
        for speed in dram_reads:
            beside = speed
            yield runner.Problem(work, calls, {"other": "not installed"}, expected)

    monkeypatch.setattr(
        limits.LimitMeter, "run_program", lambda self, seconds, names: printed(dram(beside)) if names else output()
    )
    budget = timing.Budget(block_seconds=0.0, clean_blocks=2, seconds=0.0, min_blocks=2)
    with limits.LimitMeter(threads=2) as meter:
        return runner.run("decode", problems(), budget, meter)
