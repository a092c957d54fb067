"""The implementations that run here, and why: one table, read by `explain`, the command line and the demo."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from flashmla_ops import cpu, cuda
from flashmla_ops.cpu import allocator
from flashmla_ops.footprint import decode_footprint, prefill_footprint

LEVELS = (1, 2, 3)
OPERATORS = (
    "decode",
    "decode_up",
    "sparse_decode",
    "sparse_prefill",
    "attend_masked",
    "page_mass",
    "choose_pages",
    "summarize_",
    "decode_schedule",
    "append_",
    "merge_states",
    "prefill",
    "decode_backward",
    "decode_up_backward",
    "prefill_backward",
    "sparse_prefill_backward",
    "sparse_decode_backward",
    "gemm",
    "bmm",
    "grouped_gemm",
)

_ISA_NOTES = {
    "avx512_bf16": "16 lanes; bf16 products by vdpbf16ps (slower than fp32 on Intel), fp32 and fp16 in fp32",
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
    """The CPU implementations, fastest first on this processor. Exactly one is active."""
    state = cpu.STATE
    isas = [*state.isas.items(), (cpu.REFERENCE, True)]
    return [Implementation(name, usable, name == state.active, _ISA_NOTES[name]) for name, usable in isas]


def operators() -> dict[str, str]:
    """The implementation of each operator on the CPU, by name, from torch's dispatcher."""

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


def memory() -> list[str]:
    """Peak intermediate bytes by level (see `flashmla_ops.footprint`), one line a case; none without C++ kernels."""
    if not cpu.STATE.path:
        return []
    cases = {
        "decode, 1 x 4096 tokens, 128 heads of 576 / 512, bf16": [
            decode_footprint(1, 128, 4096, levels=n) for n in LEVELS
        ],
        "prefill, 2048 tokens, 16 heads of 192 / 128, bf16": [prefill_footprint(2048, 16, levels=n) for n in LEVELS],
    }
    lines = ["memory      peak of intermediate results at levels 1 / 2 / 3, MB (in it scores):"]
    for name, levels in cases.items():
        figures = " / ".join(f"{level.total / 1e6:.2f} ({level.scores / 1e6:.2f})" for level in levels)
        lines.append(f"     {name}: {figures}")
    return lines


def explain() -> str:
    """Which implementation runs, and why, as text."""
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
        elsewhere = f"CUDA {cuda.OPERATORS[name]}, " if name in cuda.OPERATORS else ""
        lines.append(f"operator    {name:<16} CPU {served}; {elsewhere}other devices {cpu.REFERENCE}")
    lines.append(f"allocator   {allocator.explain()}")
    return "\n".join([*lines, *memory(), *cuda.explain()])
