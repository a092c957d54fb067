"""Panels: weights of ``flashmla::gemm`` as its kernel for a few rows reads them best.

A panel is 16 rows of a weight, transposed: one load brings the weights of 16 columns of the result, which all rows of
``a`` meet. From four rows on products take less time so than with weights that lie as in ``torch.nn.Linear``.
"""

from __future__ import annotations

from torch import Tensor

from flashmla_ops.errors import ArgumentError

PANEL = 16


def to_panels(weight: Tensor) -> Tensor:
    """A weight ``[n, k]``, n a multiple of 16, as panels ``[n / 16, k, 16]``: a copy that `gemm` takes in its place."""
    if weight.dim() != 2 or weight.size(0) % PANEL != 0:
        expected = f"shape [n, k], n a multiple of {PANEL}"
        raise ArgumentError("to_panels", "weight", expected, f"shape {list(weight.shape)}")
    n, k = weight.shape
    return weight.reshape(n // PANEL, PANEL, k).mT.contiguous()


def from_panels(panels: Tensor) -> Tensor:
    """The weight ``[n, k]`` that `to_panels` took: a copy."""
    if panels.dim() != 3 or panels.size(2) != PANEL:
        raise ArgumentError("from_panels", "panels", f"shape [n / {PANEL}, k, {PANEL}]", f"shape {list(panels.shape)}")
    return panels.mT.flatten(0, 1)


def as_rows(weight: Tensor) -> Tensor:
    """A weight that `gemm` takes as ``[n, k]``, whichever way it lies."""
    return weight if weight.dim() == 2 else from_panels(weight)
