"""Every kernel of the catalogue on the device: each case of the emulator's verification against float64."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu_check.report import Report, Row, one_paragraph
from cutlass_kernels import verify
from cutlass_kernels.build import libraries
from cutlass_kernels.build.libraries import Built
from cutlass_kernels.gemm import abi
from cutlass_kernels.gemm.catalogue import kernels
from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.gemm.problem import Device
from cutlass_kernels.verify import run
from cutlass_kernels.verify.cases import Case, cases_of

SECTION = "correctness"


class Array:
    """Bytes in the device's memory, as `cutlass_kernels.verify.run` asks for them."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.dtype, self.shape = values.dtype, values.shape
        self.memory = torch.from_numpy(np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy()).cuda()

    @property
    def pointer(self) -> int:
        return self.memory.data_ptr()

    def numpy(self) -> NDArray[Any]:
        """Waits for the device."""
        return np.asarray(self.memory.cpu().numpy().view(self.dtype).reshape(self.shape))


class Memory:
    """The device's memory in the terms of the emulator's."""

    def array(self, values: NDArray[Any]) -> Array:
        return Array(values)

    def empty(self, size: int) -> Array:
        return Array(np.full(size, 0xFF, np.uint8))  # a NaN in every floating format


def check(report: Report, device: Device, reserve: float) -> None:
    """A row a kernel in section "correctness"."""
    for config in report.until_late(SECTION, kernels(), reserve):
        report.add(SECTION, check_one(config, device, report, reserve))


def check_one(config: GemmConfig, device: Device, report: Report, reserve: float) -> Row:
    row: Row = {"name": config.name, "state": "left out"}
    if not device.runs(config.arch):
        return row | {"why": f"for {config.arch}, this device is {'.'.join(map(str, device.capability))}"}
    built = libraries.find(config)
    if built is None:
        return row | {"why": "not built"}
    started = time.monotonic()
    wrong: list[str] = []
    worst, done = 0.0, 0
    for case in cases_of(config):
        if report.late(reserve):
            break
        try:
            ratio, fault = run_case(built, case)
        except (RuntimeError, OSError, ValueError) as error:
            return row | {"state": "failed", "why": f"{case}: {one_paragraph(error)}"}
        done, worst = done + 1, max(worst, ratio)
        wrong += [fault] if fault else []
    facts = {"cases": done, "error_over_bound": worst, "seconds": time.monotonic() - started}
    return row | {"state": "failed" if wrong else "passed", **facts, "why": "; ".join(wrong)}


def run_case(built: Built, case: Case) -> tuple[float, str]:
    """The largest error over its bound, and what is wrong; empty if nothing is."""
    problem = verify.problem.build(built.config, case)
    result = run.launch(Memory(), abi.load(built.config, built.library), problem)
    torch.cuda.synchronize()
    mismatches, ratio = problem.mismatches(result)
    return ratio, f"{case}: {mismatches} of {result.size} elements, {ratio:.3g} of the bound" if mismatches else ""
