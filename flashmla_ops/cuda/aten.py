"""``gemm``, ``bmm`` and ``grouped_gemm`` by torch's own operators: what runs on CUDA where no kernel of ours fits.

Products run in the type of ``a`` (float32 for a float32 result) with torch's float32 sums; the epilogue is float32,
with one rounding at the end, and a first one of the product where that is not float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.panels import as_rows
from flashmla_ops.reference.gemm import ACTIVATIONS


def gemm(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``flashmla::gemm``; arguments have been checked."""
    dtype = a.dtype if out_dtype is None else out_dtype
    type_ = torch.float32 if dtype == torch.float32 else a.dtype
    product = torch.nn.functional.linear(a.to(type_), as_rows(weight).to(type_))
    if bias is None and residual is None and weight_scale is None and activation == "none":
        return product.to(dtype)
    value = product.float()
    if weight_scale is not None:
        value = value * weight_scale
    if bias is not None:
        value = value + bias.float()
    if activation == "silu_mul":
        gate, up = value.chunk(2, dim=-1)
        value = torch.nn.functional.silu(gate) * up
    else:
        value = ACTIVATIONS[activation](value)
    if residual is not None:
        value = value + residual.float()
    return value.to(dtype)


def bmm(a: Tensor, weight: Tensor) -> Tensor:
    """``flashmla::bmm``."""
    return torch.bmm(a, weight).contiguous()


def grouped_gemm(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``flashmla::grouped_gemm``, without a look at the offsets on the host.

    Every group multiplies every row, and the rows that are not its own are dropped: slow, but it never waits for the
    device, and it can be captured in a graph.
    """
    rows = torch.arange(a.size(0), device=a.device)[:, None]
    out = a.new_zeros((a.size(0), weight.size(1)))
    for group in range(weight.size(0)):
        own = (rows >= offsets[group]) & (rows < offsets[group + 1])
        out = torch.where(own, torch.nn.functional.linear(a, weight[group]), out)
    return out
