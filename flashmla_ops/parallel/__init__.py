"""Attention over several processes, with torch's own distribution.

Every operator takes DTensors: `flashmla_ops.ops._sharding`. What a single operator cannot say is here: sequences whose
pages lie on several ranks, and models whose heads or layers do.
"""

from flashmla_ops.parallel.context import (
    context_parallel_decode,
    local_lengths,
    local_slots,
    local_table,
    merge_over_ranks,
)
from flashmla_ops.parallel.stages import generate_in_turns, pipeline_parallel
from flashmla_ops.parallel.tensor import tensor_parallel

__all__ = [
    "context_parallel_decode",
    "generate_in_turns",
    "local_lengths",
    "local_slots",
    "local_table",
    "merge_over_ranks",
    "pipeline_parallel",
    "tensor_parallel",
]
