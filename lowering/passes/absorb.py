"""Multi-head Latent Attention that a model expands to heads becomes absorbed `decode` on the model's own latents.

Keys are found to be ``[W_UK c, k_pe]`` and values ``W_UV c``, where c and k_pe are rows of the caches and the weights
those of one or two projections. Then ``q_nope . (W_UK c) = (W_UK^T q_nope) . c`` and ``sum_t p_t (W_UV c_t) = W_UV
(sum_t p_t c_t)`` (DeepSeek-V2, arXiv:2405.04434, section 2.1.2): two products with the weights of a head replace the
expansion of the whole cache, and every head reads the same rows. For short queries only: see `MAX_DECODE_QUERIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Node

from lowering.passes.attempt import attempt
from lowering.passes.attention import Attention, given_why
from lowering.passes.axes import Access, Axis, Digit, entry, outer_leaves, replaced, whole
from lowering.passes.calls import attend_rows, is_short, require_rows
from lowering.passes.candidates import Candidate, candidates, match
from lowering.passes.elements import pieces, resolve
from lowering.passes.graph import aten, flashmla, inputs, known, refuse_gradient, shape
from lowering.passes.writer import Writer
from lowering.record import Record, Refusal

PATTERN = "expanded MLA"

#: A linear layer without bias; of rows that are not contiguous it is a batched product with one weight for all.
PROJECTIONS = (aten.mm.default, aten.bmm.default)


def absorb_latents(graph: torch.fx.Graph, record: Record) -> None:
    """Replace attention of short queries over expanded latents by absorbed `flashmla::decode` on the latents.

    Attention whose keys are not put together from parts is none of its business, and neither are long queries.
    """
    writer = Writer(graph)
    for candidate in candidates(graph):
        attempt(writer, record, PATTERN, candidate.node, partial(_serve, writer, candidate))


def _serve(writer: Writer, candidate: Candidate) -> str | None:
    try:
        attention = match(candidate)
    except Refusal:
        return None  # `rewrite_attention` says why
    if not is_short(attention.i.size) or not _is_joined(attention):
        return None
    refuse_gradient(writer.graph)
    if known(attention.i.size == attention.j.size):
        raise Refusal("there are no keys but the queries' own, so that expanding them is no dearer")
    if attention.scale is None:
        raise Refusal("the default scale of a size that is not static, which absorption changes")
    served_by = rewrite(writer, attention, expanded(attention))
    return f"{PATTERN}, {candidate.pattern} -> absorbed flashmla::{served_by}{given_why(attention)}"


def _is_joined(attention: Attention) -> bool:
    joined = pieces(attention.k.node)
    return joined is not None and _runs_over(attention.k, joined[0], attention.e)


def _runs_over(element: Access, dim: int, axis: Axis) -> bool:
    digits = element.entry(dim)
    return len(digits) == 1 and digits[0].axis is axis


@dataclass(frozen=True)
class Projection:
    """An element that is ``sum_c latent[.., c] weight[.., c]``."""

    latent: Access
    weight: Access
    c: Axis
    product: Node


@dataclass(frozen=True)
class Part:
    """A run of an axis: its own axis, where it starts, and the element it runs over."""

    axis: Axis
    start: int
    element: Access


@dataclass(frozen=True)
class Expanded:
    """Attention over ``k = [up(c), rope]`` and ``v = up(c)``, and its query in the same two parts."""

    up_k: Projection
    up_v: Projection
    nope: Axis
    rope: Axis
    k_rope: Access
    q_nope: Access
    q_rope: Access
    sequences: list[Axis]
    heads: list[Axis]


def expanded(attention: Attention) -> Expanded:
    """The latent form of an attention. Raises `Refusal` with what is not proven."""
    parts = split(attention.k, attention.e)
    if len(parts) != 2:
        raise Refusal(f"keys of {len(parts)} parts, not an expanded latent and a rotary part")
    projected = [part for part in parts if part.element.node.target in (*PROJECTIONS, aten.addmm.default)]
    if len(projected) != 1:
        raise Refusal(f"{len(projected)} parts of the keys are projections, not one")
    (part,) = projected
    (rotary,) = (other for other in parts if other is not part)
    up_k, up_v = projection(part.element), projection(attention.v)
    if not same_element(up_k.latent, up_v.latent, {up_k.c: up_v.c}):
        raise Refusal(f"keys expand {up_k.latent.node}, values {up_v.latent.node}: not the same latents")
    if not known(up_k.c.size == up_v.c.size):
        raise Refusal(f"keys expand {up_k.c.size} elements of a latent, values {up_v.c.size}")
    outer = [leaf for axis in attention.outer for leaf in axis.leaves()]
    of_latent = outer_leaves(up_k.latent, attention.j, up_k.c)
    of_rope = outer_leaves(rotary.element, attention.j, rotary.axis)
    if set(of_latent) != set(of_rope):
        raise Refusal(f"latents differ along {of_latent}, rotary keys along {of_rope}: they are not rows of one cache")
    if len(of_latent) > 1:
        raise Refusal(f"latents differ along {of_latent}: heads do not share them")
    heads = [axis for axis in outer if axis not in of_latent]
    for product in {up_k.product, up_v.product}:
        _require_no_other_use(product, attention.output)
    q_nope, q_rope = (narrow(attention.q, attention.e, each) for each in (part, rotary))
    return Expanded(up_k, up_v, part.axis, rotary.axis, rotary.element, q_nope, q_rope, of_latent, heads)


def split(element: Access, axis: Axis, *, nested: bool = False) -> list[Part]:
    """The parts that an axis runs over, in order, where tensors were put together along it.

    A whole part that was itself put together, as rotary embeddings are from halves, is one unless ``nested``.
    """
    return _split(Part(axis, 0, element), nested, outermost=True)


def _split(part: Part, nested: bool, *, outermost: bool = False) -> list[Part]:
    element = resolve(part.element)
    joined = pieces(element.node)
    if joined is None or not _runs_over(element, joined[0], part.axis):
        return [Part(part.axis, part.start, element)]
    dim, tensors = joined
    (digit,) = element.entry(dim)
    if digit.whole and not outermost and not nested:
        return [Part(part.axis, part.start, element)]
    parts: list[Part] = []
    for tensor in tensors:
        bounds = (digit.offset, digit.stop, tensor.start, tensor.start + tensor.size, tensor.source_start)
        if not all(isinstance(bound, int) for bound in bounds):
            raise Refusal(f"{element.node} puts together parts of symbolic size")
        low, high = max(digit.offset, tensor.start), min(digit.stop, tensor.start + tensor.size)
        if low >= high:
            continue
        axis = Axis(f"{part.axis}.{len(parts)}", int(high - low))
        inner = Digit(axis, low - tensor.start + tensor.source_start, shape(tensor.source)[dim])
        source = Access(tensor.source, replaced(element.index, dim, (inner,)))
        parts.extend(_split(Part(axis, int(part.start + low - digit.offset), source), nested))
    return parts


def narrow(element: Access, axis: Axis, part: Part) -> Access:
    """The element with ``axis`` running over a part of its values only."""

    def moved(digit: Digit) -> Digit:
        return Digit(part.axis, digit.offset + part.start, digit.size) if digit.axis is axis else digit

    index = tuple(tuple(moved(digit) for digit in digits) for digits in element.index)
    return resolve(Access(element.node, index))


def projection(element: Access) -> Projection:
    """The factors of a product: its element is a sum over c of a row of one tensor and a column of the other."""
    node = element.node
    if node.target == aten.addmm.default:
        raise Refusal(f"the projection {node} has a bias, which absorption would drop")
    if node.target not in PROJECTIONS:
        raise Refusal(f"the values are {node}, not a projection of latents")
    left, right = inputs(node)
    c = Axis("c", shape(left)[-1])
    *batch, row, column = element.index
    latent = resolve(Access(left, (*batch, row, whole(c))))
    weight = resolve(Access(right, (*batch, whole(c), column)))
    if not isinstance(c.size, int):
        raise Refusal("the rank of the latents is not static")
    return Projection(latent, weight, c, node)


def same_element(one: Access, other: Access, renamed: dict[Axis, Axis]) -> bool:
    """Whether two elements are the same, with some axes under other names."""
    if one.node is not other.node:
        return False
    for mine, theirs in zip(one.index, other.index, strict=True):
        if len(mine) != len(theirs):
            return False
        for a, b in zip(mine, theirs, strict=True):
            axis = renamed.get(a.axis, a.axis) if a.axis is not None else None
            if axis is not b.axis or not known(a.offset == b.offset) or not known(a.size == b.size):
                return False
    return True


def _require_no_other_use(product: Node, output: Node) -> None:
    """Refuse unless all that is made of the expansion goes into this attention, so that it is no longer computed."""
    seen, frontier = {output}, [product]
    while frontier:
        node = frontier.pop()
        if node.op == "output":
            raise Refusal(f"the expansion {product} has another use, so it would be computed all the same")
        frontier.extend(user for user in node.users if user not in seen)
        seen.update(node.users)


def rewrite(writer: Writer, attention: Attention, form: Expanded) -> str:
    """Absorb W_UK into the query, decode over the latents, project the result by W_UV; what serves the attention."""
    writer.before = attention.output
    i, j, c = attention.i, attention.j, form.up_k.c
    rows = [*form.sequences, i]
    latents = writer.lay_out(form.up_k.latent, [form.sequences, [j], [], [c]])
    k_rope = writer.lay_out(form.k_rope, [form.sequences, [j], [], [form.rope]])
    for name, cache in (("latents", latents), ("rotary keys", k_rope)):
        require_rows(name, cache)
    w_uk = writer.lay_out(form.up_k.weight, [form.heads, [form.nope], [c]])
    w_uv = writer.lay_out(form.up_v.weight, [form.heads, [form.up_v.c], [attention.x]])
    q_nope = writer.lay_out(form.q_nope, [form.heads, rows, [form.nope]])
    q_rope = writer.lay_out(form.q_rope, [form.sequences, [i], form.heads, [form.rope]])
    tensors = (latents, k_rope, w_uk, w_uv, q_nope, q_rope)
    if any(tensor.meta["val"].dtype != attention.dtype for tensor in tensors):
        raise Refusal("mixed dtypes among latents, weights and queries")
    by_head = writer.call(flashmla.bmm.default, q_nope, w_uk)
    absorbed = writer.lay_out(
        Access(by_head, (entry(form.heads), entry(rows), whole(c))), [form.sequences, [i], form.heads, [c]]
    )
    q = writer.call(aten.cat.default, [absorbed, q_rope], -1)
    served_by, out = attend_rows(writer, attention, form.sequences, form.heads, q, latents, k_rope, c.size, 0)
    attended = writer.lay_out(
        Access(out, (entry(form.sequences), whole(i), entry(form.heads), whole(c))), [form.heads, rows, [c]]
    )
    values = writer.call(flashmla.bmm.default, attended, w_uv)
    index = (entry(form.heads), entry(rows), whole(attention.x))
    groups = [*([axis] for axis in attention.outer), [i], [attention.x]]
    writer.replace(attention.output, writer.lay_out(Access(values, index), groups))
    return served_by
