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
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._autocast import all_cast
from flashmla_ops.ops._library import LIBRARY
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result
from flashmla_ops.ops.operator import Arguments, Operator

OP = "grouped_gemm"


@dataclass
class GroupedGemm(Arguments):
    """Rows in groups, and a weight for each group."""

    a: Tensor  # [rows, k]
    weight: Tensor  # [groups, n, k], k contiguous
    offsets: Tensor  # [groups + 1] int32: the rows of group g are offsets[g] to offsets[g + 1]


def contract(check: Check, a: GroupedGemm) -> Result:
    check.dims("a", a.a, "[rows, k]")
    check.floating("a", a.a)
    check.dims("weight", a.weight, "[groups, n, k]")
    check.dtype("weight", a.weight, a.a.dtype)
    check.device("weight", a.weight, a.a)
    check.contiguous_rows("weight", a.weight)
    groups, n, k = a.weight.shape
    check.require("a", a.a.size(1) == k, f"rows of {k} elements, as weight", a.a.size(1))
    check.dims("offsets", a.offsets, "[groups + 1]")
    check.dtype("offsets", a.offsets, torch.int32)
    check.device("offsets", a.offsets, a.a)
    check.size("offsets", a.offsets, 0, groups + 1, " elements")
    return Result([a.a.size(0), n], a.a.dtype)


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


def by_reference(a: GroupedGemm) -> Tensor:
    return reference.grouped_gemm(a.a, a.weight, list(runs(a.offsets, a.a.size(0))))


def on_cpu(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The kernels of ``gemm``, group after group: each reads its weight once, with all threads."""
    out: Tensor = GROUPED_GEMM.fake(a, weight, offsets)
    for group, (start, end) in enumerate(runs(offsets, a.size(0))):
        if start < end:
            torch.ops.flashmla.gemm.out(a[start:end], weight[group], out=out[start:end])
    return out


def sharding(a: GroupedGemm) -> list[Way]:
    """By columns of the result, or by k. Rows and groups belong together as ``offsets`` says, and are not cut."""
    return [{"weight": 1, "out": 1}, {"a": 1, "weight": 2, "out": SUM}]


GROUPED_GEMM = Operator(
    OP,
    GroupedGemm,
    contract,
    by_reference,
    returns=("out",),
    vmap=loop(lambda: torch.ops.flashmla.grouped_gemm.default),
    autocast=all_cast,
    sharding=sharding,
).with_out()
LIBRARY.impl(OP, on_cpu, "CPU")
