"""Attention on the model's own keys and values: SDPA and written-out softmax become `decode` or `prefill`.

The cache is read where it lies: keys and values are two tensors, a sequence's keys are one page, and all that the
operators need is said by views. Expansions of KV heads to query heads, copies of them, the mask and the matrix of
scores go away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Node

from lowering.passes.attempt import attempt
from lowering.passes.attention import Attention, given_why
from lowering.passes.axes import Access, Axis, entry, outer_leaves, whole
from lowering.passes.calls import attend_rows, call_prefill, is_short, require_rows
from lowering.passes.candidates import Candidate, candidates, match
from lowering.passes.graph import known, refuse_gradient
from lowering.passes.masks import Visible
from lowering.passes.writer import Writer
from lowering.record import Record, Refusal


def rewrite_attention(graph: torch.fx.Graph, record: Record) -> None:
    """Replace every attention that is proven to be one by `flashmla::decode` or `flashmla::prefill`."""
    writer = Writer(graph)
    for candidate in candidates(graph):
        attempt(writer, record, candidate.pattern, candidate.node, partial(_serve, writer, candidate))


def _serve(writer: Writer, candidate: Candidate) -> str:
    refuse_gradient(writer.graph)
    attention = match(candidate)
    return f"{candidate.pattern} -> flashmla::{rewrite(writer, attention)}{given_why(attention)}"


@dataclass(frozen=True)
class Roles:
    """The outer axes of an attention by role: sequences, KV heads, and query heads of one KV head."""

    sequences: list[Axis]
    kv_heads: list[Axis]
    group: list[Axis]

    @property
    def heads(self) -> list[Axis]:
        return self.kv_heads + self.group


def roles(attention: Attention) -> Roles:
    """Axes of K and V are sequences and KV heads; those that only queries have are heads of a group."""
    outer = [leaf for axis in attention.outer for leaf in axis.leaves()]
    of_k = outer_leaves(attention.k, attention.j, attention.e)
    of_v = outer_leaves(attention.v, attention.j, attention.x)
    if set(of_k) != set(of_v):
        raise Refusal(f"keys differ along {of_k} and values along {of_v}: they are not rows of one cache")
    shared = [axis for axis in outer if axis in of_k]
    sequences = [axis for axis in shared[:1] if axis in attention.outer[0].leaves()]
    kv_heads = shared[len(sequences) :]
    if len(kv_heads) > 1:
        raise Refusal(f"keys differ along {shared}, more than sequences and heads")
    return Roles(sequences, kv_heads, [axis for axis in outer if axis not in shared])


def rewrite(writer: Writer, attention: Attention) -> str:
    """Replace the attention; the name of the operator that serves it. Raises `Refusal` before it changes anything."""
    require_elements(attention)
    axes = roles(attention)
    writer.before = attention.output
    keys = writer.lay_out(attention.k, [axes.sequences, [attention.j], axes.kv_heads, [attention.e]])
    values = writer.lay_out(attention.v, [axes.sequences, [attention.j], axes.kv_heads, [attention.x]])
    for name, rows in (("keys", keys), ("values", values)):
        require_rows(name, rows)
    q = writer.lay_out(attention.q, [axes.sequences, [attention.i], axes.heads, [attention.e]])
    prefill = not is_short(attention.i.size) and all(_one_after_another(rows) for rows in (keys, values))
    if prefill and isinstance(attention.visible, Visible):
        served_by, out = "prefill", call_prefill(writer, attention, attention.visible, axes.heads, q, keys, values)
    else:
        d_v = writer.size(attention.x.size)
        served_by, out = attend_rows(writer, attention, axes.sequences, axes.heads, q, values, keys, d_v, d_v)
    index = (entry(axes.sequences), whole(attention.i), entry(axes.heads), whole(attention.x))
    groups = [*([axis] for axis in attention.outer), [attention.i], [attention.x]]
    writer.replace(attention.output, writer.lay_out(Access(out, index), groups))
    return served_by


def require_elements(attention: Attention) -> None:
    """Raise `Refusal` if there is nothing to attend with or to: the operators want at least one of everything."""
    sizes = [axis.size for axis in (*attention.outer, attention.i, attention.j, attention.e, attention.x)]
    if any(known(size == 0) for size in sizes):
        raise Refusal(f"a size is 0 among {sizes}: sequences and heads, queries, keys, their elements, values'")


def _one_after_another(rows: Node) -> bool:
    """Whether the tokens of all sequences have one stride, so that ``[b, s_kv]`` can be one dimension."""
    tensor = rows.meta["val"]
    return known(tensor.size(0) == 1) or known(tensor.stride(0) == tensor.size(1) * tensor.stride(1))
