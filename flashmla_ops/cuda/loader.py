"""Registering the CUDA implementations, and one launcher a device with the kernels that have been built."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cutlass_kernels.attention import libraries as attention_libraries
from cutlass_kernels.attention.config import Config
from cutlass_kernels.build import libraries
from cutlass_kernels.gemm import abi, heuristics
from cutlass_kernels.gemm.catalogue import kernels
from cutlass_kernels.gemm.choose import Choice
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda import append, attention, driver, gemm, prefill, states
from flashmla_ops.cuda.driver import Grid, Launch, Values
from flashmla_ops.cuda.engine import Engine
from flashmla_ops.cuda.launch import Launcher
from flashmla_ops.ops._library import LIBRARY

#: Operators whose kernels CUTLASS generated: the function, and what runs it on a device.
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "gemm": gemm.gemm,
    "bmm": gemm.bmm,
    "grouped_gemm": gemm.grouped_gemm,
}
#: Operators of `cutlass_kernels.attention`.
ATTENTION: dict[str, Callable[..., Any]] = {
    "decode": attention.decode,
    "decode_up": attention.decode_up,
    "sparse_decode": attention.sparse_decode,
    "prefill": prefill.prefill,
    "append_": append.append,
    "append_.two": append.append_two,
    "merge_states": states.merge_states,
    "decode_schedule": states.decode_schedule,
}
#: What serves each operator on CUDA.
OPERATORS = dict.fromkeys(PRODUCTS, "CUTLASS or torch") | dict.fromkeys(ATTENTION, "CuTe DSL") | {"prefill": "torch"}


@cache
def load() -> bool:
    """Register the operators for CUDA if torch sees a device; whether it did."""
    if not torch.cuda.is_available():
        return False
    for functions, by in ((PRODUCTS, launcher), (ATTENTION, engine)):
        for name, function in functions.items():
            LIBRARY.impl(name, partial(_on_device, function, by), "CUDA")
    return True


def _on_device(function: Callable[..., Any], by: Callable[[int], Any], first: Any, *rest: Any, **named: Any) -> Any:
    device = (first if isinstance(first, Tensor) else first[0]).device
    with torch.cuda.device(device):
        return function(by(device.index), first, *rest, **named)


def device_of(index: int) -> Device:
    """A CUDA device as kernels are chosen for it."""
    facts = torch.cuda.get_device_properties(index)
    # The most that a block may use, once it asks for it. The attribute is there in builds for CUDA only.
    shared_memory = getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)
    return Device((facts.major, facts.minor), facts.multi_processor_count, shared_memory)


@cache
def launcher(index: int) -> Launcher:
    """The launcher of a CUDA device. Kernels are looked up once: build them before the first call."""
    found = {config: built.library for config in kernels() if (built := libraries.find(config))}

    @cache
    def kernel(config: Any) -> abi.Kernel:
        return abi.load(config, found[config])

    where = torch.device("cuda", index)
    return Launcher(
        where, device_of(index), frozenset(found), kernel, lambda: torch.cuda.current_stream(where).cuda_stream
    )


@cache
def engine(index: int) -> Engine:
    """What runs the attention kernels of a CUDA device. They are loaded as they are used, and built if they are not."""
    where = torch.device("cuda", index)

    def stream() -> int:
        return torch.cuda.current_stream(where).cuda_stream

    def prepare(config: Config, grid: Grid, values: Values) -> Launch:
        return driver.function(index, config).prepare(grid, values, stream)

    return Engine(device_of(index), prepare)


def explain() -> list[str]:
    """The implementations that run on CUDA, and why, a line each."""
    built = [config for config in kernels() if libraries.find(config)]
    counts = ", ".join(f"{sum(c.arch == arch for c in built)} for {arch}" for arch in ("sm_80", "sm_90a"))
    version = heuristics.version()
    by = f"nvidia-matmul-heuristics {version}" if version else "a table (nvidia-matmul-heuristics is not installed)"
    compiler = "installed" if attention_libraries.can_build() else "not installed: pip install 'flashmla-ops[cuda]'"
    lines = [f"CuTe DSL    compiles attention kernels at first use; {attention_libraries.DSL} is {compiler}"]
    lines += [f"CUTLASS     {len(built)} of {len(kernels())} kernels are built ({counts}); chosen by {by}"]
    if not torch.cuda.is_available():
        return [*lines, "CUDA        no device: nothing runs there"]
    for index in range(torch.cuda.device_count()):
        lines.append(f"CUDA        {torch.cuda.get_device_name(index)}")
        for problem, choice in launcher(index).chosen.items():
            what = f"{choice.config.name}, splits {choice.splits}" if isinstance(choice, Choice) else "torch"
            size = f"{problem.m}x{problem.n}x{problem.k} batch {problem.batch} {problem.epilogue.name}"
            lines.append(f"  {problem.family} {size}: {what} ({choice.reason})")
        lines += [f"  {call}: {served}" for call, served in engine(index).chosen.items()]
    return lines
