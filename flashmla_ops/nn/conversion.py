"""`convert` and `restore`: all attention layers of a transformers model as `FlashMLALayer`, and back."""

from __future__ import annotations

from torch import nn

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers.hook import is_enabled, nothing_served, served_modules
from flashmla_ops.nn.layer import FlashMLALayer, chosen_sparsity, why_unconvertible
from flashmla_ops.sparsity import DynamicSparsity


def convert(
    model: nn.Module,
    *,
    layers: int = 3,
    threshold: float | None = None,
    sparsity: DynamicSparsity | None = None,
    preallocate: bool = False,
) -> int:
    """Put `FlashMLALayer.from_attention` of every attention of ``model`` in its place; returns how many.

    Weights, ``state_dict`` and tokens stay what they were. Options are those of `FlashMLALayer`; calling it again
    changes them. `restore` undoes it. Raises, leaving the model unchanged, `UnsupportedModelError` with the type of the
    model and the reason if it has no attention that is known to be exact, or one that is not, and `ArgumentError` for
    options.
    """
    modules = served_modules(model)
    if not modules:
        raise UnsupportedModelError(nothing_served(model))
    for name, module in modules:
        if not isinstance(module, FlashMLALayer) and (reason := why_unconvertible(module)):
            raise UnsupportedModelError(f"{name}{reason}")
    told: set[str] = set()
    chosen = chosen_sparsity(threshold, sparsity)
    converted = {
        id(module): FlashMLALayer.from_attention(
            module, layers=layers, sparsity=chosen, preallocate=preallocate, told=told
        )
        for _, module in modules
    }
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) in converted:
                setattr(parent, name, converted[id(child)])
    return len(modules)


def restore(model: nn.Module) -> int:
    """Undo `convert` and `FlashMLALayer.from_attention`: modules are where they were before; returns how many.

    What was changed in a layer's parameters, submodules and hooks since is in that module too, because they are shared.
    Raises `UnsupportedModelError` if ``model`` has no such layer, or is enabled: call ``disable`` first.
    """
    layers = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, FlashMLALayer) and child.replaced
    ]
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} is not converted")
    if is_enabled(model):
        raise UnsupportedModelError(f"{type(model).__name__} is enabled: call disable(model) first")
    for parent, name, layer in layers:
        (before,) = layer.replaced
        before.training = layer.training
        setattr(parent, name, before)
    return len(layers)


def is_converted(model: nn.Module) -> bool:
    """Whether every attention of ``model`` is a `FlashMLALayer`."""
    modules = served_modules(model)
    return bool(modules) and all(isinstance(module, FlashMLALayer) for _, module in modules)
