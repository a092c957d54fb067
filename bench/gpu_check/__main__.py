"""``python -m bench.gpu_check``: see the package's docstring, or ``--help``."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch

from bench.gpu_check import attention, caches, gemms, kernels, limits, operators, pack, steps
from bench.gpu_check.report import Report, Row, file_name, table
from bench.report import RESULTS
from bench.runner import commit
from cutlass_kernels.build import libraries
from cutlass_kernels.errors import CutlassKernelsError
from cutlass_kernels.gemm.catalogue import kernels as catalogue
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda.loader import device_of

#: Seconds of the whole check, and by then what must be left for the steps that follow.
SECONDS = 540.0
AFTER_BUILD, AFTER_CORRECTNESS, AFTER_CACHES, AFTER_ATTENTION, AFTER_OPERATORS = 300.0, 260.0, 240.0, 220.0, 130.0
AFTER_SPEED, AFTER_TIMES = 60.0, 5.0
#: Seconds without a row after which a step is taken to hang.
PATIENCE = 60.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="Check CUDA kernels on a device.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"end after this long ({SECONDS:.0f})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the JSON")
    parser.set_defaults(folder=None)
    commands = parser.add_subparsers(dest="action")
    packed = commands.add_parser("pack", help="put what a machine without a network needs into a folder")
    packed.add_argument("folder", type=Path)
    packed.add_argument("--arch", action="append", choices=("sm_80", "sm_90a"), help="only kernels for it")
    return parser.parse_args(arguments)


def facts(index: int) -> Row:
    """The device, and what runs on it."""
    found = torch.cuda.get_device_properties(index)
    return {
        "suite": "gpu_check",
        "commit": os.environ.get("FLASHMLA_COMMIT") or commit(),
        "command": "python -m bench.gpu_check",
        "date": time.strftime("%Y-%m-%d"),
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def build_carried(report: Report, device: Device) -> None:
    """Compile what was carried as source, large tiles first: they take longest.

    A kernel that does not build is a row, and no end.
    """
    folder = pack.carried_sources()
    if folder is None:
        return
    wanted = [
        config
        for config in catalogue()
        if device.runs(config.arch) and libraries.find(config) is None and (folder / f"{config.name}.cu").is_file()
    ]
    wanted.sort(key=lambda config: math.prod(config.tile), reverse=True)
    started, stop = time.monotonic(), report.deadline - AFTER_BUILD
    try:
        sources = libraries.Sources.carried(folder)
        libraries.build(wanted, sources=sources, enough=lambda: time.monotonic() > stop)
    except CutlassKernelsError as error:
        for line in str(error).splitlines():
            report.add("build", {"name": line[:300], "state": "failed"})
    count = sum(libraries.find(config) is not None for config in wanted)
    report.add("build", {"name": "built", "value": count, "of": len(wanted), "seconds": time.monotonic() - started})


def run(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(f"no device: torch {torch.__version__} sees no CUDA device, so nothing was checked and nothing written")
        return 0
    deadline = time.monotonic() + arguments.seconds
    known = facts(torch.cuda.current_device())
    report = Report(arguments.out / file_name(known["device"]), deadline, known)
    device = device_of(torch.cuda.current_device())
    build_carried(report, device)
    steps.run(report, PATIENCE, kernels.check, device, AFTER_CORRECTNESS)
    steps.run(report, PATIENCE, caches.check, "cuda", AFTER_CACHES)
    steps.run(report, PATIENCE, attention.check, AFTER_ATTENTION)
    steps.run(report, PATIENCE, operators.check, "cuda", AFTER_OPERATORS)
    steps.run(report, PATIENCE, limits.measure)
    steps.run(report, PATIENCE, attention.speed, limits.measured(report), AFTER_SPEED)
    steps.run(report, PATIENCE, gemms.check, device, limits.measured(report), AFTER_TIMES)
    print(f"\n{known['device']}, torch {known['torch']}, CUDA {known['cuda']}\n{table(report)}\nwritten: {report.path}")
    return 1 if report.failures else 0


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.action == "pack":
        return pack.pack(chosen.folder, chosen.arch)
    return run(chosen)


if __name__ == "__main__":
    sys.exit(main())
