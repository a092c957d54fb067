"""Dynamic sparsity: what chooses the pages that decoding attends to, and says how much was lost.

    sparse = DynamicSparsity(mode="certified", eps=0.1)
    out, lse, lost = attend(q, Cached(kv_cache, None, block_table, cache_seqlens, summaries), sparse, d_v, qk_start)

`flashmla::summarize_` makes the summaries, next to `append_`; `flashmla_ops.integrations.transformers.enable` does all
of it for a model.
"""

from flashmla_ops.sparsity.config import MODES, DynamicSparsity
from flashmla_ops.sparsity.report import LayerReport, Report
from flashmla_ops.sparsity.select import Cached, Chosen, attend, select

__all__ = ["MODES", "Cached", "Chosen", "DynamicSparsity", "LayerReport", "Report", "attend", "select"]
