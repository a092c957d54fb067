"""The two parts of an absorbed query, each computed where `cat` wants it.

A query arrives as ``cat([q_nope, rotary])``, is cut apart again, and its rotary part was put together from halves. Here
each part is taken from where it was computed, so that all of them are pieces of one `cat`, whose result they are
written into (`lowering.ops.products`), and nothing is put together twice.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from lowering.passes.absorb import split
from lowering.passes.attempt import attempt
from lowering.passes.axes import Access, Axis, access
from lowering.passes.elements import resolve
from lowering.passes.graph import arguments, aten, flashmla, inputs, shape
from lowering.passes.writer import Writer, is_copied
from lowering.record import Record

PATTERN = "query rows"


def join_queries(graph: torch.fx.Graph, record: Record) -> None:
    """Read the products by head, and the pieces of each `cat` that holds one, from where they were computed."""
    writer = Writer(graph)
    for node in list(graph.nodes):
        if node.target == flashmla.bmm.default:
            attempt(writer, record, PATTERN, node, partial(_read_from_source, writer, node))
        elif node.target == aten.cat.default and any(_is_product(piece) for piece in inputs(node)[0]):
            attempt(writer, record, PATTERN, node, partial(_flatten, writer, node))


def _element(node: Node) -> tuple[Access, list[Axis]]:
    axes = [Axis(f"d{dim}", size) for dim, size in enumerate(shape(node))]
    return access(node, axes), axes


def _is_product(piece: Node) -> bool:
    return resolve(_element(piece)[0]).node.target == flashmla.bmm.default


def _read_from_source(writer: Writer, product: Node) -> str | None:
    rows, weight = inputs(product)
    element, axes = _element(rows)
    found = resolve(element)
    if not is_copied(rows, found.node):
        return None
    writer.before = product
    view = writer.lay_out(found, [[axis] for axis in axes])
    if is_copied(view, found.node) or view.meta["val"].dtype != rows.meta["val"].dtype:
        return None
    writer.replace(product, writer.call(flashmla.bmm.default, view, weight))
    return f"{PATTERN} -> read where they were computed"


def _flatten(writer: Writer, node: Node) -> str | None:
    element, axes = _element(node)
    dim = arguments(node)["dim"] % len(axes)
    parts = split(element, axes[dim], nested=True)
    if len(parts) <= len(inputs(node)[0]):
        return None
    writer.before = node
    pieces = []
    for part in parts:
        groups = [[part.axis if axis is axes[dim] else axis] for axis in axes]
        piece = writer.lay_out(part.element, groups)
        if is_copied(piece, part.element.node):
            return None
        pieces.append(piece)
    writer.replace(node, writer.call(aten.cat.default, pieces, dim))
    return f"{PATTERN} -> one cat of {len(pieces)} pieces"
