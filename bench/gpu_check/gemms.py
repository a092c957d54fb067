"""How fast each kernel of the catalogue is, beside torch's own product of the same size and the limits of the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu_check import limits
from bench.gpu_check.report import Report, Row, one_paragraph
from bench.gpu_check.timing import interleaved
from cutlass_kernels.build import libraries
from cutlass_kernels.errors import CutlassKernelsError
from cutlass_kernels.gemm import abi
from cutlass_kernels.gemm.catalogue import kernels
from cutlass_kernels.gemm.config import BYTES, GemmConfig
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda.launch import Kernel, gemm_call, grouped_gemm_call

SECTION = "gemm"
#: Rows of a: a decode step of one sequence and of many, and a prefill.
ROWS = (16, 128, 4096)
#: n and k of a layer, and of a head (the batched family: W_UK of 128 heads).
LAYER, HEAD, HEADS, GROUPS = (4096, 7168), (512, 128), 128, 8
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "f32": torch.float32,
    "s8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
}
#: Bytes of operands that calls rotate over, so that they come from memory and not from L2.
COLD = 512 << 20


@dataclass(frozen=True)
class Size:
    """A product: a [batch, m, k] times batch weights; a grouped kernel has `GROUPS` of them for the rows of one a."""

    config: GemmConfig
    m: int
    n: int
    k: int
    batch: int = 1

    @classmethod
    def of(cls, config: GemmConfig, m: int) -> Size:
        return cls(config, m, *HEAD, HEADS) if config.family == "batched" else cls(config, m, *LAYER)

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.batch

    @property
    def moved_bytes(self) -> int:
        """Every operand read once, and the result written."""
        weights = GROUPS if self.config.family == "grouped" else self.batch
        elements = (self.batch * self.m * self.k, weights * self.n * self.k, self.batch * self.m * self.n)
        types = (self.config.a, self.config.weight, self.config.d)
        return sum(count * BYTES[name] for count, name in zip(elements, types, strict=True))

    def operands(self, device: str) -> tuple[Tensor, Tensor]:
        """a and weight, as the kernel's family has them."""
        lead = (self.batch,) if self.config.family == "batched" else ()
        groups = (GROUPS,) if self.config.family == "grouped" else lead
        rows = (self.k, self.n) if self.config.family == "batched" else (self.n, self.k)
        a = drawn(self.config.a, *lead, self.m, self.k, device=device)
        return a, drawn(self.config.weight, *groups, *rows, device=device)

    def bounds(self, device: str) -> Tensor:
        """Where groups of equal size begin, and the last one ends: [groups + 1] int32."""
        return torch.linspace(0, self.m, GROUPS + 1, device=device).to(torch.int32)


def check(report: Report, device: Device, measured: dict[str, float], reserve: float) -> None:
    """A row a kernel and size in section "gemm"."""
    built = {config: found for config in kernels() if device.runs(config.arch) and (found := libraries.find(config))}
    for config in report.until_late(SECTION, built, reserve):
        for m in ROWS:
            row: Row = {"name": config.name, "m": m}
            try:
                row |= time_one(abi.load(config, built[config].library), Size.of(config, m), measured)
            except (CutlassKernelsError, RuntimeError) as error:
                row |= {"state": "failed", "why": one_paragraph(error)}
            report.add(SECTION, row)
            torch.cuda.empty_cache()


