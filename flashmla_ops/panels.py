"""Panels: weights of ``flashmla::gemm`` as its kernel for a few rows reads them best.

A panel is 16 rows of a weight, transposed: one load brings the weights of 16 columns of the result, which all rows of
``a`` meet. From four rows on products take less time so than with weights that lie as in ``torch.nn.Linear``.
Weights of four bits are always in panels, eight of a row in a dword; a group of them along k shares a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError

PANEL = 16
#: Weights of four bits in a dword, and the bits of each: a pair's halves are each where bf16 pairs have them.
INT4S = 8
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


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
    """A weight that `gemm` takes as ``[n, k]``, whichever way it lies; of int4 the integers."""
    if weight.dtype == torch.int32:
        return unpack_int4(weight)
    return weight if weight.dim() == 2 else from_panels(weight)


def pack_int4(values: Tensor) -> Tensor:
    """Integers ``[n, k]`` from -8 to 7, n a multiple of 16 and k of 8, as panels ``[n / 16, k / 8, 16]`` int32.

    A dword holds eight elements of a row: the even ones in its lower half, the odd ones in its upper half, the first
    in the lowest bits.
    """
    fits = values.dim() == 2 and values.size(0) % PANEL == 0 and values.size(1) % INT4S == 0
    if not fits:
        expected = f"shape [n, k], n a multiple of {PANEL} and k of {INT4S}"
        raise ArgumentError("pack_int4", "values", expected, f"shape {list(values.shape)}")
    n, k = values.shape
    dwords = torch.zeros(n, k // INT4S, dtype=torch.int64, device=values.device)
    for i, bits in enumerate(values.reshape(n, k // INT4S, INT4S).long().bitwise_and(15).unbind(-1)):
        dwords |= bits << _SHIFTS[i]
    return to_panels(dwords.to(torch.int32))  # modulo 2 ** 32


def unpack_int4(panels: Tensor) -> Tensor:
    """The integers ``[n, k]`` that `pack_int4` took, as int8."""
    if panels.dtype != torch.int32:
        raise ArgumentError("unpack_int4", "panels", "int32", str(panels.dtype).removeprefix("torch."))
    dwords = from_panels(panels)
    left = torch.tensor([28 - shift for shift in _SHIFTS], dtype=torch.int32, device=panels.device)
    return ((dwords.unsqueeze(-1) << left) >> 28).to(torch.int8).flatten(1)


def groups_of(scale: Tensor, k: int) -> Tensor:
    """Scales of int4 weights, in panels ``[n / 16, k / group, 16]``, as a factor for each weight: ``[n, k]``."""
    rows = from_panels(scale)
    return rows.repeat_interleave(k // rows.size(1), dim=1)
