"""``flashmla::grouped_gemm``: one product for each run of rows, each with a weight of its own (the experts of an MoE).

Rows are sorted by expert before the call, so that each expert's are consecutive; ``offsets`` says where they start.

    a        [rows, k] float32, bfloat16 or float16
    weight   [groups, n, k], k contiguous, of a's type
    offsets  [groups + 1] int32: the rows of group g are offsets[g] to offsets[g + 1]

Returns [rows, n], of a's type; ``grouped_gemm.out`` writes it into ``out``. Raises `ArgumentError` for shapes, types
and devices that do not fit, and on the CPU for offsets that do not rise from 0 to rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._autocast import all_cast
from flashmla_ops.ops._library import (
    LIBRARY,
    define,
    require,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_dtype,
    require_float,
)
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.gemm import into, into_fake

OP = "grouped_gemm"
ARGUMENTS = "Tensor a, Tensor weight, Tensor offsets"


def grouped_gemm_fake(
    a: Tensor,  # [rows, k]
    weight: Tensor,  # [groups, n, k]
    offsets: Tensor,  # [groups + 1] int32: the rows of group g are offsets[g] to offsets[g + 1]
) -> Tensor:  # [rows, n]
    require_dims(OP, "a", a, "[rows, k]")
    require_float(OP, "a", a)
    require_dims(OP, "weight", weight, "[groups, n, k]")
    require_dtype(OP, "weight", weight, a.dtype)
    require_device(OP, "weight", weight, a.device)
    require_contiguous_rows(OP, "weight", weight)
    groups, n, k = weight.shape
    require(OP, "a", a.size(1) == k, f"rows of {k} elements, as weight", a.size(1))
    require_dims(OP, "offsets", offsets, "[groups + 1]")
    require_dtype(OP, "offsets", offsets, torch.int32)
    require_device(OP, "offsets", offsets, a.device)
    require(OP, "offsets", offsets.size(0) == groups + 1, f"{groups + 1} elements", offsets.size(0))
    return a.new_empty((a.size(0), n))


def runs(offsets: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of each group. Raises unless they cover the rows 0 to ``rows`` in order."""
    starts: list[int] = offsets.tolist()
    if starts[0] != 0:
        raise ArgumentError(OP, "offsets", "0 at [0]", f"{starts[0]} at [0]")
    for i, (start, end) in enumerate(pairwise(starts)):
        if not start <= end <= rows:
            raise ArgumentError(OP, "offsets", f"a value in [{start}, {rows}]", f"{end} at [{i + 1}]")
        yield start, end
    if starts[-1] != rows:
        raise ArgumentError(OP, "offsets", f"{rows} (the rows of a) at the end", f"{starts[-1]} at [{len(starts) - 1}]")


def grouped_gemm_reference(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    grouped_gemm_fake(a, weight, offsets)
    return reference.grouped_gemm(a, weight, list(runs(offsets, a.size(0)))).to(a.dtype)


def grouped_gemm_cpu(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The kernels of ``gemm``, group after group: each reads its weight once, with all threads."""
    out = grouped_gemm_fake(a, weight, offsets)
    for group, (start, end) in enumerate(runs(offsets, a.size(0))):
        if start < end:
            torch.ops.flashmla.gemm.out(a[start:end], weight[group], out=out[start:end])
    return out


define(
    f"{OP}({ARGUMENTS}) -> Tensor",
    fake=grouped_gemm_fake,
    reference=grouped_gemm_reference,
    vmap=loop(lambda: torch.ops.flashmla.grouped_gemm.default),
    autocast=all_cast,
)
define(
    f"{OP}.out({ARGUMENTS}, *, Tensor(a!) out) -> ()",
    fake=into_fake(grouped_gemm_fake, OP),
    reference=into(torch.ops.flashmla.grouped_gemm.default, grouped_gemm_fake, OP),
)
LIBRARY.impl(OP, grouped_gemm_cpu, "CPU")
