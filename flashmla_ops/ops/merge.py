"""``flashmla::merge_states``: combine attention over disjoint key sets into attention over their union.

    outs  [b, s_q, h_q, d_v] or [s_q, h_q, d_v] each, of one type
    lses  [b, h_q, s_q] or [h_q, s_q] float32 each, natural logarithms; an infinite one says that no key was seen

Returns out and lse in the shapes of a part. Raises `ArgumentError` for shapes, types and devices that do not fit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops.check import Check, Result, lse_shape, sizes_of
from flashmla_ops.ops.operator import Arguments, Operator
from flashmla_ops.reference.schedule import MAX_PARTS


@dataclass
class MergeStates(Arguments):
    """The results of each part."""

    outs: Sequence[Tensor]  # [b, s_q, h_q, d_v] or [s_q, h_q, d_v]
    lses: Sequence[Tensor]  # [b, h_q, s_q] or [h_q, s_q] float32


def contract(check: Check, a: MergeStates) -> tuple[Result, Result]:
    parts = len(a.outs)
    check.require("outs", parts >= 1, "at least one part", parts)
    check.require("outs", parts <= MAX_PARTS, f"at most {MAX_PARTS} parts", parts)
    check.require("lses", len(a.lses) == parts, f"{parts} parts, as outs", len(a.lses))
    first = a.outs[0]
    check.at(0).floating("outs", first)
    known = first.dim() in (3, 4)
    shapes = "shape [b, s_q, h_q, d_v] or [s_q, h_q, d_v]"
    check.at(0).require("outs", known, shapes, f"{first.dim()} dimensions")
    for i in range(parts):
        part = check.at(i)
        part.dtype("outs", a.outs[i], first.dtype)
        part.dtype("lses", a.lses[i], torch.float32)
        part.device("outs", a.outs[i], first)
        part.shape("outs", a.outs[i], sizes_of(first))
        part.device("lses", a.lses[i], first)
        part.shape("lses", a.lses[i], lse_shape(first))
    return Result(sizes_of(first), first.dtype), Result(lse_shape(first), torch.float32)


def autocast(dtype: torch.dtype, a: MergeStates) -> MergeStates:
    """Parts of several dtypes in the widest of them, as torch.cat has it."""
    widest = functools.reduce(torch.promote_types, (out.dtype for out in a.outs)) if a.outs else dtype
    return dataclasses.replace(a, outs=[cast(out, widest) for out in a.outs])


def vmap(size: int, dims: dict[str, Any], a: MergeStates) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The mapped dimension joins the batch, or becomes it where there was none."""

    def mapped(tensors: Sequence[Tensor], dims: list[int | None], batched: bool) -> list[Tensor]:
        first = [x.expand(size, *x.shape) if d is None else x.movedim(d, 0) for x, d in zip(tensors, dims, strict=True)]
        return [x.flatten(0, 1) for x in first] if batched else first

    batched = a.outs[0].dim() - (dims["outs"][0] is not None) == 4
    outs, lses = mapped(a.outs, dims["outs"], batched), mapped(a.lses, dims["lses"], batched)
    out, lse = (x.unflatten(0, (size, -1)) if batched else x for x in torch.ops.flashmla.merge_states(outs, lses))
    return (out, lse), (0, 0)


def sharding(a: MergeStates) -> list[Way]:
    """By sequences, query tokens or heads: whatever a state belongs to."""
    batch = a.outs[0].dim() - 3
    pairs = [(batch, batch + 1), (batch + 1, batch), *([(0, 0)] if batch else [])]
    return [{"outs": of_out, "lses": of_lse, "out": of_out, "lse": of_lse} for of_out, of_lse in pairs]


MERGE_STATES = Operator(
    "merge_states",
    MergeStates,
    contract,
    lambda a: reference.merge_states(a.outs, a.lses),
    returns=("out", "lse"),
    vmap=vmap,
    autocast=autocast,
    sharding=sharding,
)
