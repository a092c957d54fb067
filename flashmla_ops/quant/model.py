"""`quantize` and `dequantize`: a model's linear layers with weights in integers, and back."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError
from flashmla_ops.quant.feedback import input_moments
from flashmla_ops.quant.linear import QuantizedLinear, pack, unpack
from flashmla_ops.quant.plan import Plan, alternatives, linear_layers, planned
from flashmla_ops.quant.report import Report, report
from flashmla_ops.quant.search import Encoded, check_tokens, search, token_losses
from flashmla_ops.quant.weights import FORMATS, NATIVE, check_weight

#: Absorbed attention reads these weights as they are.
KEEP = ("kv_b_proj",)
AUTO = "auto"


def quantize(
    model: nn.Module,
    weights: str | Plan = "int4",
    *,
    mixed: str | None = None,
    calibration: Tensor | None = None,  # [n, s] token ids
    held_out: Tensor | None = None,  # [n, s]
    tolerance: float = 0.01,
    cache: str | None = None,
    keep: Collection[str] = KEEP,
) -> Report:
    """Keep the weights of ``model``'s linear layers in integers, in place, for inference; what each became.

    ``weights``: "int8" (a scale for each row), "int4" (a scale for each 128, 64 or 32 elements of a row: the most that
    divides it), "int4_g128", "int4_g64", "int4_g32", "int8-attention+int4-mlp" (int4 for the layers of MLPs, int8 for
    the others), or a format for each layer by name, as ``plan`` of a report has them: layers without one stay.

    ``calibration``, text like that which the model will see, lets int4 make up for what it rounds as the layers' inputs
    there weigh it (see `quant.feedback`). ``mixed="auto"`` chooses for each layer between that format, those of more
    bits, and its weight as it is: as few bytes as keep the perplexity of every second sequence of ``calibration``, with
    the others to round by, within ``tolerance`` of before (see `quant.search`); it takes memory for the weights in
    every format. ``held_out`` is text that nothing is chosen by. Both are for causal language models of transformers;
    the report has perplexity before and after on them.

    ``cache`` is the ``cache_format`` of `enable`, which is then called too: rows of bytes in paged caches of MLA.

    A layer stays as it is, and the report says why, if its weight is shared (a head that is tied to the embedding), if
    it is more than an ``nn.Linear``, if its rows are no multiple of 16, and if ``keep`` has its name or the last part
    of it. So do weights that are none of a linear layer: embeddings, experts in one tensor. Where int4 does not fit, a
    smaller group or int8 is taken. Weights on the meta device become empty ones, to load a ``state_dict`` into.

    The weights before are gone: `dequantize` returns to linear layers with rounded weights. Raises `ArgumentError` for
    names that there are not, and for weights that are not finite, leaving the model unchanged; and what `enable` does.
    """
    if mixed not in (None, AUTO):
        raise ArgumentError("quantize", "mixed", f"{AUTO!r} or None", repr(mixed))
    if mixed == AUTO and calibration is None:
        raise ArgumentError("quantize", "calibration", f"token ids [n, s] with mixed={AUTO!r}", "none")
    if not 0.0 < tolerance < math.inf:
        raise ArgumentError("quantize", "tolerance", "a positive number", tolerance)
    given = {"calibration": calibration, "held_out": held_out}
    texts = {name: check_tokens(name, ids) for name, ids in given.items() if ids is not None}
    formats = planned(model, weights, keep)
    layers = {name: layer for name, layer in linear_layers(model) if formats.get(name, (NATIVE,))[0] != NATIVE}
    for name, layer in layers.items():
        check_weight(layer.weight, f"{name}.weight".removeprefix("."))
    if cache is not None:
        from flashmla_ops.integrations.transformers import enable

        enable(model, cache_format=cache)
    before = perplexities(model, texts)
    chosen: dict[str, tuple[str, Encoded | None]] = {name: (formats[name][0], None) for name in layers}
    moments = {}
    if calibration is not None:
        to_round, to_choose = halves(calibration) if mixed == AUTO else (calibration, calibration)
        moments = input_moments(model, layers, to_round)
    notes = {name: note for name, (_, note) in formats.items()}
    if mixed == AUTO:
        options = {name: alternatives(layer, formats[name][0]) for name, layer in layers.items()}
        chosen = search(model, options, to_choose, tolerance, moments)
        notes |= {name: "kept for perplexity" if found == NATIVE else "" for name, (found, _) in chosen.items()}
    for name, layer in layers.items():
        found, encoded = chosen[name]
        if found != NATIVE:
            pack(layer, FORMATS[found], encoded, moments.pop(name, None))
    after = perplexities(model, texts)
    return replace(report(model, notes), perplexity={name: (before[name], after[name]) for name in texts})


def halves(calibration: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences to round by, and those to choose formats by: text that rounding has not seen, if there are two."""
    return (calibration[::2], calibration[1::2]) if len(calibration) > 1 else (calibration, calibration)


def perplexities(model: nn.Module, texts: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: math.exp(float(token_losses(model, ids).mean())) for name, ids in texts.items()}


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
