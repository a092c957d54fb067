"""From tensors to a kernel of `cutlass_kernels`: the problem, the choice, the call in C, the workspace, the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cutlass_kernels.gemm.abi import Call, GemmCall, GroupedGemmCall
from cutlass_kernels.gemm.choose import Choice, Fallback, choose
from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.gemm.problem import Device, Problem

#: Short names of `cutlass_kernels.gemm.config`.
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "f32", torch.int8: "s8"}


class Kernel(Protocol):
    """`cutlass_kernels.gemm.abi.Kernel`, or what stands in for it in a test."""

    def refuses(self, call: Call) -> str | None: ...

    def workspace(self, call: Call) -> int: ...

    def run(self, call: Call, stream: int) -> None: ...


@dataclass
class Launcher:
    """Runs problems on one device. ``chosen`` remembers the last choice for each problem, for `explain`."""

    where: torch.device
    device: Device
    built: frozenset[GemmConfig]
    kernel: Callable[[GemmConfig], Kernel]
    stream: Callable[[], int]
    chosen: dict[Problem, Choice | Fallback] = field(default_factory=dict)

    def choose(self, problem: Problem) -> Choice | Fallback:
        choice = choose(problem, self.device, self.built)
        self.remember(problem, choice)
        return choice

    def remember(self, problem: Problem, choice: Choice | Fallback) -> None:
        """Problems differ by their number of rows; a thousand say enough."""
        if len(self.chosen) < 1000 or problem in self.chosen:
            self.chosen[problem] = choice

    def launch(self, problem: Problem, call: Call) -> bool:
        """Run it, or say no: then torch's operators have to."""
        choice = self.choose(problem)
        if isinstance(choice, Fallback):
            return False
        if isinstance(call, GemmCall):
            call.splits = choice.splits
        kernel = self.kernel(choice.config)
        if reason := kernel.refuses(call):  # addresses and strides that are not multiples of 16 bytes
            self.remember(problem, Fallback(f"{choice.config.name}: {reason}"))
            return False
        if needed := kernel.workspace(call):
            # The caching allocator hands out memory in stream order: it may be released while the kernel still runs.
            place = torch.empty(needed, dtype=torch.uint8, device=self.where)
            call.workspace, call.workspace_bytes = place.data_ptr(), needed
        kernel.run(call, self.stream())
        return True


def gemm_call(
    a: Tensor,  # [m, k] or [batch, m, k]
    weight: Tensor,  # [n, k] or [batch, n, k]; [batch, k, n] for the batched family
    out: Tensor,  # [m, n] or [batch, m, n]
    c: Tensor | None = None,  # as out
    bias: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> GemmCall:
    """Sizes, addresses and strides of one launch. The tensors must outlive it; rows are contiguous."""
    call = GemmCall(alpha=1.0, beta=0.0 if c is None else 1.0, splits=1)
    call.batch = a.size(0) if a.dim() == 3 else 1
    call.m, call.k, call.n = a.size(-2), a.size(-1), out.size(-1)
    for name, tensor in (("a", a), ("weight", weight), ("c", c), ("d", out)):
        if tensor is None:
            continue
        setattr(call, name, tensor.data_ptr())
        getattr(call, f"{name}_stride")[:] = (tensor.stride(-2), tensor.stride(0) if tensor.dim() == 3 else 0)
    call.bias = None if bias is None else bias.data_ptr()
    call.col_scale = None if col_scale is None else col_scale.data_ptr()
    return call


def grouped_gemm_call(a: Tensor, weight: Tensor, offsets: Tensor, out: Tensor) -> GroupedGemmCall:
    """a [rows, k], weight [groups, n, k], offsets [groups + 1] int32, out [rows, n]."""
    call = GroupedGemmCall(alpha=1.0)
    call.rows = a.size(0)
    call.groups, call.n, call.k = weight.shape
    call.a, call.weight, call.d = a.data_ptr(), weight.data_ptr(), out.data_ptr()
    call.a_stride, call.d_stride, call.offsets = a.stride(0), out.stride(0), offsets.data_ptr()
    call.weight_stride[:] = (weight.stride(1), weight.stride(0))
    return call
