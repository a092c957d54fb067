"""Gradients against their definition, and the definition against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.poison import strided

#: What rounding may change, as a fraction of the size of what is summed.
ROUNDING = {"float32": 4e-6, "float16": 1e-3, "bfloat16": 1e-2}
#: What a difference of one in float32's last place of the log-sum-exp does to weights, for each unit of it.
LSE_ROUNDING = 2.4e-7


def largest(x: Tensor | None) -> float:
    """The largest finite magnitude."""
    if x is None or x.numel() == 0:
        return 0.0
    return x.double().abs().nan_to_num(0, 0, 0).max().item()


def answered(named: dict[str, Any], out: Tensor, lse: Tensor, seed: int, lay_out: bool) -> dict[str, Any]:
    """The arguments of a backward, from those of the forward and what it returned; an odd seed has a dlse."""
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=generator) if seed % 2 else None
    if lay_out:
        dout, out, lse = (strided(x, generator, contiguous_rows=False) for x in (dout, out, lse))
    return named | {"dout": dout, "dlse": dlse, "out": out, "lse": lse}


def score_size(arguments: dict[str, Any], values: Tensor, d_v: int) -> float:
    """Of the gradient with respect to a score, times the scale."""
    q, scale = arguments["q"], arguments["softmax_scale"]
    scale = abs(q.size(-1) ** -0.5 if scale is None else scale)
    return scale * (largest(arguments["dlse"]) + largest(values) * largest(arguments["dout"]) * d_v**0.5)


def problem(name: str, found: Tensor, expected: Tensor | None, size: float, lse: Tensor) -> str | None:
    """What is wrong with a gradient, if its error exceeds what rounding explains; ``size`` is of what is summed."""
    if expected is None:
        return None if found.shape == (0,) else f"{name}: something, where nothing was expected"
    if found.shape != expected.shape:
        return f"{name}: shape {list(found.shape)}, expected {list(expected.shape)}"
    rounding = ROUNDING[str(found.dtype).removeprefix("torch.")] + LSE_ROUNDING * largest(lse)
    error, bound = (found.double() - expected).abs(), rounding * (size + largest(expected))
    return None if (error <= bound).all() else f"{name}: {error.max()} > {bound}"


def defined(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    names: tuple[str, ...],
    options: dict[str, Any],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """(out, finite elements of lse) as a function of the tensors ``names``, with the gradients that are defined."""

    class Defined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            results = forward(**dict(zip(names, tensors, strict=True)), **options)
            ctx.save_for_backward(*tensors, *results)
            return results

        @staticmethod
        def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
            *tensors, out, lse = ctx.saved_tensors
            given = dict(zip(names, tensors, strict=True)) | options
            return tuple(x for x in backward(**given, dout=dout, dlse=dlse, out=out, lse=lse) if x is not None)

    def results(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = Defined.apply(*tensors)
        return out, lse[lse.isfinite()]

    return results
