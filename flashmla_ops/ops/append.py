"""``flashmla::append_``: write new rows into a paged cache, in place. The only operator that mutates anything.

With a ``row_format`` other than "native" the cache holds bytes, and rows are quantised as they are written.

    kv_cache      [n_pages, page_size, h_kv, d] float32, bfloat16 or float16; bytes with a ``row_format``. Written.
    k_cache       [n_pages, page_size, h_kv, d_k], `append_.two` alone: the second tensor of a cache of two. Written.
    rows, k_rows  [n, h_kv, d] and [n, h_kv, d_k], of the cache's type: row i goes to slot_mapping[i]
    slot_mapping  [n] int64: page * page_size + offset; negative: skip. Where two rows name one slot, the later stays.
    row_format    "native", or a name of `flashmla_ops.formats`

Raises `ArgumentError` for shapes, types and devices that do not fit, and for a slot past the end of the cache before
anything is written. A kernel on CUDA skips the row of such a slot instead: nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import FORMAT_NAMES, NAMES, NATIVE, row_elements
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops._vmap import each
from flashmla_ops.ops.check import Check
from flashmla_ops.ops.operator import Arguments, Operator
from flashmla_ops.ops.quantize import check_pages


@dataclass
class Append(Arguments):
    """A cache, and rows for its slots: slot ``page * page_size + t``; rows of negative slots are not written."""

    kv_cache: Tensor  # [n_pages, page_size, h_kv, d], d contiguous
    rows: Tensor  # [n, h_kv, d]
    slot_mapping: Tensor  # [n] int64
    row_format: str = NATIVE


@dataclass
class AppendTwo(Arguments):
    """Two caches with the same pages, and rows for both."""

    kv_cache: Tensor  # [n_pages, page_size, h_kv, d], d contiguous
    k_cache: Tensor  # [n_pages, page_size, h_kv, d_k], d_k contiguous
    rows: Tensor  # [n, h_kv, d]
    k_rows: Tensor  # [n, h_kv, d_k]
    slot_mapping: Tensor  # [n] int64


def contract(check: Check, a: Append) -> None:
    check.require("row_format", a.row_format in NAMES, f"one of {FORMAT_NAMES}", a.row_format)
    if a.row_format == NATIVE:
        check_native(check, "kv_cache", a.kv_cache, "rows", a.rows, a.slot_mapping)
    else:
        check_quantized(check, a.kv_cache, a.rows, a.slot_mapping, a.row_format)


def check_native(
    check: Check, cache_name: str, cache: Tensor, rows_name: str, rows: Tensor, slot_mapping: Tensor
) -> None:
    check.dims(cache_name, cache, "[n_pages, page_size, h_kv, d]")
    check.floating(cache_name, cache)
    check.contiguous_rows(cache_name, cache)
    check.require(cache_name, cache.size(1) >= 1, "page_size of at least 1", cache.size(1))
    check.dims(rows_name, rows, "[n, h_kv, d]")
    check.dtype(rows_name, rows, cache.dtype)
    check.device(rows_name, rows, cache)
    d, h_kv = cache.size(3), cache.size(2)
    check.require(rows_name, rows.size(1) == h_kv, f"{h_kv} KV heads, as {cache_name}", rows.size(1))
    check.require(rows_name, rows.size(2) == d, f"rows of {d} elements, as {cache_name}", rows.size(2))
    check_slot_mapping(check, rows_name, rows, slot_mapping)
    check.apart(cache_name, cache, {rows_name: rows, "slot_mapping": slot_mapping})


def check_quantized(check: Check, cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str) -> None:
    check.dims("kv_cache", cache, "[n_pages, page_size, h_kv, d]")
    check_pages(check, "kv_cache", cache, row_format)
    check.contiguous_rows("kv_cache", cache)
    check.require("kv_cache", cache.size(1) >= 1, "page_size of at least 1", cache.size(1))
    check.dims("rows", rows, "[n, h_kv, d]")
    check.floating("rows", rows)
    check.device("rows", rows, cache)
    elements = row_elements(row_format)
    check.size("rows", rows, 1, cache.size(2), " KV heads, as kv_cache")
    check.require("rows", rows.size(2) == elements, f"rows of {elements} elements", rows.size(2))
    check_slot_mapping(check, "rows", rows, slot_mapping)
    check.apart("kv_cache", cache, {"rows": rows, "slot_mapping": slot_mapping})


def check_slot_mapping(check: Check, rows_name: str, rows: Tensor, slot_mapping: Tensor) -> None:
    check.dims("slot_mapping", slot_mapping, "[n]")
    check.dtype("slot_mapping", slot_mapping, torch.int64)
    check.device("slot_mapping", slot_mapping, rows)
    check.require(rows_name, rows.size(0) == slot_mapping.size(0), "one row for each slot", rows.size(0))


def contract_two(check: Check, a: AppendTwo) -> None:
    check_native(check, "kv_cache", a.kv_cache, "rows", a.rows, a.slot_mapping)
    check_native(check, "k_cache", a.k_cache, "k_rows", a.k_rows, a.slot_mapping)
    check.same_sizes("k_cache", a.k_cache, "kv_cache", a.kv_cache, 2)
    check.apart("kv_cache", a.kv_cache, {"k_rows": a.k_rows})
    check.apart("k_cache", a.k_cache, {"rows": a.rows, "kv_cache": a.kv_cache})


def check_slots(check: Check, a: Append | AppendTwo) -> None:
    """Raise if a slot lies past the end of the cache. Runs before anything is written."""
    slots = a.kv_cache.size(0) * a.kv_cache.size(1)
    for i, slot in enumerate(a.slot_mapping.tolist()):
        if slot >= slots:
            raise ArgumentError(check.op, "slot_mapping", f"slots below {slots}", f"{slot} at [{i}]")


def two_by_reference(a: AppendTwo) -> None:
    reference.append(a.kv_cache, a.rows, a.slot_mapping)
    reference.append(a.k_cache, a.k_rows, a.slot_mapping)


def autocast(dtype: torch.dtype, a: Append) -> Append:
    """Rows in the cache's dtype; rows for a cache of bytes are quantised from what they are."""
    return dataclasses.replace(a, rows=cast(a.rows, a.kv_cache.dtype))


