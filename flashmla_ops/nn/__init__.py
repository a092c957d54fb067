"""torch.nn modules over the operators."""

from flashmla_ops.nn.flashmla import FlashMLA, Step

__all__ = ["FlashMLA", "Step"]
