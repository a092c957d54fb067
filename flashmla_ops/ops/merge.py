"""``flashmla::merge_states``: combine attention over disjoint key sets into attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._library import (
    define,
    refuse_gradient,
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
        refuse_gradient(OP, **{f"outs[{i}]": out, f"lses[{i}]": lse})
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


define(f"{OP}(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)", fake=fake, reference=by_reference)
