"""``flashmla::gemm``, ``bmm`` and ``grouped_gemm`` on CUDA: CUTLASS kernels where one fits, else torch's operators.

silu_mul takes two launches: the gate half of the weight, whose result is rounded once to a's type, then the other half
with an epilogue that multiplies by silu of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_kernels.gemm.choose import Fallback
from cutlass_kernels.gemm.epilogue import Epilogue
from cutlass_kernels.gemm.problem import Problem
from flashmla_ops.cuda import aten
from flashmla_ops.cuda.launch import NAMES, Launcher, gemm_call, grouped_gemm_call
from flashmla_ops.ops.gemm import BMM, GEMM
from flashmla_ops.ops.grouped_gemm import GROUPED_GEMM
from flashmla_ops.panels import as_rows
from flashmla_ops.reference.gemm import values


def _rows(tensor: Tensor, columns: int) -> Tensor:
    """[..., columns] as rows of contiguous elements; copied only where strides leave no other way."""
    rows = tensor.reshape(-1, columns)
    return rows if rows.stride(-1) == 1 or columns == 1 else rows.contiguous()


def fused(activation: str, *, gate: bool = False, residual: bool = False) -> Epilogue:
    return Epilogue(col_scale=True, bias=True, activation=activation, gate=gate, residual=residual)


def gemm(
    launcher: Launcher,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out: Tensor = GEMM.fake(a, weight, bias, residual, weight_scale, activation, out_dtype)
    if out.numel() == 0:
        return out
    if weight.dtype == torch.int32:
        weight, weight_scale = values(weight, weight_scale, torch.float32).to(a.dtype), None
    weight = as_rows(weight)  # panels are for the CPU's kernels
    left, flat = _rows(a, a.size(-1)), out.view(-1, out.size(-1))
    added = None if residual is None else _rows(residual, out.size(-1))
    run = _gated if activation == "silu_mul" else _single
    if run(launcher, left, weight, flat, bias, added, weight_scale, activation):
        return out
    return aten.gemm(a, weight, bias, residual, weight_scale, activation, out_dtype)


def _problem(a: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue) -> Problem:
    types = (NAMES[a.dtype], NAMES[weight.dtype], NAMES[out.dtype])
    return Problem(a.size(0), out.size(1), a.size(1), *types, epilogue=epilogue)


def _single(
    launcher: Launcher,
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    activation: str,
) -> bool:
    """One launch. The plain epilogue can add one matrix, and split k."""
    if activation == "none" and scale is None and bias is None:
        return launcher.launch(_problem(a, weight, out, Epilogue()), gemm_call(a, weight, out, residual))
    epilogue = fused(activation, residual=residual is not None)
    return launcher.launch(_problem(a, weight, out, epilogue), gemm_call(a, weight, out, residual, bias, scale))


def _gated(
    launcher: Launcher,
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    activation: str,
) -> bool:
    """Two launches, or none: what the second one cannot do is known before the first."""
    problem = _problem(a, weight, out, fused("none", gate=True))
    if residual is not None:
        launcher.remember(problem, Fallback(f"no kernel adds a residual after {activation}"))
        return False
    if isinstance(launcher.choose(problem), Fallback):
        return False
    n = out.size(1)
    gate = torch.empty_like(out)

    def half(tensor: Tensor | None, start: int) -> Tensor | None:
        return None if tensor is None else tensor[start : start + n]

    if not _single(launcher, a, weight[:n], gate, half(bias, 0), None, half(scale, 0), "none"):
        return False
    return launcher.launch(problem, gemm_call(a, weight[n:], out, gate, half(bias, n), half(scale, n)))


def bmm(launcher: Launcher, a: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = BMM.fake(a, weight)
    if out.numel() == 0:
        return out
    left = a if a.stride(-1) == 1 or a.size(-1) == 1 else a.contiguous()
    along_n = weight.stride(-1) == 1 or weight.size(-1) == 1
    right = weight if along_n else weight.mT
    if right.stride(-1) != 1 and right.size(-1) != 1:
        along_n, right = True, weight.contiguous()
    types = (NAMES[a.dtype],) * 3
    family = "batched" if along_n else "linear"
    problem = Problem(a.size(1), out.size(2), a.size(2), *types, family=family, batch=a.size(0))
    if launcher.launch(problem, gemm_call(left, right, out)):
        return out
    return aten.bmm(a, weight)


def grouped_gemm(launcher: Launcher, a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out: Tensor = GROUPED_GEMM.fake(a, weight, offsets)
    if out.numel() == 0:
        return out
    left = a if a.stride(-1) == 1 or a.size(-1) == 1 else a.contiguous()
    types = (NAMES[a.dtype], NAMES[weight.dtype], NAMES[out.dtype])
    problem = Problem(a.size(0), out.size(1), a.size(1), *types, family="grouped")
    starts = offsets.contiguous()
    if launcher.launch(problem, grouped_gemm_call(left, weight, starts, out)):
        return out
    return aten.grouped_gemm(a, weight, offsets)
