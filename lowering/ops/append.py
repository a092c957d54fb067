"""`append_` as Inductor's own IR, so that it is generated into the kernel that computes its rows.

A row write is a scatter: for each (row, head, element), store the value at an offset that depends on the row's slot.
Inductor's scatter of `index_put` cannot serve: it wraps a slot of -1 to the last row, checks bounds inside the parallel
loop, where an exception aborts the process, and lets threads race where two rows name one slot. So `RowScatter` reads
its slots not from the tensor but from the checked copy that `lowering.codegen.cpp` makes in front of the loops, where a
bad slot can still be raised and nothing has been written; skipped rows have a negative offset there, and the store is
guarded.

Rows of a quantised format have scales, each of many elements: `QuantizedRowScatter` has them computed into a buffer as
any rows, and then, in the same generated function, quantised by the code that serves `append_` without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import fallback_handler, lowerings
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv

from flashmla_ops.formats import NATIVE, QUANTIZED, RowFormat
from lowering.codegen import cpp
from lowering.codegen.scatter import CHECKED, MODE, QuantizedRowScatter, RowScatter, Scatter, Slots, Strided
from lowering.session import session

PATTERN = "append_ fused"


def install() -> None:
    """Lower `append_` and `append_.two` in our sessions; elsewhere they stay calls of the library."""
    for overload, lower in (("default", lower_append), ("two", lower_append_two)):
        target = getattr(torch.ops.flashmla.append_, overload)
        lowerings[target] = _in_sessions(target, lower)


def _in_sessions(target: torch._ops.OpOverload, lower: Callable[..., None]) -> Callable[..., Any]:
    opaque = fallback_handler(target, add_to_fallback_set=False)

    def lowering(*args: TensorBox, row_format: str = "native") -> Any:
        # The format of append_, the fourth argument where it is given; append_.two has none.
        if args and isinstance(args[-1], str):
            *args, row_format = args  # type: ignore[assignment]
        called = (*args, row_format) if row_format != "native" else args
        current = session()
        if current is None or not current.settings.fuse_append:
            return opaque(*called)
        reason = why_not(args[0])
        if reason:
            current.lowered.refused(PATTERN, V.graph.current_node, reason)
            return opaque(*called)
        lower(*called)
        current.lowered.rewrote(PATTERN, V.graph.current_node)
        return None

    return lowering


def why_not(cache: TensorBox) -> str:
    """Why an append to this cache is left to the library; empty if it is not."""
    device = cache.get_device_or_error()
    if device.type != "cpu":
        return f"rows are generated for the CPU only, the cache is on {device}"
    return cpp.why_not()


def lower_append(kv_cache: TensorBox, rows: TensorBox, slot_mapping: TensorBox, row_format: str = "native") -> None:
    slots = slots_of(slot_mapping, kv_cache)
    if row_format == NATIVE:
        scatter_rows(kv_cache, rows, slots)
    else:
        quantize_rows(kv_cache, rows, slots, QUANTIZED[row_format])


def lower_append_two(
    kv_cache: TensorBox, k_cache: TensorBox, rows: TensorBox, k_rows: TensorBox, slot_mapping: TensorBox
) -> None:
    slots = slots_of(slot_mapping, kv_cache)
    scatter_rows(kv_cache, rows, slots)
    scatter_rows(k_cache, k_rows, slots)


def slots_of(slot_mapping: TensorBox, cache: TensorBox) -> Slots:
    """Put the mapping into memory, where it can be checked before anything is written."""
    placed = ir.ExternKernel.realize_input(slot_mapping)
    (n,), (stride,) = placed.get_size(), placed.get_stride()
    n_pages, page_size = cache.get_size()[:2]
    return Slots(placed.get_name(), n, stride, placed.get_layout().offset, n_pages * page_size)


def scatter_rows(
    cache: TensorBox,  # [n_pages, page_size, h_kv, d]
    rows: TensorBox,  # [n, h_kv, d]
    slots: Slots,
) -> None:
    cache.realize()
    if ir.try_get_name(cache) in rows.get_read_names():
        rows.realize()  # rows made of rows of the cache are read before the first is overwritten
    register(scatter(RowScatter, cache, rows, slots), cache)


def quantize_rows(
    cache: TensorBox,  # [n_pages, page_size, h_kv, bytes]
    rows: TensorBox,  # [n, h_kv, elements]
    slots: Slots,
    row: RowFormat,
) -> None:
    cache.realize()
    # Inductor has fixed their strides: the operator is tagged needs_exact_strides.
    placed = ir.TensorBox.create(ir.ExternKernel.realize_input(rows))
    scattered = scatter(QuantizedRowScatter, cache, placed, slots)
    for name, value in (
        ("codec", row.cpp),
        ("source", Strided.of(placed)),
        ("target", Strided.of(cache)),
        ("page_size", cache.get_size()[1]),
    ):
        object.__setattr__(scattered, name, value)
    register(scattered, cache)


def scatter(kind: type[Scatter], cache: TensorBox, rows: TensorBox, slots: Slots) -> Scatter:
    """Each element of ``rows`` [n, h_kv, d] at its slot in ``cache``, as a loop nest."""
    page_size = cache.get_size()[1]

    def position(index: Sequence[sympy.Expr]) -> list[sympy.Expr]:
        row, head, element = index
        checked = ops.load(slots.name, row + CHECKED)  # the copy has an element a row, however the tensor lies
        slot = ops.indirect_indexing(checked, slots.capacity, check=False, wrap_neg=False)
        return [*page_and_token(cache, slot, page_size), head, element]

    made = kind(
        device=cache.get_device_or_error(),
        dtype=cache.get_dtype(),
        inner_fn=rows.make_loader(),
        ranges=rows.get_size(),
        output_indexer=position,
        scatter_mode=MODE,  # type: ignore[arg-type]
    )
    object.__setattr__(made, "slots", slots)
    return made


def register(scattered: RowScatter, cache: TensorBox) -> None:
    buffer = ir.ComputedBuffer(name=None, layout=ir.MutationLayoutSHOULDREMOVE(cache), data=scattered)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)


def page_and_token(cache: TensorBox, slot: sympy.Expr, page_size: sympy.Expr) -> list[sympy.Expr]:
    """Page and token of a slot. Where pages follow one another, "page 0, token slot": no division is generated.

    Nor is it where there is one page only: Inductor leaves its index out of the offset, and a skipped row, whose offset
    the page makes negative, would be written to a token of that page.
    """
    page_stride, token_stride = cache.get_stride()[:2]
    equal = V.graph.sizevars.statically_known_equals
    if equal(cache.get_size()[0], 1) or equal(page_stride, page_size * token_stride):
        return [sympy.S.Zero, slot]
    page = FloorDiv(slot, page_size)
    return [page, slot - page * page_size]
