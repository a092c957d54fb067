"""Write calls of `decode`, `attend_masked` and `prefill` on rows of a cache, and the tensors that they take.

A sequence's keys are one page, so that the block table is an iota, and lengths are what the mask was proven to say.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from lowering.passes.attention import Attention
from lowering.passes.axes import Axis
from lowering.passes.given import Given, mask_tensor
from lowering.passes.graph import Size, aten, flashmla, known, prims, shape
from lowering.passes.masks import Visible
from lowering.passes.writer import Writer
from lowering.record import Refusal

#: Longest query, in tokens of one sequence, that `decode` serves; longer ones go to `prefill` where their keys lie one
#: sequence after another. Both are exact: this is a matter of speed alone.
MAX_DECODE_QUERIES = 64


def is_short(s_q: Size) -> bool:
    """Whether a query is short; of a symbolic size the one it was traced with counts, without a guard."""
    if isinstance(s_q, int):
        return s_q <= MAX_DECODE_QUERIES
    return bool(s_q.node.has_hint() and s_q.node.hint <= MAX_DECODE_QUERIES)


def require_rows(name: str, rows: Node) -> None:
    tensor = rows.meta["val"]
    if not known(tensor.stride(-1) == 1) and not known(tensor.size(-1) == 1):
        raise Refusal(f"the {name} are no rows: stride {tensor.stride(-1)} along a row")


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
        **_options(writer, attention, visible, heads),
    )
    return "decode", first_result(writer, out)


def _options(writer: Writer, attention: Attention, visible: Visible, heads: list[Axis]) -> dict[str, Any]:
    """The options of attention that are not their defaults."""
    options: dict[str, Any] = {}
    if not known(visible.window == 0):
        options["window"] = writer.size(visible.window)
    if attention.softcap:
        options["softcap"] = attention.softcap
    if attention.sink is not None:
        sink = writer.lay_out(attention.sink, [heads])
        if sink.meta["val"].dtype != torch.float32:
            sink = writer.call(prims.convert_element_type.default, sink, torch.float32)
        options["attn_sink"] = sink
    return options


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


def call_prefill(
    writer: Writer, attention: Attention, visible: Visible, heads: list[Axis], q: Node, keys: Node, values: Node
) -> Node:
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
        **_options(writer, attention, visible, heads),
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
