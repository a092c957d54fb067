"""`fast_linear`: a model's linear layers on `flashmla::gemm`, which streams weights faster when there are few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FastLinear(nn.Linear):
    """An ``nn.Linear`` whose forward is `flashmla::gemm`. Parameters, hooks and state_dict are those of the original.

    Where a gradient is required, or under autocast, it is the original: the operator has no backward.
    """

    def forward(self, input: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if needs_grad or torch.is_autocast_enabled(input.device.type) or input.dtype != self.weight.dtype:
            return super().forward(input)
        out: Tensor = torch.ops.flashmla.gemm(input, self.weight, self.bias)
        return out


def fast_linear(model: nn.Module) -> int:
    """Swap every plain ``nn.Linear`` of ``model`` for `FastLinear`, in place; returns how many.

    Only layers whose class is exactly ``nn.Linear``, with floating weights on the CPU, are touched. No weight is copied
    or packed, so tied weights stay tied and ``state_dict`` is unchanged. `restore_linear` undoes it.
    """
    return _swap(model, nn.Linear, FastLinear)


def restore_linear(model: nn.Module) -> int:
    """Undo `fast_linear`; returns how many layers were swapped back."""
    return _swap(model, FastLinear, nn.Linear)


def _swap(model: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> int:
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is old and layer.weight.is_floating_point() and layer.weight.device.type == "cpu"
    ]
    for layer in layers:
        layer.__class__ = new
    return len(layers)
