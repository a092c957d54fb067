"""The float64 definitions of the operators: the specification that kernels are compared with."""

from flashmla_ops.reference.attention import attend_masked, decode, decode_up, merge_states, prefill
from flashmla_ops.reference.backward import (
    decode_backward,
    decode_up_backward,
    prefill_backward,
    sparse_backward,
    sparse_prefill_backward,
)
from flashmla_ops.reference.cache import append, gather_rows
from flashmla_ops.reference.gemm import bmm, gemm, grouped_gemm
from flashmla_ops.reference.pages import choose_pages, page_mass, summarize
from flashmla_ops.reference.schedule import decode_schedule
from flashmla_ops.reference.sparse import Source, sparse_attention
from flashmla_ops.reference.v41 import v41_attention

__all__ = [
    "Source",
    "append",
    "attend_masked",
    "bmm",
    "choose_pages",
    "decode",
    "decode_backward",
    "decode_schedule",
    "decode_up",
    "decode_up_backward",
    "gather_rows",
    "gemm",
    "grouped_gemm",
    "merge_states",
    "page_mass",
    "prefill",
    "prefill_backward",
    "sparse_attention",
    "sparse_backward",
    "sparse_prefill_backward",
    "summarize",
    "v41_attention",
]
