"""torch.nn modules, and functions that models call, over the operators.

Names that need transformers are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashmla_ops.nn.fast_linear import FastLinear, PanelLinear, fast_linear, restore_linear
from flashmla_ops.nn.flashmla import FlashMLA
from flashmla_ops.nn.prefix import latents_to_heads, prefill_with_prefix
from flashmla_ops.nn.v41 import RowSource, rotated, v41_attention

if TYPE_CHECKING:
    from flashmla_ops.nn.calibration import perplexity
    from flashmla_ops.nn.conversion import convert, is_converted, restore
    from flashmla_ops.nn.layer import FlashMLALayer
    from flashmla_ops.nn.low_rank import Compression, compress

__all__ = [
    "Compression",
    "FastLinear",
    "FlashMLA",
    "FlashMLALayer",
    "PanelLinear",
    "RowSource",
    "compress",
    "convert",
    "fast_linear",
    "is_converted",
    "latents_to_heads",
    "perplexity",
    "prefill_with_prefix",
    "restore",
    "restore_linear",
    "rotated",
    "v41_attention",
]

_NEEDS_TRANSFORMERS = {
    "Compression": "low_rank",
    "FlashMLALayer": "layer",
    "compress": "low_rank",
    "convert": "conversion",
    "is_converted": "conversion",
    "perplexity": "calibration",
    "restore": "conversion",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_NEEDS_TRANSFORMERS[name]}"), name)
    return value
