"""``flashmla::gemm`` and ``flashmla::bmm``: the products around attention, for the few rows of a decode step.

``weight`` lies as in ``torch.nn.Linear``, [n, k], or in panels, [n / 16, k, 16], which are faster from four rows on
(`flashmla_ops.panels.to_panels`). Every weight is read once; scale, bias, activation and residual are applied before
the result is rounded. With many rows and a weight that is not in panels torch's own product runs, followed by the same
epilogue.

    a             [..., k] float32, bfloat16 or float16; of bmm [batch, m, k]
    weight        [n, k], k contiguous, or panels [n / 16, k, 16], of a's type or int8; of bmm [batch, k, n]
    bias          [n] or None
    residual      [..., n] or None, of out_dtype: added to the result
    weight_scale  [n] float32 or None: multiplies the product; needed by int8 weights
    activation    "none", "relu", "gelu", "silu", or "silu_mul", which halves n
    out_dtype     None: a's

Returns [..., n], of bmm [batch, m, n]; the ``.out`` overloads write it into ``out``. Raises `ArgumentError` for shapes,
types and devices that do not fit.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._autocast import all_cast, cast
from flashmla_ops.ops._library import (
    FLOAT_NAMES,
    FLOATS,
    Function,
    define,
    dtype_name,
    require,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_dtype,
    require_float,
)
from flashmla_ops.ops._overlap import require_apart, same_elements
from flashmla_ops.ops._vmap import Dims, each, folded, front
from flashmla_ops.panels import PANEL

OP = "gemm"
ACTIVATIONS = ("none", "relu", "gelu", "silu", "silu_mul")
WEIGHT_NAMES = "float32, bfloat16, float16 or int8"
PANELS = f"[n / {PANEL}, k, {PANEL}]"


def check(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_scale: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> list[int]:
    """Raise on a bad argument; the shape of out otherwise. The C++ binding checks the same, with the same words."""
    require(OP, "activation", activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}", activation)
    require(OP, "a", a.dim() >= 1, "shape [..., k]", f"{a.dim()} dimensions")
    require_float(OP, "a", a)
    panels = weight.dim() == 3
    require(OP, "weight", weight.dim() == 2 or panels, f"shape [n, k] or {PANELS}", f"{weight.dim()} dimensions")
    known = weight.dtype in (*FLOATS, torch.int8)
    require(OP, "weight", known, WEIGHT_NAMES, dtype_name(weight.dtype))
    require_device(OP, "weight", weight, a.device)
    if panels:
        shaped = weight.size(2) == PANEL and weight.is_contiguous()
        require(OP, "weight", shaped, f"contiguous {PANELS}", f"{list(weight.shape)}, strides {list(weight.stride())}")
    else:
        require_contiguous_rows(OP, "weight", weight)
    rows, k = weight.size(0) * (PANEL if panels else 1), weight.size(1)
    require(OP, "a", a.size(-1) == k, f"rows of {k} elements, as weight", a.size(-1))
    gated = activation == "silu_mul"
    halves = weight.size(0) % 2 == 0
    kind = "panels" if panels else "rows"
    require(OP, "weight", not gated or halves, f"an even number of {kind} with silu_mul", weight.size(0))
    require(OP, "weight", weight_scale is not None or weight.dtype != torch.int8, "weight_scale with int8", "none")
    if weight_scale is not None:
        require_dims(OP, "weight_scale", weight_scale, "[n]")
        require_dtype(OP, "weight_scale", weight_scale, torch.float32)
        require_device(OP, "weight_scale", weight_scale, a.device)
        require_contiguous_rows(OP, "weight_scale", weight_scale)
        require(OP, "weight_scale", weight_scale.size(0) == rows, f"{rows} elements, as weight", weight_scale.size(0))
    if bias is not None:
        require_dims(OP, "bias", bias, "[n]")
        require_dtype(OP, "bias", bias, a.dtype)
        require_device(OP, "bias", bias, a.device)
        require_contiguous_rows(OP, "bias", bias)
        require(OP, "bias", bias.size(0) == rows, f"{rows} elements, as weight", bias.size(0))
    dtype = a.dtype if out_dtype is None else out_dtype
    require(OP, "out_dtype", dtype in FLOATS, FLOAT_NAMES, dtype_name(dtype))
    shape = [*a.shape[:-1], rows // 2 if gated else rows]
    if residual is not None:
        require_dtype(OP, "residual", residual, dtype)
        require_device(OP, "residual", residual, a.device)
        same = residual.dim() == len(shape) and all(x == y for x, y in zip(residual.shape, shape, strict=True))
        require(OP, "residual", same, f"shape {shape}", list(residual.shape))
    return shape


def gemm_fake(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    shape = check(a, weight, bias, residual, weight_scale, activation, out_dtype)
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def gemm_reference(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check(a, weight, bias, residual, weight_scale, activation, out_dtype)
    out = reference.gemm(a, weight, bias, residual, weight_scale, activation)
    return out.to(out_dtype or a.dtype).contiguous()


def bmm_fake(a: Tensor, weight: Tensor) -> Tensor:
    op = "bmm"
    require_dims(op, "a", a, "[batch, m, k]")
    require_float(op, "a", a)
    require_dims(op, "weight", weight, "[batch, k, n]")
    require_dtype(op, "weight", weight, a.dtype)
    require_device(op, "weight", weight, a.device)
    require(op, "weight", weight.size(0) == a.size(0), f"{a.size(0)} batch entries, as a", weight.size(0))
    require(op, "weight", weight.size(1) == a.size(2), f"k {a.size(2)}, as a", weight.size(1))
    return a.new_empty((a.size(0), a.size(1), weight.size(2)))


def bmm_reference(a: Tensor, weight: Tensor) -> Tensor:
    bmm_fake(a, weight)
    return reference.bmm(a, weight).to(a.dtype).contiguous()


def gemm_vmap(
    info: Any,
    in_dims: Dims,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """The mapped dimension is one more of those that rows lie in, if the weight and what belongs to it are shared."""
    gemm = torch.ops.flashmla.gemm.default
    a_dim, weight_dim, bias_dim, residual_dim, scale_dim = (*in_dims, None, None, None)[:5]
    if weight_dim is not None or bias_dim is not None or scale_dim is not None:
        return each(gemm, info, in_dims, a, weight, bias, residual, weight_scale, activation, out_dtype)
    rows = front(a, a_dim, info.batch_size)
    added = None if residual is None else front(residual, residual_dim, info.batch_size)
    return gemm(rows, weight, bias, added, weight_scale, activation, out_dtype), 0


def gemm_autocast(
    dtype: torch.dtype,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """The residual is cast to the dtype of the result, which may be asked for."""
    left, right, added = (cast(x, dtype) for x in (a, weight, bias))
    return left, right, added, cast(residual, out_dtype or left.dtype), weight_scale, activation, out_dtype


def bmm_vmap(info: Any, in_dims: Dims, a: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """The mapped dimension joins the batch, or the rows where the weight is shared, which is then read once."""
    size, (a_dim, weight_dim) = info.batch_size, in_dims
    if weight_dim is None:
        rows = front(a, a_dim, size).movedim(0, 1)  # [batch, size, m, k]
        out = torch.ops.flashmla.bmm(rows.flatten(1, 2), weight)
        return out.unflatten(1, rows.shape[1:3]), 1
    out = torch.ops.flashmla.bmm(folded(a, a_dim, size), folded(weight, weight_dim, size))
    return out.unflatten(0, (size, weight.size(0 if weight_dim else 1))), 0


ARGUMENTS = (
    "Tensor a, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? weight_scale=None,"
    ' str activation="none", ScalarType? out_dtype=None'
)


def check_out(op: str, out: Tensor, expected: Tensor, inputs: dict[str, Any]) -> None:
    """The preconditions of an output tensor: those of the fake result, and no memory of the ``inputs``."""
    require_dtype(op, "out", out, expected.dtype)
    require_device(op, "out", out, expected.device)
    same = out.dim() == expected.dim() and all(x == y for x, y in zip(out.shape, expected.shape, strict=True))
    require(op, "out", same, f"shape {list(expected.shape)}", list(out.shape))
    read = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    if "residual" in read and same_elements(out, read["residual"]):
        del read["residual"]  # each element is read before it is written
    require_apart(op, "out", out, **read)


def into(functional: Function, fake: Function, op: str) -> Function:
    """The implementation of an ``.out`` overload by the functional one, on whatever device that has a kernel."""
    signature = inspect.signature(fake)

    def implementation(*args: object, out: Tensor, **kwargs: object) -> None:
        check_out(op, out, fake(*args, **kwargs), signature.bind(*args, **kwargs).arguments)
        out.copy_(functional(*args, **kwargs))

    return implementation


def into_fake(fake: Function, op: str) -> Function:
    signature = inspect.signature(fake)

    def implementation(*args: object, out: Tensor, **kwargs: object) -> None:
        check_out(op, out, fake(*args, **kwargs), signature.bind(*args, **kwargs).arguments)

    return implementation


define(
    f"{OP}({ARGUMENTS}) -> Tensor",
    fake=gemm_fake,
    reference=gemm_reference,
    vmap=gemm_vmap,
    autocast=gemm_autocast,
)
define(
    "bmm(Tensor a, Tensor weight) -> Tensor",
    fake=bmm_fake,
    reference=bmm_reference,
    vmap=bmm_vmap,
    autocast=all_cast,
)
# They return nothing, as `decode.out` does and for its reasons.
define(
    f"{OP}.out({ARGUMENTS}, *, Tensor(a!) out) -> ()",
    fake=into_fake(gemm_fake, OP),
    reference=into(torch.ops.flashmla.gemm.default, gemm_fake, OP),
)
define(
    "bmm.out(Tensor a, Tensor weight, *, Tensor(a!) out) -> ()",
    fake=into_fake(bmm_fake, "bmm"),
    reference=into(torch.ops.flashmla.bmm.default, bmm_fake, "bmm"),
)
