"""``flashmla::quantize_rows`` and ``flashmla::dequantize_rows``: rows of elements to quantised rows, and back.

`flashmla_ops.formats` has the formats. `append_` quantises on the way into the cache, without this in between. A row of
a format whose pages hold parts of rows apart (``fp8_model1``) is here in one piece, as in a page of one token.

    rows        [..., elements] float32, bfloat16 or float16; of dequantize_rows [..., bytes of a row], one byte each
    row_format  a name of `flashmla_ops.formats`
    dtype       of dequantize_rows: the type of the result

Returns [..., bytes] uint8; of dequantize_rows [..., elements]. Raises `ArgumentError` for a format that is not known
and rows of another size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmla_ops.formats import QUANTIZED, RowFormat
from flashmla_ops.ops._library import (
    FLOAT_NAMES,
    FLOATS,
    define,
    dtype_name,
    require,
    require_float,
)

#: Of the bytes of quantised rows: the official package's caches have the second.
BYTES = (torch.uint8, torch.float8_e4m3fn)
BYTE_NAMES = "uint8 or float8_e4m3fn"


def format_of(op: str, row_format: str) -> RowFormat:
    require(op, "row_format", row_format in QUANTIZED, f"one of {', '.join(QUANTIZED)}", row_format)
    return QUANTIZED[row_format]


def require_bytes(op: str, argument: str, tensor: Tensor, row: RowFormat) -> None:
    """The last dimension of ``tensor`` holds rows of a format."""
    require(op, argument, tensor.dtype in BYTES, BYTE_NAMES, dtype_name(tensor.dtype))
    require(op, argument, tensor.size(-1) == row.bytes, f"rows of {row.bytes} bytes", tensor.size(-1))


def require_pages(op: str, argument: str, cache: Tensor, row: RowFormat) -> None:
    """``cache`` [.., page_size, h_kv, bytes] has rows of a format, and pages as it wants them."""
    require_bytes(op, argument, cache, row)
    if row.tail:
        page_size, h_kv, _ = cache.shape[-3:]
        require(op, argument, h_kv == 1, f"1 KV head with rows of {row.name}", h_kv)
        whole = page_size <= 1 or cache.stride(-3) == row.bytes
        expected = f"stride {row.bytes} between tokens: a page of {row.name} is one piece"
        require(op, argument, whole, expected, f"stride {cache.stride(-3)}")


def quantize_fake(rows: Tensor, row_format: str = "fp8_v32") -> Tensor:
    op = "quantize_rows"
    row = format_of(op, row_format)
    require(op, "rows", rows.dim() >= 1, "shape [..., d]", f"{rows.dim()} dimensions")
    require_float(op, "rows", rows)
    require(op, "rows", rows.size(-1) == row.elements, f"rows of {row.elements} elements", rows.size(-1))
    return rows.new_empty((*rows.shape[:-1], row.bytes), dtype=torch.uint8)


def quantize_reference(rows: Tensor, row_format: str = "fp8_v32") -> Tensor:
    quantize_fake(rows, row_format)
    return QUANTIZED[row_format].quantize(rows)


def dequantize_fake(rows: Tensor, row_format: str = "fp8_v32", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    op = "dequantize_rows"
    row = format_of(op, row_format)
    require(op, "rows", rows.dim() >= 1, "shape [..., d]", f"{rows.dim()} dimensions")
    require_bytes(op, "rows", rows, row)
    require(op, "dtype", dtype in FLOATS, FLOAT_NAMES, dtype_name(dtype))
    return rows.new_empty((*rows.shape[:-1], row.elements), dtype=dtype)


def dequantize_reference(rows: Tensor, row_format: str = "fp8_v32", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    dequantize_fake(rows, row_format, dtype)
    return QUANTIZED[row_format].dequantize(rows).to(dtype)


def quantize_vmap(
    info: Any, in_dims: tuple[int | None, ...], rows: Tensor, row_format: str = "fp8_v32"
) -> tuple[Tensor, int]:
    """The mapped dimension is one more of those that rows lie in."""
    return torch.ops.flashmla.quantize_rows(rows.movedim(in_dims[0] or 0, 0), row_format), 0


def dequantize_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    rows: Tensor,
    row_format: str = "fp8_v32",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, int]:
    return torch.ops.flashmla.dequantize_rows(rows.movedim(in_dims[0] or 0, 0), row_format, dtype), 0


define(
    'quantize_rows(Tensor rows, str row_format="fp8_v32") -> Tensor',
    fake=quantize_fake,
    reference=quantize_reference,
    vmap=quantize_vmap,
)
define(
    'dequantize_rows(Tensor rows, str row_format="fp8_v32", ScalarType dtype=bfloat16) -> Tensor',
    fake=dequantize_fake,
    reference=dequantize_reference,
    vmap=dequantize_vmap,
)
