"""The float64 definitions of the operators: the specification that kernels are compared with."""

from flashmla_ops.reference.attention import decode, merge_states
from flashmla_ops.reference.cache import append, gather_rows
from flashmla_ops.reference.schedule import decode_schedule

__all__ = ["append", "decode", "decode_schedule", "gather_rows", "merge_states"]
