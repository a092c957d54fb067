"""Rounding with feedback: a column's error is made up for by those behind it, as the layer's inputs weigh them.

GPTQ (arXiv:2210.17323): with H the second moments of the inputs and U the upper Cholesky factor of its inverse, the
error of column j, divided by U[j, j], is subtracted from the columns behind it times U[j, behind].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError

#: Of the mean of H's diagonal, added to it: fewer tokens than columns leave H singular.
DAMPING = 0.01


@torch.no_grad()
def input_moments(model: nn.Module, layers: Mapping[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    """E[x x^T] ``[k, k]`` float32 of each layer's input when ``model`` reads sequences ``ids [n, s]``."""
    moments: dict[str, Tensor] = {}

    def note(name: str, a: Tensor) -> None:
        x = a.detach().flatten(0, -2).float()
        new = x.mT @ x / ids.numel()
        moments[name] = moments[name].add_(new) if name in moments else new

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        for sequence in ids:
            model(sequence[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, each in moments.items():
        if not bool(each.isfinite().all()):
            raise ArgumentError("quantize", "calibration", "text with finite activations", f"others, of {name}")
    return moments


def round_with_feedback(
    weight: Tensor,  # [n, k] float32
    moments: Tensor,  # [k, k]
    group: int,
    round_group: Callable[[Tensor], tuple[Tensor, Tensor]],  # [n, group] to codes [n, group] and scales [n, 1]
    codes_of: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # int8 [n, k], [n, k / group]
    """Codes and scales by groups along k, each scale chosen for what the columns are when their turn comes."""
    u = _inverse_factor(moments)
    left = weight.clone()
    codes, scales = torch.empty(weight.shape[::-1], dtype=torch.int8), []
    for start in range(0, weight.size(1), group):
        stop = start + group
        scale = round_group(left[:, start:stop])[1]
        factor = scale.float().where(scale != 0, 1.0).flatten()
        # A column of the weight is a row here: it is read as it lies.
        columns = left[:, start:stop].mT.contiguous()
        errors = torch.empty_like(columns)
        for j, column in enumerate(columns):
            code = codes_of(column, factor)
            codes[start + j] = code
            row = u[start + j, start + j : stop]
            errors[j] = (column - code * factor) / row[0]
            columns[j + 1 :].addr_(row[1:], errors[j], alpha=-1)
        left[:, stop:] -= errors.mT @ u[start:stop, stop:]
        scales.append(scale)
    return codes.mT.contiguous(), torch.cat(scales, dim=1)


def _inverse_factor(moments: Tensor) -> Tensor:
    """U ``[k, k]`` float32, upper, with U^T U the inverse of the moments, damped."""
    h = moments.double()
    mean = h.diagonal().mean()
    h = h + torch.eye(len(h), dtype=h.dtype) * (DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
