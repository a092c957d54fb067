"""``flashmla::gemm`` and ``flashmla::bmm``: the products around attention, for the few rows of a decode step.

``weight`` lies as in ``torch.nn.Linear``, [n, k], or in panels, [n / 16, k, 16], which are faster from four rows on
(`flashmla_ops.panels.to_panels`). Every weight is read once; scale, bias, activation and residual are applied before
the result is rounded. With many rows and a weight that is not in panels torch's own product runs, followed by the same
epilogue. Weights of four bits are in panels of int32 (`flashmla_ops.panels.pack_int4`): they are widened in registers
as they are read, once for a tile of rows, and a group's sums are scaled in float32. They are for few rows: from 16 rows
on they take the time of a weight of 16 bits in panels, or, in groups of 32, up to a third more. On CUDA they are
widened to a's type for each call.

    a             [..., k] float32, bfloat16 or float16; of bmm [batch, m, k]
    weight        [n, k], k contiguous, or panels [n / 16, k, 16], floating or int8; int4 in panels [n / 16, k / 8, 16]
                  int32; of bmm [batch, k, n]
    bias          [n] or None
    residual      [..., n] or None, of out_dtype: added to the result
    weight_scale  [n] float32 or None: multiplies the product; needed by int8 weights. With int4 weights panels
                  [n / 16, k / group, 16], float32 or bfloat16: a factor for each group along k, of a multiple of 32
    activation    "none", "relu", "gelu", "silu", or "silu_mul", which halves n
    out_dtype     None: a's

Returns [..., n], of bmm [batch, m, n]; the ``.out`` overloads write it into ``out``. Raises `ArgumentError` for shapes,
types and devices that do not fit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._autocast import all_cast, cast
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import each, folded, front
from flashmla_ops.ops.check import (
    FLOAT_NAMES,
    FLOATS,
    Check,
    Result,
    dtype_name,
    sizes_of,
    strides_of,
    with_last,
)
from flashmla_ops.ops.operator import Arguments, Operator
from flashmla_ops.panels import INT4S, PANEL

ACTIVATIONS = ("none", "relu", "gelu", "silu", "silu_mul")
ACTIVATION_NAMES = ", ".join(ACTIVATIONS)
WEIGHTS = (*FLOATS, torch.int8, torch.int32)
WEIGHT_NAMES = "float32, bfloat16, float16, int8 or int32 (int4 in panels)"
PANELS = f"[n / {PANEL}, k, {PANEL}]"
INT4_PANELS = f"[n / {PANEL}, k / {INT4S}, {PANEL}]"
SCALE_PANELS = f"[n / {PANEL}, k / group, {PANEL}]"
GROUP = 32  # elements of k that share a scale, at least: a multiple of it
GROUP_SCALES = (torch.float32, torch.bfloat16)


@dataclass
class Gemm(Arguments):
    """activation(a weight^T * weight_scale + bias) + residual."""

    a: Tensor  # [..., k]
    weight: Tensor  # [n, k], k contiguous, or panels [n / 16, k, 16]; of int4 [n / 16, k / 8, 16] int32
    bias: Tensor | None = None  # [n]
    residual: Tensor | None = None  # [..., n], of out_dtype
    weight_scale: Tensor | None = None  # [n] float32; of int4 [n / 16, k / group, 16]
    activation: str = "none"
    out_dtype: torch.dtype | None = None


@dataclass
class Bmm(Arguments):
    """One product for each entry of a batch."""

    a: Tensor  # [batch, m, k]
    weight: Tensor  # [batch, k, n]


def contract(check: Check, a: Gemm) -> Result:
    check.require("activation", a.activation in ACTIVATIONS, f"one of {ACTIVATION_NAMES}", a.activation)
    left, weight = a.a, a.weight
    check.require("a", left.dim() >= 1, "shape [..., k]", f"{left.dim()} dimensions")
    check.floating("a", left)
    panels = weight.dim() == 3
    check.require("weight", weight.dim() == 2 or panels, f"shape [n, k] or {PANELS}", f"{weight.dim()} dimensions")
    check.require("weight", weight.dtype in WEIGHTS, WEIGHT_NAMES, dtype_name(weight.dtype))
    check.device("weight", weight, left)
    if panels:
        shaped = weight.size(2) == PANEL and weight.is_contiguous()
        check.require("weight", shaped, f"contiguous {PANELS}", f"{sizes_of(weight)}, strides {strides_of(weight)}")
    else:
        check.contiguous_rows("weight", weight)
    int4 = weight.dtype == torch.int32
    check.require("weight", panels or not int4, f"int4 in panels {INT4_PANELS}", "rows of int32")
    n, k = weight.size(0) * (PANEL if panels else 1), weight.size(1) * (INT4S if int4 else 1)
    check.require("a", left.size(-1) == k, f"rows of {k} elements, as weight", left.size(-1))
    gated = a.activation == "silu_mul"
    kind = "panels" if panels else "rows"
    halves = not gated or weight.size(0) % 2 == 0
    check.require("weight", halves, f"an even number of {kind} with silu_mul", weight.size(0))
    integers = int4 or weight.dtype == torch.int8
    kinds = "int4" if int4 else "int8"
    check.require("weight", a.weight_scale is not None or not integers, f"weight_scale with {kinds}", "none")
    if a.weight_scale is not None and int4:
        check_groups(check, a.weight_scale, weight, k)
    elif a.weight_scale is not None:
        check_vector(check, "weight_scale", a.weight_scale, torch.float32, left, n)
    if a.bias is not None:
        check_vector(check, "bias", a.bias, left.dtype, left, n)
    dtype = left.dtype if a.out_dtype is None else a.out_dtype
    check.require("out_dtype", dtype in FLOATS, FLOAT_NAMES, dtype_name(dtype))
    shape = with_last(left, n // 2 if gated else n)
    if a.residual is not None:
        check.dtype("residual", a.residual, dtype)
        check.device("residual", a.residual, left)
        check.shape("residual", a.residual, shape)
    return Result(shape, dtype)


def check_vector(check: Check, name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor, n: int) -> None:
    check.dims(name, tensor, "[n]")
    check.dtype(name, tensor, dtype)
    check.device(name, tensor, like)
    check.contiguous_rows(name, tensor)
    check.size(name, tensor, 0, n, " elements, as weight")


def check_groups(check: Check, scale: Tensor, weight: Tensor, k: int) -> None:
    """The scales of int4 weights."""
    check.dims("weight_scale", scale, SCALE_PANELS)
    name = dtype_name(scale.dtype)
    check.require("weight_scale", scale.dtype in GROUP_SCALES, "float32 or bfloat16 with int4", name)
    check.device("weight_scale", scale, weight)
    check.require("weight_scale", scale.is_contiguous(), "contiguous panels", f"strides {strides_of(scale)}")
    check.size("weight_scale", scale, 0, weight.size(0), " panels, as weight")
    check.size("weight_scale", scale, 2, PANEL, " columns of a panel")
    groups = scale.size(1)
    divided = groups > 0 and k % (groups * GROUP) == 0
    check.require("weight_scale", divided, f"groups of a multiple of {GROUP} elements of k {k}", f"{groups} groups")


def contract_bmm(check: Check, a: Bmm) -> Result:
    check.dims("a", a.a, "[batch, m, k]")
    check.floating("a", a.a)
    check.dims("weight", a.weight, "[batch, k, n]")
    check.dtype("weight", a.weight, a.a.dtype)
    check.device("weight", a.weight, a.a)
    check.size("weight", a.weight, 0, a.a.size(0), " batch entries, as a")
    check.require("weight", a.weight.size(1) == a.a.size(2), f"k {a.a.size(2)}, as a", a.weight.size(1))
    return Result([a.a.size(0), a.a.size(1), a.weight.size(2)], a.a.dtype)


def vmap(size: int, dims: dict[str, Any], a: Gemm) -> tuple[Any, Any]:
    """The mapped dimension is one more of those that rows lie in, if the weight and what belongs to it are shared."""
    gemm = torch.ops.flashmla.gemm.default
    if any(dims[name] is not None for name in ("weight", "bias", "weight_scale")):
        return each(gemm, size, dims, a)
    added = None if a.residual is None else front(a.residual, dims["residual"], size)
    return gemm(*dataclasses.replace(a, a=front(a.a, dims["a"], size), residual=added).values()), 0


def autocast(dtype: torch.dtype, a: Gemm) -> Gemm:
    """The residual is cast to the dtype of the result, which may be asked for."""
    left, weight, bias = (cast(x, dtype) for x in (a.a, a.weight, a.bias))
    residual = cast(a.residual, a.out_dtype or left.dtype)
    return dataclasses.replace(a, a=left, weight=weight, bias=bias, residual=residual)


def vmap_bmm(size: int, dims: dict[str, Any], a: Bmm) -> tuple[Tensor, int]:
    """The mapped dimension joins the batch, or the rows where the weight is shared, which is then read once."""
    if dims["weight"] is None:
        rows = front(a.a, dims["a"], size).movedim(0, 1)  # [batch, size, m, k]
        out = torch.ops.flashmla.bmm(rows.flatten(1, 2), a.weight)
        return out.unflatten(1, rows.shape[1:3]), 1
    weight = folded(a.weight, dims["weight"], size)
    out = torch.ops.flashmla.bmm(folded(a.a, dims["a"], size), weight)
    return out.unflatten(0, (size, weight.size(0) // size)), 0


def sharding(a: Gemm) -> list[Way]:
    """By rows; by columns of the result, unless it has half as many as the weight; by k where all is linear.

    Not int4 weights by k: a cut there could lie within a group.
    """
    last = a.a.dim() - 1
    ways: list[Way] = [{"a": dim, "residual": dim, "out": dim} for dim in range(last)]
    if a.activation != "silu_mul":
        ways.append({"weight": 0, "bias": 0, "weight_scale": 0, "residual": last, "out": last})
    linear = a.activation == "none" and a.bias is None and a.residual is None
    if linear and a.weight.dtype != torch.int32:
        ways.append({"a": last, "weight": 1, "out": SUM})
    return ways


def sharding_bmm(a: Bmm) -> list[Way]:
    return [
        {"a": 0, "weight": 0, "out": 0},
        {"a": 1, "out": 1},
        {"weight": 2, "out": 2},
        {"a": 2, "weight": 1, "out": SUM},
    ]


GEMM = Operator(
    "gemm",
    Gemm,
    contract,
    lambda a: reference.gemm(*a.values()[:-1]),
    returns=("out",),
    vmap=vmap,
    autocast=autocast,
    sharding=sharding,
).with_out(in_place="residual")
BMM = Operator(
    "bmm",
    Bmm,
    contract_bmm,
    lambda a: reference.bmm(a.a, a.weight),
    returns=("out",),
    vmap=vmap_bmm,
    autocast=all_cast,
    sharding=sharding_bmm,
).with_out()