def time_one(kernel: abi.Kernel, size: Size, measured: dict[str, float]) -> Row:
    copies = max(1, min(16, COLD // size.moved_bytes))

    def stream() -> int:
        return torch.cuda.current_stream().cuda_stream

    calls: dict[str, Callable[[], object]] = {
        "ours": rotating([launch(kernel, size, "cuda", stream) for _ in range(copies)])
    }
    if (peer := peer_of(size.config)) is not None:
        calls["torch"] = rotating([peer(size, "cuda") for _ in range(copies)])
    timed = interleaved(calls)
    ours = timed["ours"]
    least, binding = limits.bound(size.flops, size.moved_bytes, size.config.a, measured)
    row: Row = {"n": size.n, "k": size.k, "batch": size.batch, "us": ours.seconds * 1e6, "spread": ours.spread}
    row |= {"tflops": size.flops / ours.seconds / 1e12, "of_limit": least / ours.seconds, "limit": binding}
    if one_by_one := [name for name, found in timed.items() if not found.graph]:
        row["without_graph"] = one_by_one
    if "torch" in timed:
        row |= {"torch_us": timed["torch"].seconds * 1e6, "times_torch": timed["torch"].seconds / ours.seconds}
    return row


def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """The calls in turn."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def drawn(name: str, *shape: int, device: str) -> Tensor:
    """Random elements of a type by its short name."""
    if name == "s8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    return torch.randn(*shape, device=device).to(TYPES[name])


def launch(kernel: Kernel, size: Size, device: str, stream: Callable[[], int]) -> Callable[[], Tensor]:
    """A call of the kernel on operands of its own, as `flashmla_ops.cuda` makes it; it returns d.

    ``stream``: asked at every call, since a capture in a graph has another one.
    """
    config, epilogue = size.config, size.config.epilogue
    a, weight = size.operands(device)
    d = torch.empty(*a.shape[:-1], size.n, dtype=TYPES[config.d], device=device)
    kept = [a, weight, d]  # a launch holds addresses alone
    call: abi.Call
    if config.family == "grouped":
        kept.append(size.bounds(device))
        call = grouped_gemm_call(a, weight, kept[-1], d)
    else:
        c = drawn(config.d, *d.shape, device=device) if epilogue.gate or epilogue.residual else None
        bias = drawn(config.d, size.n, device=device) if epilogue.bias else None
        scale = torch.rand(size.n, device=device) if epilogue.col_scale else None
        rows = torch.rand(size.m, device=device) if epilogue.row_scale else None
        call = gemm_call(a, weight, d, c, bias, scale)
        call.row_scale = None if rows is None else rows.data_ptr()
        kept += [tensor for tensor in (c, bias, scale, rows) if tensor is not None]
    if needed := kernel.workspace(call):
        kept.append(torch.empty(needed, dtype=torch.uint8, device=device))
        call.workspace, call.workspace_bytes = kept[-1].data_ptr(), needed

    def run() -> Tensor:
        kernel.run(call, stream())
        return kept[2]

    return run


Peer = Callable[[Size, str], Callable[[], object]]


def peer_of(config: GemmConfig) -> Peer | None:
    """The maker of torch's own product of such operands, without what the epilogue adds; None where it has none."""
    if config.family == "grouped":
        return grouped if config.a == "bf16" else None
    if config.family == "batched":
        return batched
    return {"s8": integers, "e4m3": eighths}.get(config.a, linear) if config.a == config.weight else None


def linear(size: Size, device: str) -> Callable[[], object]:
    a, weight = size.operands(device)
    return lambda: torch.nn.functional.linear(a, weight)


def batched(size: Size, device: str) -> Callable[[], object]:
    a, weight = size.operands(device)
    return lambda: torch.bmm(a, weight)


def grouped(size: Size, device: str) -> Callable[[], object]:
    a, weight = size.operands(device)
    ends = size.bounds(device)[1:]
    product: Any = torch._grouped_mm
    return lambda: product(a, weight.mT, offs=ends)


def integers(size: Size, device: str) -> Callable[[], object]:
    a, weight = replace(size, m=max(size.m, 17)).operands(device)  # _int_mm takes no fewer rows
    return lambda: torch._int_mm(a, weight.t())


def eighths(size: Size, device: str) -> Callable[[], object]:
    a, weight = size.operands(device)
    one, product = torch.ones((), device=device), torch._scaled_mm
    return lambda: product(a, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
