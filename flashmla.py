"""The short import name: ``from flashmla import FlashMLA, FlashMLALayer, convert, restore``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flashmla_ops.nn
from flashmla_ops.nn import FlashMLA

if TYPE_CHECKING:
    from flashmla_ops.nn import FlashMLALayer, convert, is_converted, restore

__all__ = ["FlashMLA", "FlashMLALayer", "convert", "is_converted", "restore"]


def __getattr__(name: str) -> Any:
    """Names that need transformers are imported when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(flashmla_ops.nn, name)
