"""Attention that a graph computes by one of torch's SDPA operators."""

from __future__ import annotations

from torch.fx import Node

from lowering.passes.attention import Attention, check_scale, outer_axes, require_shape
from lowering.passes.axes import Axis, access
from lowering.passes.elements import resolve
from lowering.passes.forms import Affine, Condition
from lowering.passes.given import Mask, decide, mask_of_operator
from lowering.passes.graph import Size, arguments, aten, inputs, known, shape, value
from lowering.record import Refusal

SDPA = (aten.scaled_dot_product_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default)


def match_sdpa(node: Node) -> Attention:
    bound = arguments(node)
    output = _only_result(node)
    query, key, val, mask = (bound[name] for name in ("query", "key", "value", "attn_mask"))
    if value(bound["dropout_p"]) != 0:
        raise Refusal(f"dropout {bound['dropout_p']}")
    *outer_sizes, s_q, d_qk = shape(query)
    require_shape(output, [*outer_sizes, s_q, shape(val)[-1]])
    outer = outer_axes(outer_sizes)
    i, j = Axis("i", s_q), Axis("j", shape(key)[-2])
    e, x = Axis("e", d_qk), Axis("x", shape(val)[-1])
    scale = bound["scale"]
    if scale is None and isinstance(d_qk, int):
        scale = d_qk**-0.5
    if scale is not None:
        check_scale(scale)
    masks = []
    _tie(shape(val)[-2], j.size)
    if mask is not None:
        if not known(shape(mask)[-1] == 1):
            _tie(shape(mask)[-1], j.size)
        masks.append(mask_of_operator(access(output, [*outer, i, j]), mask))
    if bound["is_causal"]:
        masks.append(Mask(Condition((Affine(0, ((j, 1), (i, -1))),)), None))
    k_axes, v_axes = (_kv_axes(outer, shape(tensor)[:-2]) for tensor in (key, val))
    q, k, v = (
        resolve(access(tensor, axes))
        for tensor, axes in ((query, [*outer, i, e]), (key, [*k_axes, j, e]), (val, [*v_axes, j, x]))
    )
    return Attention(output, outer, i, j, e, x, q, k, v, scale, decide(masks, i, j, node.graph, safe=True))


def _tie(size: Size, other: Size) -> None:
    """Guard that two sizes, which the operator requires to be equal, are equal, where the graph does not say so.

    Caches of one model have a symbol each for a length that they share; the attention is an error if it is not shared.
    """
    if known(size == other):
        return
    hints = [n if isinstance(n, int) else n.node.hint if n.node.has_hint() else None for n in (size, other)]
    if None in hints or hints[0] != hints[1] or not bool(size == other):
        raise Refusal(f"{size} and {other} keys are not proven to be as many")


def _only_result(node: Node) -> Node:
    if node.target == aten.scaled_dot_product_attention.default:
        return node
    results = {inputs(user)[1]: user for user in node.users if user.users}
    if set(results) != {0}:
        raise Refusal("the log-sum-exp of the scores has another use")
    return results[0]


def _kv_axes(outer: tuple[Axis, ...], sizes: list[Size]) -> list[Axis]:
    """The axes of K's or V's outer dimensions. With fewer heads than q, query head h reads KV head h // group."""
    if len(sizes) != len(outer):
        raise Refusal(f"{len(sizes)} outer dimensions of keys or values for {len(outer)} of queries")
    axes = []
    for axis, size in zip(outer, sizes, strict=True):
        if known(axis.size == size):
            axes.append(axis)
        elif axis is outer[-1] and known(axis.size % size == 0):
            axes.append(axis.cut(size)[0])
        else:
            raise Refusal(f"{size} keys or values are not proven to serve {axis.size} queries of {axis}")
    return axes
