"""Inductor's custom-op autotuning for the products: our kernels against torch's operators, timed per shape.

Torch's operators come as a decomposition, which Inductor may fuse with what surrounds it; ours is the operator itself,
behind which `cutlass_kernels.gemm.choose` has picked a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.cuda import aten


def grouped_mm(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Torch's own grouped product where it has one: bfloat16, in rows of whole 16 bytes."""
    if a.dtype == torch.bfloat16 and weight.size(1) % 8 == 0 and weight.size(2) % 8 == 0:
        return torch._grouped_mm(a, weight.transpose(-2, -1), offs=offsets[1:])
    return aten.grouped_gemm(a, weight, offsets)


def register_autotuning() -> None:
    """For this process, and every device. It takes effect in what is compiled with ``max_autotune`` afterwards."""
    from torch._inductor.kernel.custom_op import CustomOpConfig, register_custom_op_autotuning

    for operator, decomposition in (
        (torch.ops.flashmla.gemm.default, aten.gemm),
        (torch.ops.flashmla.bmm.default, aten.bmm),
        (torch.ops.flashmla.grouped_gemm.default, grouped_mm),
    ):
        name = f"flashmla_{operator._opname}"
        register_custom_op_autotuning(operator, configs=[CustomOpConfig(decomposition)], name=name)
