"""`DynamicSparsity`: how pages are chosen, and the layers that it has chosen for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.sparsity.report import LayerReport, Report, Tally
from flashmla_ops.sparsity.summaries import SUMMARIES

OP = "DynamicSparsity"
#: The summaries that each mode takes, and its rule (see `flashmla::choose_pages`).
MODES: dict[str, tuple[str | None, str]] = {
    "certified": ("codes", "certified"),
    "estimate": ("codes", "share"),
    "lsh": ("signs", "share"),
    "boxes": ("boxes", "fraction"),
    "spread": ("spread", "share"),
    "mask": (None, "mask"),
}
#: From queries ``[b, s_q, h_q, d_qk]``, the rows of each sequence ``[b]`` and the number of pages in a block table to
#: which of them are attended to: bool ``[b or 1, h_kv or 1, max_pages]``.
PageMask = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class DynamicSparsity:
    """Decoding attends to the pages that matter to a query, chosen anew for each; all else stays as it is.

        sparse = DynamicSparsity(mode="certified", eps=0.1)
        enable(model, sparsity=sparse)
        model.generate(...)
        print(sparse.report())

    ``mode`` says how pages are chosen, for the query heads of each KV head together:

    - "certified": skip as much as is proven to hold less than ``eps`` of any query's softmax;
    - "estimate": skip a page of which every query is estimated to give less than ``tau`` of its softmax;
    - "lsh": as "estimate", with scores estimated by Hamming distances of SimHash signatures;
    - "boxes": attend to the share ``keep`` of the pages, ranked by the best corner of a box around their keys (Quest);
    - "spread": as "estimate", by mean and standard deviation of a page's keys;
    - "mask": attend to the pages that ``mask`` says, a tensor or a function (see `PageMask`).

    The first ``sink_pages`` pages and the last ``local_pages`` are always attended to, and everything by sequences of
    fewer than ``min_context`` rows. ``page_size`` is that of caches without pages of their own. Raises `ArgumentError`.
    """

    mode: str = "certified"
    eps: float = 0.1
    tau: float = 0.01
    keep: float = 0.4
    sink_pages: int = 1
    local_pages: int = 2
    min_context: int = 1024
    page_size: int = 64
    mask: Tensor | PageMask | None = field(default=None, repr=False, compare=False)
    #: What was counted for each layer that attended.
    tallies: dict[int, Tally] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ArgumentError(OP, "mode", f"one of {', '.join(MODES)}", self.mode)
        for name in ("eps", "tau", "keep"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ArgumentError(OP, name, "a number in [0, 1]", getattr(self, name))
        for name, least in (("sink_pages", 0), ("local_pages", 1), ("min_context", 0), ("page_size", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(OP, name, f"at least {least}", getattr(self, name))
        if (self.mode == "mask") != (self.mask is not None):
            raise ArgumentError(OP, "mask", 'a tensor or a function with mode "mask", and else None', type(self.mask))

    @property
    def kind(self) -> str | None:
        """The kind of the summaries that are made of pages; None where none are."""
        return MODES[self.mode][0]

    @property
    def rule(self) -> str:
        return MODES[self.mode][1]

    @property
    def limit(self) -> float:
        return {"certified": self.eps, "share": self.tau, "fraction": self.keep, "mask": 0.0}[self.rule]

    @property
    def proves(self) -> bool:
        """Whether what is lost is bounded."""
        return self.kind is not None and SUMMARIES[self.kind].proves

    def planes(self, d_key: int, device: torch.device) -> Tensor | None:
        """The planes ``[d_key, n_planes]`` of signatures, the same each time; None where none are needed."""
        n = 0 if self.kind is None else SUMMARIES[self.kind].n_planes
        if n == 0:
            return None
        return torch.randn(d_key, n, generator=torch.Generator().manual_seed(0)).to(device)

    def tally(self, layer: int) -> Tally:
        """What is counted for a layer, from now on if it is new."""
        return self.tallies.setdefault(layer, Tally())

    def report(self) -> Report:
        """What was skipped since the start or the last `reset`, layer by layer."""
        return Report(repr(self), [LayerReport.of(layer, tally) for layer, tally in sorted(self.tallies.items())])

    def reset(self) -> None:
        """Count from zero."""
        for tally in self.tallies.values():
            tally.counts.zero_()
