"""torch.nn modules over the operators."""

from flashmla_ops.nn.fast_linear import FastLinear, fast_linear, restore_linear
from flashmla_ops.nn.flashmla import FlashMLA, Step

__all__ = ["FastLinear", "FlashMLA", "Step", "fast_linear", "restore_linear"]
