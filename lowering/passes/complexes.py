"""Products of complex numbers become real arithmetic, which Inductor generates code for.

Rotary embeddings are often written with them: ``view_as_real(view_as_complex(x) * freqs)``. Torch 2.11 to 2.15 generate
no code for complex numbers: each of the three is a call of ATen, and cuts what stands around it into kernels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from lowering.passes.attempt import attempt
from lowering.passes.graph import VIEWS, aten, inputs, is_call, refuse_gradient, shape
from lowering.passes.strides import is_returned_beside
from lowering.passes.writer import Writer
from lowering.record import Record, Refusal

PATTERN = "complex product"
#: Operators that move numbers, whatever these are: the first argument is the tensor.
MOVES = (
    *VIEWS,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
    aten.alias.default,
)
CONJUGATES = (aten._conj.default, aten.conj_physical.default, aten._conj_physical.default)
#: Types of complex numbers whose parts are computed as torch does it: those of complex32 are widened in between.
TYPES = (torch.complex64, torch.complex128)

#: The real and the imaginary part of a tensor, each of its shape.
Parts = tuple[Node, Node]


def write_out_complex(graph: torch.fx.Graph, record: Record) -> None:
    """Compute the parts of every complex product that is read as real numbers."""
    writer = Writer(graph)
    known: dict[Node, Parts] = {}
    for node in list(graph.nodes):
        if is_call(node, aten.view_as_real.default) and _is_product(_source(inputs(node)[0])):
            found = dict(known)
            if attempt(writer, record, PATTERN, node, partial(_rewrite, writer, node, found)):
                known = found


def _source(node: Node) -> Node:
    """What a node moves the numbers of, or conjugates."""
    while node.target in (*MOVES, *CONJUGATES):
        node = inputs(node)[0]
    return node


def _is_product(node: Node) -> bool:
    """Whether a node multiplies complex numbers of one type by each other."""
    if not is_call(node, aten.mul.Tensor):
        return False
    dtypes = {x.meta["val"].dtype if isinstance(x, Node) else None for x in (node, *inputs(node))}
    return len(dtypes) == 1 and dtypes <= set(TYPES)


def _rewrite(writer: Writer, node: Node, known: dict[Node, Parts]) -> str:
    refuse_gradient(writer.graph)
    if is_returned_beside(node):
        raise Refusal("two results share the product's memory")
    writer.before = node
    pieces = [writer.call(aten.unsqueeze.default, part, -1) for part in _parts(writer, inputs(node)[0], known)]
    writer.replace(node, writer.call(aten.cat.default, pieces, -1))
    return f"{PATTERN} -> real arithmetic"


def _parts(writer: Writer, node: Node, known: dict[Node, Parts]) -> Parts:
    if node not in known:
        known[node] = _computed(writer, node, known)
    return known[node]


def _move(writer: Writer, node: Node, part: Node) -> Node:
    """A part moved as a node moves the numbers."""
    if node.target in VIEWS:
        return writer.view(part, shape(node))
    return writer.call(node.target, part, *inputs(node)[1:], **node.kwargs)


def _computed(writer: Writer, node: Node, known: dict[Node, Parts]) -> Parts:
    """The parts from those of what the node is computed from; those of a tensor that is there are read from it."""
    if node.target in MOVES:
        re, im = _parts(writer, inputs(node)[0], known)
        return _move(writer, node, re), _move(writer, node, im)
    if node.target in CONJUGATES:
        re, im = _parts(writer, inputs(node)[0], known)
        return re, writer.call(aten.neg.default, im)
    if is_call(node, aten.complex.default):
        sizes = [writer.size(n) for n in shape(node)]
        re, im = inputs(node)
        return writer.call(aten.expand.default, re, sizes), writer.call(aten.expand.default, im, sizes)
    if _is_product(node):
        (a, b), (c, d) = (_parts(writer, factor, known) for factor in inputs(node))
        mul, sub, add = aten.mul.Tensor, aten.sub.Tensor, aten.add.Tensor
        re = writer.call(sub, writer.call(mul, a, c), writer.call(mul, b, d))
        return re, writer.call(add, writer.call(mul, a, d), writer.call(mul, b, c))
    if is_call(node, aten.view_as_complex.default):
        pairs = inputs(node)[0]
    elif node.meta["val"].is_conj():
        raise Refusal(f"{node} is conjugated only when it is read")
    else:
        pairs = writer.call(aten.view_as_real.default, node)
    return writer.call(aten.select.int, pairs, -1, 0), writer.call(aten.select.int, pairs, -1, 1)
