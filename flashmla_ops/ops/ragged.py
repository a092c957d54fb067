"""Boundaries of sequences that lie one after another: ``cu_seqlens`` [b + 1], int32 or int64.

Sequence i has the tokens from ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``; it may have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops.check import Check, dtype_name


def check_boundaries(check: Check, name: str, tensor: Tensor, q: Tensor) -> None:
    check.dims(name, tensor, "[b + 1]")
    known = tensor.dtype in (torch.int32, torch.int64)
    check.require(name, known, "int32 or int64", dtype_name(tensor.dtype))
    check.device(name, tensor, q)
    check.require(name, tensor.size(0) >= 1, "at least 1 element", tensor.size(0))


def check_bounds(op: str, name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise unless ``cu_seqlens`` begins at 0, never falls and ends at ``tokens``."""
    bounds: list[int] = cu_seqlens.tolist()
    for i, bound in enumerate(bounds):
        if not -(2**31) <= bound < 2**31:
            raise ArgumentError(op, name, "values that int32 holds", f"{bound} at [{i}]")
    if bounds[0] != 0:
        raise ArgumentError(op, name, "0 at [0]", bounds[0])
    for i in range(1, len(bounds)):
        if bounds[i] < bounds[i - 1]:
            raise ArgumentError(op, name, f"at least {bounds[i - 1]} at [{i}]", bounds[i])
    if bounds[-1] != tokens:
        raise ArgumentError(op, name, f"{tokens} at [{len(bounds) - 1}], the number of tokens", bounds[-1])
