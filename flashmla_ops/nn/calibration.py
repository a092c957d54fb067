"""What is measured of a model by running it on text: moments of layers' inputs, distances of attention, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Calibration:
    """One attention layer on calibration data."""

    moments: Tensor  # [e + 1, e + 1] float64: E[x x^T] of the layer's input with a 1 behind it
    distances: Tensor  # [s] float64: how much is attended to at each distance, on average
    angles: Tensor  # [d / 2] float64: the turn of each pair from one token to the next

    def mean_turn(self, d: int) -> tuple[Tensor, Tensor]:
        """Means of cos and sin ``[d / 2]`` of the turns that attention sees: a key's, less its query's."""
        turns = -torch.arange(len(self.distances), dtype=torch.float64)[:, None] * self.angles
        weights = (self.distances / self.distances.sum())[:, None]
        return (turns.cos() * weights).sum(0), (turns.sin() * weights).sum(0)


@torch.no_grad()
def calibrate(model: Any, layers: Sequence[nn.Module], ids: Tensor) -> list[Calibration]:
    """Run ``model`` on sequences ``ids [n, s]``, one at a time, with eager attention, which shows its weights."""
    found: list[list[Tensor]] = [[] for _ in layers]
    s = ids.shape[1]
    distance = (torch.arange(s)[:, None] - torch.arange(s)).clamp(min=0).flatten()

    def note(index: int, kwargs: dict[str, Any], out: Any) -> None:
        x = kwargs["hidden_states"][0].double().cpu()
        x = torch.cat([x, x.new_ones(s, 1)], dim=1)
        weights = out[1][0].double().cpu().mean(0).flatten()
        cos, sin = (each[0, 1].double().cpu() for each in kwargs["position_embeddings"])
        new = [x.mT @ x / s, torch.zeros(s, dtype=torch.float64).index_add_(0, distance, weights)]
        old = found[index][:2] or [torch.zeros_like(each) for each in new]
        found[index] = [a + b for a, b in zip(old, new, strict=True)] + [torch.atan2(sin, cos)[: len(cos) // 2]]

    hooks = [
        layer.register_forward_hook(lambda module, args, kwargs, out, i=i: note(i, kwargs, out), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for sequence in ids:
            model(sequence[None], use_cache=False)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return [Calibration(moments / len(ids), distances, angles) for moments, distances, angles in found]


@torch.no_grad()
def output_errors(model: Any, layers: Sequence[nn.Module], others: Sequence[nn.Module], ids: Tensor) -> list[float]:
    """Relative errors of the outputs of ``others`` for the inputs that ``layers`` have when ``model`` reads ``ids``."""
    errors: list[float] = []

    def compare(other: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        difference = other(*args, **kwargs)[0] - out[0]
        errors.append(float(difference.norm() / out[0].norm()))

    hooks = [
        layer.register_forward_hook(
            lambda module, args, kwargs, out, other=other: compare(other, args, kwargs, out), with_kwargs=True
        )
        for layer, other in zip(layers, others, strict=True)
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token but the first, over sequences ``ids [n, s]``."""
    total = 0.0
    for sequence in ids:
        logits = model(sequence[None], use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, sequence[1:], reduction="sum"))
    return math.exp(total / (len(ids) * (ids.shape[1] - 1)))
