"""Attention on the model's own keys and values: SDPA and written-out softmax become `decode` or `prefill`.

The cache is read where it lies: keys and values are two tensors, a sequence's keys are one page, and all that the
operators need is said by views. Expansions of KV heads to query heads, copies of them, the mask and the matrix of
scores go away.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Node

from lowering.passes.attempt import attempt
from lowering.passes.attention import Attention, Candidate, candidates, match
from lowering.passes.elements import Access, Axis, Entry, Size, aten, known, prims, shape, whole
from lowering.passes.given import Given, mask_tensor
from lowering.passes.masks import Refusal, Visible
from lowering.passes.writer import Writer
from lowering.record import Record

flashmla = torch.ops.flashmla

#: Longest query, in tokens of one sequence, that `decode` serves; longer ones go to `prefill` where their keys lie one
#: sequence after another. Both are exact: this is a matter of speed alone.
MAX_DECODE_QUERIES = 64

GRADIENT = "a gradient is required, and the operators have no backward: compile under torch.no_grad()"


def rewrite_attention(graph: torch.fx.Graph, record: Record) -> None:
    """Replace every attention that is proven to be one by `flashmla::decode` or `flashmla::prefill`."""
    writer = Writer(graph)
    for candidate in candidates(graph):
        attempt(writer, record, candidate.pattern, candidate.node, partial(_serve, writer, candidate))


def _serve(writer: Writer, candidate: Candidate) -> str:
    refuse_gradient(writer.graph)
    attention = match(candidate)
    return f"{candidate.pattern} -> flashmla::{rewrite(writer, attention)}{given_why(attention)}"


def given_why(attention: Attention) -> str:
    """Why the mask of an attention is read at run time, to be added to what the record says; empty if it is proven."""
    visible = attention.visible
    return f", which reads the mask at run time ({visible.why})" if isinstance(visible, Given) else ""


def refuse_gradient(graph: torch.fx.Graph) -> None:
    """Raise `Refusal` if the graph computes gradients or its inputs require them."""
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        tracked = isinstance(x := node.meta.get("val"), torch.Tensor) and x.requires_grad
        if node.name.startswith("tangents") or (tracked and torch.is_grad_enabled()):
            raise Refusal(GRADIENT)


@dataclass(frozen=True)
class Roles:
    """What the outer axes of an attention are: sequences, KV heads, and query heads of one KV head."""

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


def outer_leaves(element: Access, *inner: Axis) -> list[Axis]:
    """The axes that an element depends on beside its own. Raises `Refusal` if it lacks one of its own."""
    leaves = element.leaves()
    own = [leaf for axis in inner for leaf in axis.leaves()]
    if any(axis not in leaves for axis in own) or any(axis.parts is not None for axis in inner):
        raise Refusal(f"{element.node} is read along {leaves}, which are not rows of a cache")
    return [leaf for leaf in leaves if leaf not in own]


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
        served_by, out = "prefill", _prefill(writer, attention, attention.visible, q, keys, values)
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


def entry(axes: list[Axis]) -> Entry:
    return tuple(digit for axis in axes for digit in whole(axis))


def require_rows(name: str, rows: Node) -> None:
    tensor = rows.meta["val"]
    if not known(tensor.stride(-1) == 1) and not known(tensor.size(-1) == 1):
        raise Refusal(f"the {name} are no rows: stride {tensor.stride(-1)} along a row")


def is_short(s_q: Size) -> bool:
    """Whether a query is short; of a symbolic size the one it was traced with counts, without a guard."""
    if isinstance(s_q, int):
        return s_q <= MAX_DECODE_QUERIES
    return bool(s_q.node.has_hint() and s_q.node.hint <= MAX_DECODE_QUERIES)


def _one_after_another(rows: Node) -> bool:
    """Whether the tokens of all sequences have one stride, so that ``[b, s_kv]`` can be one dimension."""
    tensor = rows.meta["val"]
    return known(tensor.size(0) == 1) or known(tensor.stride(0) == tensor.size(1) * tensor.stride(1))


def attend_rows(
    writer: Writer,
    attention: Attention,
    sequences: list[Axis],
    heads: list[Axis],
    q: Node,
    kv_cache: Node,
    k_cache: Node,
    d_v: Node | int,
    qk_start: Node | int,
) -> tuple[str, Node]:
    """Attention on rows of a cache, and the name of the operator that serves it: `decode`, or `attend_masked`."""
    visible = attention.visible
    if isinstance(visible, Given):
        mask = mask_tensor(writer, visible, attention.dtype, [sequences, heads, [attention.i], [attention.j]])
        rest = (d_v, qk_start, attention.scale, not visible.safe)
        return "attend_masked", writer.call(flashmla.attend_masked.default, q, kv_cache, k_cache, mask, *rest)
    out = writer.call(
        flashmla.decode.default,
        q,
        kv_cache,
        k_cache,
        _block_table(writer, q),
        _cache_seqlens(writer, visible, attention.j.size, q),
        d_v,
        qk_start,
        attention.scale,
        visible.causal and not known(attention.i.size == 1),
    )
    return "decode", first_result(writer, out)


def first_result(writer: Writer, call: Node) -> Node:
    return writer.call(operator.getitem, call, 0)


def _block_table(writer: Writer, q: Node) -> Node:
    """``[b, 1]``: sequence i is page i."""
    tensor = q.meta["val"]
    key, found = writer.shared("block_table", tensor.size(0), tensor.device)
    if found is not None:
        return found
    pages = writer.iota(tensor.size(0), torch.int32, tensor.device)
    return writer.share(key, writer.call(aten.unsqueeze.default, pages, 1))


def _cache_seqlens(writer: Writer, visible: Visible, s_kv: Size, q: Node) -> Node:
    """``[b]`` int32: the keys that the last query of each sequence sees."""
    tensor = q.meta["val"]
    b = tensor.size(0)
    length_key = s_kv if visible.length is None else (visible.length.key, visible.earlier)
    key, found = writer.shared("cache_seqlens", length_key, b, tensor.device)
    if found is not None:
        return found
    options = {"dtype": torch.int32, "device": tensor.device, "pin_memory": False}
    length = visible_length(writer, visible, s_kv)
    if not isinstance(length, Node) or not isinstance(length.meta["val"], torch.Tensor):
        return writer.share(key, writer.call(aten.full.default, [writer.size(b)], length, **options))
    lengths = writer.call(aten.expand.default, length, [writer.size(b)])
    return writer.share(key, writer.call(aten.clone.default, lengths, memory_format=torch.contiguous_format))


def visible_length(writer: Writer, visible: Visible, s_kv: Size) -> Node | int:
    """The keys that the last query sees: a number, the node of a symbolic one, or of an int32 tensor ``[]``.

    The tensor is negative if the first query sees none.
    """
    if visible.length is None:
        size: Node | int = writer.size(s_kv)
        return size
    if not visible.length.loads():
        number: Node | int = writer.size(visible.length.constant)
        return number
    ((load, _),) = visible.length.loads()
    place = _in_int64(writer, writer.lay_out(load.element, []))
    last = _plus(writer, place, visible.length.constant - visible.earlier - 1)  # the last key that the first query sees
    length = _plus(writer, last, visible.earlier + 1)
    # A length that is negative is refused by every operator, in words that name the position.
    length = writer.call(aten.where.self, writer.call(aten.ge.Scalar, last, 0), length, last)
    return writer.call(prims.convert_element_type.default, length, torch.int32)


def _in_int64(writer: Writer, node: Node) -> Node:
    if node.meta["val"].dtype == torch.int64:
        return node
    return writer.call(prims.convert_element_type.default, node, torch.int64)


def _plus(writer: Writer, node: Node, number: Size) -> Node:
    return node if known(number == 0) else writer.call(aten.add.Tensor, node, writer.size(number))


def _prefill(writer: Writer, attention: Attention, visible: Visible, q: Node, keys: Node, values: Node) -> Node:
    """Ragged sequences, each followed by the keys it does not see as a sequence without queries.

    So a cache that is longer than what it holds is read in place.
    """
    b, s_q, h_q, d_qk = shape(q)
    s_kv = attention.j.size
    length = visible_length(writer, visible, s_kv)
    cu_seqlens_q, cu_seqlens_k = _boundaries(writer, q, s_kv, length)
    flat = [writer.view(rows, [b * s_kv, *shape(rows)[2:]]) for rows in (keys, values)]
    out = writer.call(
        flashmla.prefill.default,
        writer.view(q, [b * s_q, h_q, d_qk]),
        *flat,
        cu_seqlens_q,
        cu_seqlens_k,
        visible.causal,
        attention.scale,
    )
    return writer.view(first_result(writer, out), [b, s_q, h_q, attention.x.size])


def _boundaries(writer: Writer, q: Node, s_kv: Size, length: Node | int) -> tuple[Node, Node]:
    """``cu_seqlens`` of 2 b sequences: for each of ours one of (s_q, length) tokens and one of (0, the other keys)."""
    tensor = q.meta["val"]
    b, s_q = tensor.size(0), tensor.size(1)
    key_q, found_q = writer.shared("cu_seqlens_q", b, s_q, tensor.device)
    key_k, found_k = writer.shared("cu_seqlens_k", b, s_kv, length, tensor.device)
    if found_q is not None and found_k is not None:
        return found_q, found_k

    def halved(n: Node) -> Node:
        return writer.call(aten.div.Tensor_mode, n, 2, rounding_mode="floor")

    n = writer.iota(2 * b + 1, torch.int32, tensor.device)
    begun = halved(writer.call(aten.add.Tensor, n, 1))  # sequences whose visible part has begun before boundary n
    ended = halved(n)  # and those that have ended
    q_bounds = writer.call(aten.mul.Tensor, begun, writer.size(s_q))
    visible = writer.call(aten.mul.Tensor, writer.call(aten.sub.Tensor, begun, ended), length)
    k_bounds = writer.call(aten.add.Tensor, writer.call(aten.mul.Tensor, ended, writer.size(s_kv)), visible)
    to_int32 = prims.convert_element_type.default
    return (
        writer.share(key_q, writer.call(to_int32, q_bounds, torch.int32)),
        writer.share(key_k, writer.call(to_int32, k_bounds, torch.int32)),
    )
