"""The mix of formats that keeps a model's perplexity: which layers can do with fewer bits is measured.

What rounding a layer costs is estimated for each format from one backward of the calibration text: half the mean
square, over tokens, of the change of a token's loss to first order, gradient times change of the layer's output
(the diagonal Fisher information of the layer's output). The estimates only rank: layers step from format to format in
the order of loss for bytes saved, and how many steps are taken is decided by perplexity, measured with the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError
from flashmla_ops.quant.linear import QuantizedLinear, pack, unpack
from flashmla_ops.quant.weights import FORMATS, NATIVE, decode

Encoded = tuple[Tensor, Tensor]
#: Standard errors that the mean change of a token's loss is held to be above what was measured.
MARGIN = 2.0


@dataclass(frozen=True)
class Step:
    """One layer from a format to one of fewer bytes."""

    layer: str
    format: str
    slope: float  # loss for bytes saved


def check_tokens(name: str, ids: Any) -> Tensor:
    """Token ids ``[n, s]``. Raises `ArgumentError` for anything else."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.size(0) < 1 or ids.size(1) < 2 or ids.is_floating_point():
        found = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError("quantize", name, "token ids [n, s], s at least 2", found)
    return ids


@torch.no_grad()
def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first of sequences ``[n, s]``: ``[n, s - 1]`` float64."""
    found = []
    for sequence in ids:
        logits = model(sequence[None], use_cache=False).logits[0, :-1].float()
        found.append(nn.functional.cross_entropy(logits, sequence[1:], reduction="none").double())
    return torch.stack(found)


def search(
    model: nn.Module,
    options: Mapping[str, Sequence[str]],  # of each layer, the formats that it may have
    calibration: Tensor,  # [n, s]
    tolerance: float,
    moments: Mapping[str, Tensor],
) -> dict[str, tuple[str, Encoded | None]]:
    """A format for each layer: as few bytes as keep perplexity within ``tolerance`` of before. Leaves ``model`` as is.

    With it comes the weight in that format. ``moments`` are those that `WeightFormat.encode` rounds by.
    The mean change of a token's loss, and `MARGIN` standard errors of it, are within log(1 + tolerance).
    """
    layers = {name: _linear(model, name) for name in options}
    encoded = {
        name: {each: FORMATS[each].encode(layers[name].weight, moments.get(name)) for each in options[name]}
        for name in options
    }
    before = token_losses(model, calibration)
    costs = estimated_costs(model, layers, encoded, calibration)
    steps = sorted(
        (step for name in options for step in _hull(name, layers[name], encoded[name], costs[name])), key=_slope
    )
    fits, fails = 0, len(steps) + 1
    while fails - fits > 1:
        tried = len(steps) if fails > len(steps) and fits == 0 else (fits + fails) // 2
        with _applied(layers, encoded, plan_of(steps[:tried])):
            change = (token_losses(model, calibration) - before).flatten()
        worst = change.mean() + MARGIN * change.std() / math.sqrt(change.numel())
        fits, fails = (tried, fails) if float(worst) <= math.log1p(tolerance) else (fits, tried)
    plan = plan_of(steps[:fits])
    return {name: (plan[name], encoded[name][plan[name]]) if name in plan else (NATIVE, None) for name in options}


def plan_of(steps: Sequence[Step]) -> dict[str, str]:
    return {step.layer: step.format for step in steps}


def estimated_costs(
    model: nn.Module, layers: Mapping[str, nn.Linear], encoded: Mapping[str, Mapping[str, Encoded]], ids: Tensor
) -> dict[str, dict[str, float]]:
    """What each format of each layer costs, in loss of a token, estimated on sequences ``ids [n, s]``."""
    costs = {name: dict.fromkeys(encoded[name], 0.0) for name in layers}
    changes = {
        name: {each: decode(*kept, layer.weight.dtype) - layer.weight.detach() for each, kept in encoded[name].items()}
        for name, layer in layers.items()
    }

    def note(name: str, a: Tensor, gradient: Tensor) -> None:
        for each, change in changes[name].items():
            first_order = (nn.functional.linear(a, change).float() * gradient.float()).sum(-1)
            costs[name][each] += 0.5 * float(first_order.double().square().sum()) / (ids.numel() - len(ids))

    def watch(name: str, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            a = args[0].detach()
            out.register_hook(lambda gradient: note(name, a, gradient.detach()))

    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: watch(name, args, out))
        for name, layer in layers.items()
    ]
    try:
        with torch.enable_grad(), _differentiable(model):
            for sequence in ids:
                logits = model(sequence[None], use_cache=False).logits[0, :-1].float()
                nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
    return costs


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients flow through all layers, and are kept for no parameter but embeddings, which are put back."""
    wanted = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    embedding = set(model.get_input_embeddings().parameters())  # type: ignore[operator]
    try:
        for parameter in wanted:
            parameter.requires_grad_(parameter in embedding)
        yield
    finally:
        for parameter, (required, gradient) in wanted.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _hull(name: str, layer: nn.Linear, encoded: Mapping[str, Encoded], costs: Mapping[str, float]) -> Iterator[Step]:
    """From its weight to ever fewer bytes, by those formats alone that no mixture of others is better than."""
    sizes = {each: sum(part.nbytes for part in kept) for each, kept in encoded.items()}
    at, cost, left = layer.weight.nbytes, 0.0, dict(sizes)
    while left := {each: size for each, size in left.items() if size < at}:
        slopes = {each: max(0.0, costs[each] - cost) / (at - size) for each, size in left.items()}
        best = min(left, key=lambda each: (slopes[each], left[each]))
        yield Step(name, best, slopes[best])
        at, cost = sizes[best], max(cost, costs[best])


def _slope(step: Step) -> float:
    return step.slope


@contextmanager
def _applied(
    layers: Mapping[str, nn.Linear], encoded: Mapping[str, Mapping[str, Encoded]], plan: Mapping[str, str]
) -> Iterator[None]:
    weights = {name: layers[name]._parameters["weight"] for name in plan}
    try:
        for name, chosen in plan.items():
            pack(layers[name], FORMATS[chosen], encoded[name][chosen])
        yield
    finally:
        for name, weight in weights.items():
            if isinstance(layer := layers[name], QuantizedLinear):
                unpack(layer, weight)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
