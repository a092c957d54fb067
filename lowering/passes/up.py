"""`decode` and the product of each head's result with a weight of its own become one `decode_up`.

What is multiplied is followed back from the product to the attention, one symbolic element at a time, so that it does
not matter how a model wrote the product: ``torch.bmm``, a matmul of transposed heads, an einsum, or `flashmla::bmm`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Node

from lowering.passes.attempt import attempt
from lowering.passes.axes import Access, Axis, access, entry, whole
from lowering.passes.calls import first_result
from lowering.passes.elements import STEPS, resolve
from lowering.passes.graph import arguments, aten, flashmla, inputs, known, refuse_gradient, shape
from lowering.passes.writer import Writer
from lowering.record import Record, Refusal

PATTERN = "decode, then a product for each head"
PRODUCTS = (aten.bmm.default, flashmla.bmm.default)
#: Operators that move all elements of a tensor: followed behind the product, so that its result is put in order once.
MOVES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
)


def form_decode_up(graph: torch.fx.Graph, record: Record) -> None:
    """Replace every `decode` whose result goes into one product for each head, and nowhere else."""
    wanted = record.settings.decode_up
    if wanted is False:
        return
    writer = Writer(graph)
    for attention in list(graph.nodes):
        if attention.target != flashmla.decode.default:
            continue
        for product in dict.fromkeys(products(attention)):
            serve = partial(_serve, writer, attention, product, always=wanted is True)
            if attempt(writer, record, PATTERN, product, serve):
                break


def _serve(writer: Writer, attention: Node, product: Node, *, always: bool) -> str:
    refuse_gradient(writer.graph)
    if not always and (device := product.meta["val"].device.type) != "cpu":
        raise Refusal(f"one operator is known to be faster on the CPU only, not on {device}")
    rewrite(writer, match(attention, product))
    return f"{PATTERN} -> flashmla::decode_up"


def result(attention: Node, position: int) -> Node | None:
    """The node that takes out (0) or the LSE (1) from a decode, if it has one; there is one at most."""
    found = [user for user in attention.users if user.target is operator.getitem and user.args[1] == position]
    return found[0] if found else None


def products(attention: Node) -> Iterator[Node]:
    """The products that a decode's out goes into, moved but not computed with, or cast."""
    frontier = [out] if (out := result(attention, 0)) is not None else []
    while frontier:
        for user in frontier.pop().users:
            if user.target in PRODUCTS:
                yield user
            elif user.target in STEPS:
                frontier.append(user)


@dataclass(frozen=True)
class Up:
    """``result[*axes] = sum_c attended[.., head, c] weight[head, c, x]``."""

    attention: Node
    result: Node
    axes: list[Axis]
    attended: Access
    weight: Access
    heads: list[Axis]
    c: Axis
    columns: tuple[Axis, ...]


def match(attention: Node, product: Node) -> Up:
    """The product in terms of the attention's result and a weight. Raises `Refusal` with what is not proven."""
    last = _end_of_moves(product)
    axes = [Axis(f"x{i}", size) for i, size in enumerate(shape(last))]
    element = resolve(access(last, axes))
    batch, row, column = element.index
    left, right = inputs(product)
    c = Axis("c", shape(left)[-1])
    factors = [resolve(Access(left, (batch, row, whole(c)))), resolve(Access(right, (batch, whole(c), column)))]
    out = result(attention, 0)
    attended = next((factor for factor in factors if factor.node is out), None)
    if attended is None:
        raise Refusal(f"its factors are {factors[0].node} and {factors[1].node}, computed from what was attended to")
    weight = factors[1] if attended is factors[0] else factors[0]
    if weight.node is out:
        raise Refusal("both factors are what was attended to")
    _require_no_other_use(attended.node, product)
    heads = _heads(attended, c)
    others = [leaf for leaf in weight.leaves() if leaf not in (*heads, c)]
    sequences = [
        leaf for entries in attended.index[:2] for digit in entries if digit.axis for leaf in digit.axis.leaves()
    ]
    if mixed := [str(leaf) for leaf in others if leaf in sequences]:
        raise Refusal(f"the weight {weight.node} differs along {', '.join(mixed)}, which are sequences or queries")
    if any(head not in weight.leaves() for head in heads):
        raise Refusal(f"the weight {weight.node} is the same for several heads")
    columns = tuple(leaf for axis in axes for leaf in axis.leaves() if leaf not in (*heads, *sequences))
    if set(others) != set(columns):
        raise Refusal(f"the weight {weight.node} is read along {weight.leaves()}, not along heads and columns")
    return Up(attention, last, axes, attended, weight, heads, c, columns)


