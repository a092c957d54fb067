"""What runs here, and why: one table of implementations, read by `explain`, the command line and the demo."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from flashmla_ops import cpu, cuda

OPERATORS = ("decode", "decode_schedule", "append_", "merge_states", "prefill", "gemm", "bmm", "grouped_gemm")

_ISA_NOTES = {
    "avx512_bf16": "16 lanes; bf16 products by vdpbf16ps, fp32 and fp16 in fp32",
    "avx512": "16 lanes; all types in fp32",
    "avx2": "8 lanes; all types in fp32",
    "generic": "the compiler's own vectors, any processor; all types in fp32",
    "emulated": "the avx512_bf16 layouts on the compiler's own vectors; for tests, never chosen by itself",
    "reference": "float64 in torch; the definition, and what runs without a compiler",
}


@dataclass(frozen=True)
class Implementation:
    """One way to run the operators on the CPU."""

    name: str
    available: bool
    active: bool
    note: str


def implementations() -> list[Implementation]:
    """The CPU implementations, fastest first. Exactly one is active."""
    state = cpu.STATE
    isas = [*state.isas.items(), (cpu.REFERENCE, True)]
    return [Implementation(name, usable, name == state.active, _ISA_NOTES[name]) for name, usable in isas]


def operators() -> dict[str, str]:
    """What serves each operator on the CPU, as torch's dispatcher has it."""

    def has_kernel(name: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"flashmla::{name}", "CPU")

    return {name: cpu.STATE.active if has_kernel(name) else cpu.REFERENCE for name in OPERATORS}


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def explain() -> str:
    """What runs, and why, as text."""
    state = cpu.STATE
    lines = [
        f"processor   {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        f"CPU kernels {state.active}: {state.reason}",
        f"binding     {state.binding}" + (f" ({state.path})" if state.path else ""),
    ]
    for choice in implementations():
        mark = "->" if choice.active else "  " if choice.available else " x"
        lines.append(
            f"  {mark} {choice.name:<12} {choice.note}" + ("" if choice.available else " (not on this processor)")
        )
    for name, served in operators().items():
        elsewhere = "CUDA CUTLASS or torch, " if name in cuda.OPERATORS else ""
        lines.append(f"operator    {name:<16} CPU {served}; {elsewhere}other devices {cpu.REFERENCE}")
    return "\n".join([*lines, *cuda.explain()])
