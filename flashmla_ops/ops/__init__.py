"""``torch.ops.flashmla.*``: one file for each family of operators, holding its schemas, checks, fakes and bindings."""

from flashmla_ops.ops import (
    append,
    attend_masked,
    decode,
    decode_backward,
    decode_up,
    decode_up_backward,
    gemm,
    grouped_gemm,
    merge,
    pages,
    prefill,
    prefill_backward,
    quantize,
    schedule,
    sparse,
    sparse_backward,
    sparse_decode_backward,
)
from flashmla_ops.ops._library import complete

__all__ = [
    "append",
    "attend_masked",
    "complete",
    "decode",
    "decode_backward",
    "decode_up",
    "decode_up_backward",
    "gemm",
    "grouped_gemm",
    "merge",
    "pages",
    "prefill",
    "prefill_backward",
    "quantize",
    "schedule",
    "sparse",
    "sparse_backward",
    "sparse_decode_backward",
]