def _end_of_moves(product: Node) -> Node:
    """The last of the nodes that only move what a product computed, as long as nobody else sees it on the way."""
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in MOVES or resolve(access(user, [Axis("", n) for n in shape(user)])).node is not product:
            break
        node = user
    return node


def _heads(attended: Access, c: Axis) -> list[Axis]:
    """The axes of the heads. Raises `Refusal` unless the product takes each element of the result once."""
    digits = [digit for dim in range(4) for digit in attended.entry(dim)]
    leaves = [leaf for digit in digits if digit.axis for leaf in digit.axis.leaves()]
    if not all(digit.whole for digit in digits):
        raise Refusal("the product takes a part of what was attended to")
    if len(set(leaves)) != len(leaves):
        raise Refusal("the product takes a diagonal of what was attended to")
    last = attended.entry(3)
    if [digit.axis for digit in last] != [c]:
        raise Refusal(f"the product sums over {c.size} elements that are not the d_v of what was attended to")
    if not isinstance(c.size, int):
        raise Refusal("d_v is not static")
    return [leaf for digit in attended.entry(2) if digit.axis for leaf in digit.axis.leaves()]


def _require_no_other_use(node: Node, product: Node) -> None:
    for user in node.users:
        if user is product:
            continue
        if user.target not in STEPS:
            raise Refusal(f"what was attended to has another use, {user}: it would be computed all the same")
        _require_no_other_use(user, product)


def rewrite(writer: Writer, up: Up) -> None:
    """Write `decode_up` where `decode` stands, which reads its cache before anybody writes to it again."""
    attention = arguments(up.attention)
    if attention["cu_seqlens_q"] is not None:
        raise Refusal("its queries are ragged: heads are not where they are looked for")
    order = {node: i for i, node in enumerate(writer.graph.nodes)}
    if order[up.weight.node] > order[up.attention]:
        raise Refusal(f"the weight {up.weight.node} is computed after the attention")
    writer.before = up.attention
    weight = writer.lay_out(up.weight, [up.heads, [up.c], list(up.columns)])
    _require_view(weight, up.weight.node)
    tensor, q = weight.meta["val"], attention["q"].meta["val"]
    if tensor.dtype != q.dtype:
        raise Refusal(f"the weight is {tensor.dtype}, queries are {q.dtype}")
    if not isinstance(tensor.size(2), int):
        raise Refusal("the columns of the weight are not static")
    if not any(known(tensor.stride(dim) == 1) for dim in (1, 2)):
        raise Refusal(f"the weight has strides {tuple(tensor.stride())}: contiguous along neither d_v nor its columns")
    tensors = [attention.pop(name) for name in ("q", "kv_cache", "k_cache", "block_table", "cache_seqlens")]
    call = writer.call(flashmla.decode_up.default, *tensors, weight, *attention.values())
    values, lse = first_result(writer, call), result(up.attention, 1)
    new_lse = None if lse is None else writer.call(operator.getitem, call, 1)
    writer.before = up.result
    index = (*up.attended.index[:2], entry(up.heads), tuple(d for axis in up.columns for d in whole(axis)))
    moved = writer.lay_out(Access(values, index), [[axis] for axis in up.axes])
    if lse is not None and new_lse is not None:
        writer.replace(lse, new_lse)
    writer.replace(up.result, moved)


def _require_view(node: Node, source: Node) -> None:
    """Refuse if what was laid out is a copy."""
    while node is not source:
        if node.target == aten.clone.default:
            raise Refusal(f"the weight {source} would have to be copied")
        node = inputs(node)[0]
