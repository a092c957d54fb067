"""The short import name: ``from flashmla import FlashMLA``."""

from flashmla_ops.nn import FlashMLA

__all__ = ["FlashMLA"]
