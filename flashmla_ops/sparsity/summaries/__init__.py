"""Summaries of pages, one kind a file: what is kept of a page's keys so that its softmax mass can be estimated."""

from __future__ import annotations

from flashmla_ops.sparsity.summaries.boxes import Boxes
from flashmla_ops.sparsity.summaries.codes import Codes
from flashmla_ops.sparsity.summaries.signs import Signs
from flashmla_ops.sparsity.summaries.spread import Spread
from flashmla_ops.sparsity.summaries.summary import Summary

#: Every kind by the name that operators take. Their order is their number in C++.
SUMMARIES: dict[str, Summary] = {each.name: each for each in (Codes(), Boxes(), Spread(), Signs())}
SUMMARY_NAMES = ", ".join(SUMMARIES)


def summary_bytes(kind: str, page_size: int, d: int) -> int:
    """Bytes of the summary of ``page_size`` keys of ``d`` elements."""
    return SUMMARIES[kind].n_bytes(page_size, d)


def summary_planes(kind: str) -> int:
    """How many planes a kind takes; 0 for none."""
    return SUMMARIES[kind].n_planes


__all__ = ["SUMMARIES", "SUMMARY_NAMES", "Summary", "summary_bytes", "summary_planes"]
