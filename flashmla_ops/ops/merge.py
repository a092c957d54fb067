"""``flashmla::merge_states``: combine attention over disjoint key sets into attention over their union.

    outs  [b, s_q, h_q, d_v] or [s_q, h_q, d_v] each, of one type
    lses  [b, h_q, s_q] or [h_q, s_q] float32 each, natural logarithms; an infinite one says that no key was seen

Returns out and lse in the shapes of a part. Raises `ArgumentError` for shapes, types and devices that do not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._library import (
    define,
    require,
    require_device,
    require_dtype,
    require_float,
)
from flashmla_ops.reference.schedule import MAX_PARTS

OP = "merge_states"


def check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    require(OP, "outs", len(outs) >= 1, "at least one part", len(outs))
    require(OP, "outs", len(outs) <= MAX_PARTS, f"at most {MAX_PARTS} parts", len(outs))
    require(OP, "lses", len(lses) == len(outs), f"{len(outs)} parts, as outs", len(lses))
    first = outs[0]
    require_float(OP, "outs[0]", first)
    require(
        OP, "outs[0]", first.dim() in (3, 4), "shape [b, s_q, h_q, d_v] or [s_q, h_q, d_v]", f"{first.dim()} dimensions"
    )
    *batch, s_q, h_q, _ = first.shape
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        require_dtype(OP, f"outs[{i}]", out, first.dtype)
        require_dtype(OP, f"lses[{i}]", lse, torch.float32)
        for name, tensor, shape in (
            (f"outs[{i}]", out, list(first.shape)),
            (f"lses[{i}]", lse, [*batch, h_q, s_q]),
        ):
            require_device(OP, name, tensor, first.device)
            same = tensor.dim() == len(shape) and all(x == y for x, y in zip(tensor.shape, shape, strict=True))
            require(OP, name, same, f"shape {shape}", list(tensor.shape))


def fake(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    check(outs, lses)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def by_reference(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    check(outs, lses)
    out, lse = reference.merge_states(outs, lses)
    return out.to(outs[0].dtype).contiguous(), lse.to(torch.float32).contiguous()


def autocast(dtype: torch.dtype, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Any, ...]:
    """Parts of several dtypes in the widest of them, as torch.cat has it."""
    widest = functools.reduce(torch.promote_types, (out.dtype for out in outs)) if outs else dtype
    return [cast(out, widest) for out in outs], lses


def vmap(
    info: Any, in_dims: tuple[list[int | None], list[int | None]], outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The mapped dimension joins the batch, or becomes it where there was none."""
    size = info.batch_size

    def mapped(tensors: Sequence[Tensor], dims: list[int | None], batched: bool) -> list[Tensor]:
        first = [x.expand(size, *x.shape) if d is None else x.movedim(d, 0) for x, d in zip(tensors, dims, strict=True)]
        return [x.flatten(0, 1) for x in first] if batched else first

    batched = outs[0].dim() - (in_dims[0][0] is not None) == 4
    result = torch.ops.flashmla.merge_states(mapped(outs, in_dims[0], batched), mapped(lses, in_dims[1], batched))
    out, lse = (x.unflatten(0, (size, -1)) if batched else x for x in result)
    return (out, lse), (0, 0)


define(
    f"{OP}(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
    fake=fake,
    reference=by_reference,
    vmap=vmap,
    autocast=autocast,
)
