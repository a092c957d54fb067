"""``flashmla::append_``: write new rows into a paged cache, in place. The only operator that mutates anything.

With a ``row_format`` other than "native" the cache holds bytes, and rows are quantised as they are written.

    kv_cache      [n_pages, page_size, h_kv, d] float32, bfloat16 or float16; bytes with a ``row_format``. Written.
    k_cache       [n_pages, page_size, h_kv, d_k], `append_.two` alone: the second tensor of a cache of two. Written.
    rows, k_rows  [n, h_kv, d] and [n, h_kv, d_k], of the cache's type: row i goes to slot_mapping[i]
    slot_mapping  [n] int64: page * page_size + offset; negative: skip. Where two rows name one slot, the later stays.
    row_format    "native", or a name of `flashmla_ops.formats`

Raises `ArgumentError` for shapes, types and devices that do not fit, and for a slot past the end of the cache before
anything is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NAMES, NATIVE, QUANTIZED
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._library import (
    define,
    require,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_dtype,
    require_float,
)
from flashmla_ops.ops._overlap import require_apart
from flashmla_ops.ops._vmap import Dims, each
from flashmla_ops.ops.quantize import require_pages

OP = "append_"


def check(cache: Tensor, rows: Tensor, slot_mapping: Tensor, *, cache_name: str, rows_name: str) -> None:
    require_dims(OP, cache_name, cache, "[n_pages, page_size, h_kv, d]")
    require_float(OP, cache_name, cache)
    require_contiguous_rows(OP, cache_name, cache)
    _, page_size, h_kv, d = cache.shape
    require(OP, cache_name, page_size >= 1, "page_size of at least 1", page_size)
    require_dims(OP, rows_name, rows, "[n, h_kv, d]")
    require_dtype(OP, rows_name, rows, cache.dtype)
    require_device(OP, rows_name, rows, cache.device)
    require(OP, rows_name, rows.size(1) == h_kv, f"{h_kv} KV heads, as {cache_name}", rows.size(1))
    require(OP, rows_name, rows.size(2) == d, f"rows of {d} elements, as {cache_name}", rows.size(2))
    _check_slot_mapping(rows, slot_mapping, rows_name)
    require_apart(OP, cache_name, cache, **{rows_name: rows}, slot_mapping=slot_mapping)


def check_quantized(kv_cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str) -> None:
    """As `check`, of a cache of bytes and rows of floating-point numbers."""
    require(OP, "row_format", row_format in QUANTIZED, f"one of {', '.join(NAMES)}", row_format)
    row = QUANTIZED[row_format]
    require_dims(OP, "kv_cache", kv_cache, "[n_pages, page_size, h_kv, d]")
    require_pages(OP, "kv_cache", kv_cache, row)
    require_contiguous_rows(OP, "kv_cache", kv_cache)
    _, page_size, h_kv, _ = kv_cache.shape
    require(OP, "kv_cache", page_size >= 1, "page_size of at least 1", page_size)
    require_dims(OP, "rows", rows, "[n, h_kv, d]")
    require_float(OP, "rows", rows)
    require_device(OP, "rows", rows, kv_cache.device)
    require(OP, "rows", rows.size(1) == h_kv, f"{h_kv} KV heads, as kv_cache", rows.size(1))
    require(OP, "rows", rows.size(2) == row.elements, f"rows of {row.elements} elements", rows.size(2))
    _check_slot_mapping(rows, slot_mapping, "rows")
    require_apart(OP, "kv_cache", kv_cache, rows=rows, slot_mapping=slot_mapping)


def _check_slot_mapping(rows: Tensor, slot_mapping: Tensor, rows_name: str) -> None:
    require_dims(OP, "slot_mapping", slot_mapping, "[n]")
    require_dtype(OP, "slot_mapping", slot_mapping, torch.int64)
    require_device(OP, "slot_mapping", slot_mapping, rows.device)
    require(OP, rows_name, rows.size(0) == slot_mapping.size(0), "one row for each slot", rows.size(0))


def check_slots(cache: Tensor, slot_mapping: Tensor) -> None:
    """Raise if a slot lies past the end of the cache. Runs before anything is written."""
    slots = cache.size(0) * cache.size(1)
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot >= slots:
            raise ArgumentError(OP, "slot_mapping", f"slots below {slots}", f"{slot} at [{i}]")


def append_fake(kv_cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str = "native") -> None:
    if row_format != NATIVE:
        check_quantized(kv_cache, rows, slot_mapping, row_format)
    else:
        check(kv_cache, rows, slot_mapping, cache_name="kv_cache", rows_name="rows")


def append_reference(kv_cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str = "native") -> None:
    append_fake(kv_cache, rows, slot_mapping, row_format)
    check_slots(kv_cache, slot_mapping)
    reference.append(kv_cache, rows, slot_mapping, row_format)


def append_two_fake(kv_cache: Tensor, k_cache: Tensor, rows: Tensor, k_rows: Tensor, slot_mapping: Tensor) -> None:
    check(kv_cache, rows, slot_mapping, cache_name="kv_cache", rows_name="rows")
    check(k_cache, k_rows, slot_mapping, cache_name="k_cache", rows_name="k_rows")
    for dim in range(2):
        same = k_cache.size(dim) == kv_cache.size(dim)
        require(OP, "k_cache", same, f"size {kv_cache.size(dim)} in dimension {dim}, as kv_cache", k_cache.size(dim))
    require_apart(OP, "kv_cache", kv_cache, k_rows=k_rows)
    require_apart(OP, "k_cache", k_cache, rows=rows, kv_cache=kv_cache)


def append_two_reference(kv_cache: Tensor, k_cache: Tensor, rows: Tensor, k_rows: Tensor, slot_mapping: Tensor) -> None:
    append_two_fake(kv_cache, k_cache, rows, k_rows, slot_mapping)
    check_slots(kv_cache, slot_mapping)
    reference.append(kv_cache, rows, slot_mapping)
    reference.append(k_cache, k_rows, slot_mapping)


def append_autocast(dtype: torch.dtype, kv_cache: Tensor, rows: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Rows in the cache's dtype; rows for a cache of bytes are quantised from what they are."""
    return kv_cache, cast(rows, kv_cache.dtype), *rest


