"""Inductor's custom-op autotuning for ``gemm`` and ``bmm``: our kernels against torch's operators, timed per shape.

Torch's operators come as a decomposition, which Inductor may fuse with what surrounds it; ours is the operator itself,
behind which `cutlass_kernels.choose` has picked a kernel.
"""

from __future__ import annotations

import torch

from flashmla_ops.cuda import aten


def register_autotuning() -> None:
    """For this process, and every device. It takes effect in what is compiled with ``max_autotune`` afterwards."""
    from torch._inductor.kernel.custom_op import CustomOpConfig, register_custom_op_autotuning

    for operator, decomposition in (
        (torch.ops.flashmla.gemm.default, aten.gemm),
        (torch.ops.flashmla.bmm.default, aten.bmm),
    ):
        name = f"flashmla_{operator._opname}"
        register_custom_op_autotuning(operator, configs=[CustomOpConfig(decomposition)], name=name)
