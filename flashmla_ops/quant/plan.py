"""Which format each linear layer of a model gets, and why some keep their weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from flashmla_ops.errors import ArgumentError
from flashmla_ops.nn.fast_linear import FastLinear
from flashmla_ops.ops.check import FLOATS, dtype_name
from flashmla_ops.quant.linear import QuantizedLinear
from flashmla_ops.quant.weights import FORMATS, INT4_NAMES, INT8, NATIVE

#: A format for each layer, by the layer's name.
Plan = Mapping[str, str]

INT4 = "int4"
MIXED = "int8-attention+int4-mlp"
WEIGHTS = (INT4, *FORMATS, NATIVE, MIXED)
#: Names of modules, one of which a layer of an MLP has in its path.
MLP = re.compile(r"(^|[._])(mlp|ffn|feed_forward|fc\d?|experts?|shared_experts?)([._]|$)")


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer, with its name."""
    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))


def planned(model: nn.Module, weights: str | Plan, keep: Collection[str]) -> dict[str, tuple[str, str]]:
    """A format for each linear layer that has none yet, and why, where it is not the one asked for.

    Raises `ArgumentError` for names of formats and layers that there are not.
    """
    layers = {name: layer for name, layer in linear_layers(model) if not isinstance(layer, QuantizedLinear)}
    asked = _asked(layers, weights)
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    found = {}
    for name, layer in layers.items():
        reason = f"named in keep: {', '.join(keep)}" if name.rpartition(".")[2] in keep or name in keep else ""
        reason = reason or _obstacle(layer)
        if not reason and owners[id(layer.weight)] > 1:
            reason = f"its weight is also that of {_other_owner(model, layer)}"
        wanted = asked.get(name, NATIVE)
        found[name] = (NATIVE, reason) if reason or wanted == NATIVE else _fitting(layer, wanted)
    return found


def _asked(layers: Mapping[str, nn.Linear], weights: str | Plan) -> dict[str, str]:
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise ArgumentError("quantize", "weights", f"one of {', '.join(WEIGHTS)}, or a format by layer", weights)
        if weights != MIXED:
            return dict.fromkeys(layers, weights)
        return {name: INT4 if MLP.search(name) else INT8.name for name in layers}
    known = (INT4, *FORMATS, NATIVE)
    for name, wanted in weights.items():
        if name not in layers:
            raise ArgumentError("quantize", "weights", "names of linear layers that are not quantised", name)
        if wanted not in known:
            raise ArgumentError("quantize", f"weights['{name}']", f"one of {', '.join(known)}", wanted)
    return dict(weights)


def _obstacle(layer: nn.Linear) -> str:
    """Why a layer is more than its weight, or has one that no format takes; empty if neither."""
    # By identity: the class of FastLinear says that it equals nn.Linear, and so do those derived from it.
    if not any(type(layer) is known for known in (nn.Linear, FastLinear)):
        return f"a {type(layer).__name__}, and no plain nn.Linear"
    if "forward" in vars(layer):
        return "its forward was replaced, as offloading to another device does"
    if type(layer.weight) is not nn.Parameter:
        return f"its weight is a {type(layer.weight).__name__}"
    if layer.weight.dtype not in FLOATS:
        return f"no operator takes {dtype_name(layer.weight.dtype)}"
    return ""


def _other_owner(model: nn.Module, layer: nn.Linear) -> str:
    owners = (name for name, module in model.named_modules() if module is not layer)
    found: str = next(
        name for name in owners if id(layer.weight) in map(id, model.get_submodule(name)._parameters.values())
    )
    return found


def _fitting(layer: nn.Linear, wanted: str) -> tuple[str, str]:
    """The format asked for, or the next that the weight's sizes fit."""
    names = INT4_NAMES if wanted == INT4 else INT4_NAMES[INT4_NAMES.index(wanted) :] if wanted in INT4_NAMES else ()
    tried = [FORMATS[name] for name in (*names, INT8.name)]
    reasons = [each.obstacle(layer.out_features, layer.in_features) for each in tried]
    fits = next((each.name for each, reason in zip(tried, reasons, strict=True) if not reason), NATIVE)
    return fits, "" if fits == wanted else reasons[0]


def alternatives(layer: nn.Linear, chosen: str) -> list[str]:
    """A format, and those of more bits that the layer's weight may have as well."""
    names = list(FORMATS)[::-1]  # int4 of ever larger groups, after them int8
    larger = [INT8.name, *(name for name in names if name in INT4_NAMES)]
    allowed = larger[: larger.index(chosen) + 1]
    return [name for name in allowed if not FORMATS[name].obstacle(layer.out_features, layer.in_features)]
