"""torch.nn modules, and functions that models call, over the operators."""

from flashmla_ops.nn.fast_linear import FastLinear, PanelLinear, fast_linear, restore_linear
from flashmla_ops.nn.flashmla import FlashMLA
from flashmla_ops.nn.prefix import latents_to_heads, prefill_with_prefix

__all__ = [
    "FastLinear",
    "FlashMLA",
    "PanelLinear",
    "fast_linear",
    "latents_to_heads",
    "prefill_with_prefix",
    "restore_linear",
]