def autocast_two(dtype: torch.dtype, a: AppendTwo) -> AppendTwo:
    rows, k_rows = cast(a.rows, a.kv_cache.dtype), cast(a.k_rows, a.k_cache.dtype)
    return dataclasses.replace(a, rows=rows, k_rows=k_rows)


def vmap(size: int, dims: dict[str, Any], a: Append) -> tuple[Any, Any]:
    """One append for each entry, into a view of its cache."""
    _require_mapped(APPEND.check, dims, "kv_cache")
    return each(torch.ops.flashmla.append_.default, size, dims, a)


def vmap_two(size: int, dims: dict[str, Any], a: AppendTwo) -> tuple[Any, Any]:
    _require_mapped(APPEND.check, dims, "kv_cache", "k_cache")
    return each(torch.ops.flashmla.append_.two, size, dims, a)


def _require_mapped(check: Check, dims: dict[str, Any], *caches: str) -> None:
    """Raise if a cache is the same for all entries, which cannot all write it. Torch's in-place operators do too."""
    for name in caches:
        check.require(name, dims[name] is not None, "a cache for each entry under vmap", "one for all")


def sharding(a: Append | AppendTwo) -> list[Way]:
    """By KV heads. Slots count the rows of all pages, so that pages are not cut."""
    return [{"kv_cache": 2, "k_cache": 2, "rows": 1, "k_rows": 1}]


APPEND = Operator(
    "append_",
    Append,
    contract,
    lambda a: reference.append(*a.values()),
    mutates=("kv_cache",),
    values=check_slots,
    vmap=vmap,
    autocast=autocast,
    sharding=sharding,
)
APPEND_TWO = Operator(
    "append_.two",
    AppendTwo,
    contract_two,
    two_by_reference,
    mutates=("kv_cache", "k_cache"),
    values=check_slots,
    vmap=vmap_two,
    autocast=autocast_two,
    sharding=sharding,
)
