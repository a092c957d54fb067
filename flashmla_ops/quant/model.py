"""`quantize` and `dequantize`: a model's linear layers with weights in integers, and back."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from flashmla_ops.errors import ArgumentError
from flashmla_ops.quant.linear import QuantizedLinear, pack, unpack
from flashmla_ops.quant.plan import Plan, linear_layers, planned
from flashmla_ops.quant.report import Report, report
from flashmla_ops.quant.weights import FORMATS, NATIVE, check_weight

#: Absorbed attention reads these weights as they are.
KEEP = ("kv_b_proj",)


def quantize(model: nn.Module, weights: str | Plan = "int4", *, keep: Collection[str] = KEEP) -> Report:
    """Keep the weights of ``model``'s linear layers in integers, in place, for inference; what each became.

    ``weights``: "int8" (a scale for each row), "int4" (a scale for each 128, 64 or 32 elements of a row: the most that
    divides it), "int4_g128", "int4_g64", "int4_g32", "int8-attention+int4-mlp" (int4 for the layers of MLPs, int8 for
    the others), or a format for each layer by name, as ``plan`` of a report has them: layers without one stay.

    A layer stays as it is, and the report says why, if its weight is shared (a head that is tied to the embedding), if
    it is more than an ``nn.Linear``, if its rows are no multiple of 16, and if ``keep`` has its name or the last part
    of it. So do weights that are none of a linear layer: embeddings, experts in one tensor. Where int4 does not fit, a
    smaller group or int8 is taken. Weights on the meta device become empty ones, to load a ``state_dict`` into.

    The weights before are gone: `dequantize` returns to linear layers with rounded weights. Raises `ArgumentError` for
    names that there are not, and for weights that are not finite, leaving the model unchanged.
    """
    formats = planned(model, weights, keep)
    layers = {name: layer for name, layer in linear_layers(model) if formats.get(name, (NATIVE,))[0] != NATIVE}
    for name, layer in layers.items():
        check_weight(layer.weight, f"{name}.weight".removeprefix("."))
    for name, layer in layers.items():
        pack(layer, FORMATS[formats[name][0]])
    return report(model, {name: note for name, (_, note) in formats.items()})


def dequantize(model: nn.Module) -> int:
    """Make every `QuantizedLinear` an ``nn.Linear`` with what its integers stand for; returns how many.

    Weights are rounded as they were: load the model again for the original ones. Raises `ArgumentError` if there is no
    quantised layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    if not layers:
        raise ArgumentError("dequantize", "model", "a model that was quantised", type(model).__name__)
    for layer in layers:
        unpack(layer)
    return len(layers)
