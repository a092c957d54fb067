"""nvidia-matmul-heuristics (its import name is nvMatmulHeuristics): NVIDIA's estimate of the best tile, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import Any

from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.gemm.problem import Device, Problem

PACKAGE = "nvidia-matmul-heuristics"
#: By compute capability: the device that it models, its name for a generation of kernels, and ours.
MODELS = {(8, 0): ("A100_SXM_80GB", "CUTLASS", "sm_80"), (9, 0): ("H100_SXM", "CUTLASS3", "sm_90a")}
#: Suggestions to look through: ours are the tiles of the catalogue, not all that it knows.
COUNT = 32
#: Its letters for the types of a product: a and weight, sums, d.
PRECISIONS = {("bf16", "bf16"): "TST", ("fp16", "fp16"): "HSH"}


def version() -> str | None:
    """Its version; None if it is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


@cache
def _interface(capability: tuple[int, int]) -> tuple[Any, Any, Any]:
    """The module, its interface and its description of kernels, for a device. Loading takes a tenth of a second."""
    import nvMatmulHeuristics as module

    gpu, target, _ = MODELS[capability]
    kind = module.NvMatmulHeuristicsTarget[target]
    interface = module.NvMatmulHeuristicsInterfaceEx(
        backend=kind,
        flags=module.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
        load_discovery_implicitly=True,
        gpu=module.NvMatmulHeuristicsNvidiaGpu[gpu],
    )
    return module, interface, interface.createBackend(kind)


def suggest(problem: Problem, device: Device, fitting: Sequence[GemmConfig]) -> tuple[GemmConfig, int] | None:
    """The first of its suggestions that is among ``fitting`` kernels, and its splits of k. None: no opinion."""
    types = PRECISIONS.get((problem.a, problem.weight))
    plain = problem.d == problem.a and problem.family != "grouped"
    if version() is None or types is None or not plain or device.capability not in MODELS:
        return None
    module, interface, backend = _interface(device.capability)
    native = [config for config in fitting if config.arch == MODELS[device.capability][2]]
    # TN: both operands have k along their rows. NN would be a's rows along k and the weight's along n.
    layout = "NN_ROW_MAJOR" if problem.family == "batched" else "TN_ROW_MAJOR"
    described = interface.makeNvMatmulHeuristicsProblem(
        problem.m, problem.n, problem.k, module.NvMatmulHeuristicsMatmulLayout[layout], problem.batch
    )
    for suggestion in interface.getEx(described, COUNT, backend, precision=types):
        kernel = suggestion["kernel"]
        tile = (kernel.cta_tile_m, kernel.cta_tile_n, kernel.cta_tile_k)
        cluster = (kernel.cluster_m, kernel.cluster_n, 1)
        for config in native:
            splits = kernel.split_k if config.splits and problem.batch == 1 else 1
            same = config.tile == tile and (config.arch == "sm_80" or config.cluster == cluster)
            if same and not config.stream_k and splits == kernel.split_k:
                return config, splits
    return None