def append_two_autocast(
    dtype: torch.dtype, kv_cache: Tensor, k_cache: Tensor, rows: Tensor, k_rows: Tensor, slot_mapping: Tensor
) -> tuple[Any, ...]:
    return kv_cache, k_cache, cast(rows, kv_cache.dtype), cast(k_rows, k_cache.dtype), slot_mapping


def append_vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    """One append for each entry, into a view of its cache."""
    _require_mapped(in_dims, kv_cache=0)
    return each(torch.ops.flashmla.append_.default, info, in_dims, *args)


def append_two_vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    _require_mapped(in_dims, kv_cache=0, k_cache=1)
    return each(torch.ops.flashmla.append_.two, info, in_dims, *args)


def _require_mapped(in_dims: Dims, **caches: int) -> None:
    """Raise if a cache is the same for all entries, which cannot all write it. Torch's in-place operators do too."""
    for name, position in caches.items():
        require(OP, name, in_dims[position] is not None, "a cache for each entry under vmap", "one for all")


define(
    f'{OP}(Tensor(a!) kv_cache, Tensor rows, Tensor slot_mapping, str row_format="native") -> ()',
    fake=append_fake,
    reference=append_reference,
    vmap=append_vmap,
    autocast=append_autocast,
)
define(
    f"{OP}.two(Tensor(a!) kv_cache, Tensor(b!) k_cache, Tensor rows, Tensor k_rows, Tensor slot_mapping) -> ()",
    fake=append_two_fake,
    reference=append_two_reference,
    vmap=append_two_vmap,
    autocast=append_two_autocast,
)
