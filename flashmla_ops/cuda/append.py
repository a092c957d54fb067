"""``flashmla::append_`` and ``append_.two`` on CUDA.

Nothing waits for the device and nothing is read from it, so a call can be captured in a graph. A slot past the end of
the cache is masked: its row is not written, and no error says so, which would need its value on the host.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cutlass_kernels.attention.around_config import AppendConfig
from flashmla_ops.cuda.attention import codes_of
from flashmla_ops.cuda.driver import Values
from flashmla_ops.cuda.engine import Engine
from flashmla_ops.cuda.served import ELEMENTS, are_multiples, divisor, in_int32, served, strides_of
from flashmla_ops.formats import NATIVE, QUANTIZED, row_bytes, row_tail
from flashmla_ops.ops.append import APPEND, APPEND_TWO, Append, AppendTwo
from flashmla_ops.ops.check import dtype_name

#: Bytes of an access in a copy, the best first.
WIDTHS = (16, 8, 4, 2)


def append(engine: Engine, *args: Any, **kwargs: Any) -> None:
    """``flashmla::append_``."""
    a: Append = APPEND.bind(*args, **kwargs)

    def launch(_: list[Tensor]) -> str:
        return write(engine, a.kv_cache, a.rows, a.slot_mapping, a.row_format)

    served(engine, APPEND, a, f"append_ {dtype_name(a.rows.dtype)} to {a.row_format}", a.rows, launch)


def append_two(engine: Engine, *args: Any, **kwargs: Any) -> None:
    """``flashmla::append_.two``: a launch a cache."""
    a: AppendTwo = APPEND_TWO.bind(*args, **kwargs)

    def launch(_: list[Tensor]) -> str:
        first = write(engine, a.kv_cache, a.rows, a.slot_mapping, NATIVE)
        second = write(engine, a.k_cache, a.k_rows, a.slot_mapping, NATIVE)
        return f"{first} and {second}"

    served(engine, APPEND_TWO, a, f"append_.two {dtype_name(a.rows.dtype)}", a.rows, launch)


def write(engine: Engine, cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str) -> str:
    """Launch the kernel that puts rows into a cache; its name. Raises `Unserved`."""
    n_pages, page_size, heads, d = cache.shape
    capacity = in_int32("slots", n_pages * page_size)
    n = in_int32("rows", rows.size(0))
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if row_format == NATIVE:
        config, own = copied(cache, rows)
    else:
        config, rows, own = encoded(cache, rows, row_format)
    if n * heads * d * capacity == 0:
        return config.name
    warps = config.warps
    block_rows = -(-n // (engine.device.multiprocessors * warps)) * warps  # so many that all are busy
    block_rows = min(block_rows, config.most_rows)
    row, head, _ = strides_of(rows)
    values: Values = {
        "cache": cache,
        "rows": rows,
        "slots": slot_mapping,
        "row": row,
        "head": head,
        "slot": slot_mapping.stride(0) * slot_mapping.element_size(),
        "n": n,
        "capacity": capacity,
        **divisor("page_size", page_size),
        "heads": heads,
        "block_rows": block_rows,
        **own,
    }
    engine.run(config, (-(-n // block_rows), 1, 1), values)
    return config.name


def copied(cache: Tensor, rows: Tensor) -> tuple[AppendConfig, dict[str, int]]:
    """The kernel that copies, and its parameters."""
    size = rows.size(-1) * rows.element_size()
    strides = strides_of(cache)[:3]
    numbers = (cache.data_ptr(), rows.data_ptr(), size, *strides, *strides_of(rows)[:2])
    width = next(width for width in WIDTHS if are_multiples(width, *numbers))
    names = ("cache_page", "cache_row", "cache_head")
    return AppendConfig(width), dict(zip(names, strides, strict=True)) | divisor("units", size // width)


def encoded(cache: Tensor, rows: Tensor, row_format: str) -> tuple[AppendConfig, Tensor, dict[str, int]]:
    """The kernel that quantises, the rows as it takes them, and its parameters."""
    if not are_multiples(16, rows.data_ptr(), *strides_of(rows)[:2]):
        rows = rows.clone(memory_format=torch.contiguous_format)
    page, row, head = strides_of(cache)[:3]
    if tail := row_tail(row_format):  # a page is one piece: the heads of its rows lie together
        row, head = row_bytes(row_format) - tail, 0
    width = 16 if are_multiples(16, cache.data_ptr(), page, row, head) else 1
    config = quantising(row_format, rows.dtype, width)
    own = {"cache_page": page, "cache_row": row, "cache_head": head}
    return config, rows, own | dict.fromkeys(("units", "units_magic", "units_shift"), 0)


@lru_cache
def quantising(row_format: str, dtype: torch.dtype, width: int) -> AppendConfig:
    """The kernel for rows of a type; ``width``: 16 if all rows of the cache begin at multiples of 16 bytes, else 1."""
    least_exponent = QUANTIZED[row_format].constants().get("least_exponent", 0)
    return AppendConfig(width, codes_of(row_format), ELEMENTS[dtype], least_exponent)
