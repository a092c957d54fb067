"""The short import name: ``from flashmla import FlashMLA, FlashMLALayer, convert, restore``."""

from typing import TYPE_CHECKING

from flashmla_ops.nn import FlashMLA
from flashmla_ops.nn import __getattr__ as __getattr__  # imports what needs transformers when it is asked for

if TYPE_CHECKING:
    from flashmla_ops.nn import FlashMLALayer, convert, is_converted, restore

__all__ = ["FlashMLA", "FlashMLALayer", "convert", "is_converted", "restore"]
