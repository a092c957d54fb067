"""Products with an epilogue, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.panels import as_rows, groups_of

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def gemm(
    a: Tensor,  # [..., k]
    weight: Tensor,  # [n, k] or in panels, int4 of int32; with silu_mul of 2 n rows
    bias: Tensor | None = None,  # [n]; [2 n] with silu_mul
    residual: Tensor | None = None,  # [..., n]
    weight_scale: Tensor | None = None,  # [n], of int4 in panels by group: a factor for each (row of) weight
    activation: str = "none",
) -> Tensor:  # [..., n] float64
    """activation(a weight^T * weight_scale + bias) + residual. silu_mul is silu(first half) * second half."""
    product = a.double() @ values(weight, weight_scale).T
    if bias is not None:
        product = product + bias.double()
    if activation == "silu_mul":
        gate, up = product.chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate) * up
    else:
        product = ACTIVATIONS[activation](product)
    return product if residual is None else product + residual.double()


def values(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the numbers of a weight stand for: [n, k] of ``dtype``."""
    rows = as_rows(weight).to(dtype)
    if weight_scale is None:
        return rows
    scale = groups_of(weight_scale, rows.size(1)) if weight_scale.dim() == 3 else weight_scale.unsqueeze(1)
    return rows * scale.to(dtype)


def bmm(a: Tensor, weight: Tensor) -> Tensor:
    """a [batch, m, k] times weight [batch, k, n], float64."""
    return a.double() @ weight.double()


def grouped_gemm(a: Tensor, weight: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """a [rows, k] times weight [groups, n, k] transposed, the rows runs[g] with weight[g]: [rows, n] float64."""
    parts = [a[start:end].double() @ weight[group].double().T for group, (start, end) in enumerate(runs)]
    return torch.cat(parts) if parts else a.new_zeros((0, weight.size(1)), dtype=torch.float64)
