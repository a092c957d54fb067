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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.formats import QUANTIZED, QUANTIZED_NAMES, row_bytes, row_elements, row_tail
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops.check import FLOAT_NAMES, FLOATS, Check, Result, dtype_name, with_last
from flashmla_ops.ops.operator import Arguments, Operator

#: The dtypes of caches of bytes. Those of the official package have the second.
BYTES = (torch.uint8, torch.float8_e4m3fn)
BYTE_NAMES = "uint8 or float8_e4m3fn"


@dataclass
class QuantizeRows(Arguments):
    """Rows of elements."""

    rows: Tensor  # [..., d]
    row_format: str = "fp8_v32"


@dataclass
class DequantizeRows(Arguments):
    """Rows of bytes."""

    rows: Tensor  # [..., bytes of a row], of a one-byte type
    row_format: str = "fp8_v32"
    dtype: torch.dtype = torch.bfloat16


def check_bytes(check: Check, name: str, tensor: Tensor, row_format: str) -> None:
    """The last dimension of ``tensor`` holds rows of a format."""
    check.require(name, tensor.dtype in BYTES, BYTE_NAMES, dtype_name(tensor.dtype))
    wanted = row_bytes(row_format)
    check.require(name, tensor.size(-1) == wanted, f"rows of {wanted} bytes", tensor.size(-1))


def check_pages(check: Check, name: str, cache: Tensor, row_format: str) -> None:
    """``cache`` [.., page_size, h_kv, bytes] has rows of a format, and pages as it wants them."""
    check_bytes(check, name, cache, row_format)
    if row_tail(row_format) > 0:
        check.require(name, cache.size(-2) == 1, f"1 KV head with rows of {row_format}", cache.size(-2))
        whole = cache.size(-3) <= 1 or cache.stride(-3) == row_bytes(row_format)
        expected = f"stride {row_bytes(row_format)} between tokens: a page of {row_format} is one piece"
        check.require(name, whole, expected, f"stride {cache.stride(-3)}")


def contract(check: Check, a: QuantizeRows) -> Result:
    check.require("row_format", a.row_format in QUANTIZED, f"one of {QUANTIZED_NAMES}", a.row_format)
    check.require("rows", a.rows.dim() >= 1, "shape [..., d]", f"{a.rows.dim()} dimensions")
    check.floating("rows", a.rows)
    elements = row_elements(a.row_format)
    check.require("rows", a.rows.size(-1) == elements, f"rows of {elements} elements", a.rows.size(-1))
    return Result(with_last(a.rows, row_bytes(a.row_format)), torch.uint8)


def contract_back(check: Check, a: DequantizeRows) -> Result:
    check.require("row_format", a.row_format in QUANTIZED, f"one of {QUANTIZED_NAMES}", a.row_format)
    check.require("rows", a.rows.dim() >= 1, "shape [..., d]", f"{a.rows.dim()} dimensions")
    check_bytes(check, "rows", a.rows, a.row_format)
    check.require("dtype", a.dtype in FLOATS, FLOAT_NAMES, dtype_name(a.dtype))
    return Result(with_last(a.rows, row_elements(a.row_format)), a.dtype)


def vmap(size: int, dims: dict[str, Any], a: QuantizeRows) -> tuple[Tensor, int]:
    """The mapped dimension is one more of those that rows lie in."""
    return torch.ops.flashmla.quantize_rows(a.rows.movedim(dims["rows"], 0), a.row_format), 0


def vmap_back(size: int, dims: dict[str, Any], a: DequantizeRows) -> tuple[Tensor, int]:
    return torch.ops.flashmla.dequantize_rows(a.rows.movedim(dims["rows"], 0), a.row_format, a.dtype), 0


def sharding(a: QuantizeRows | DequantizeRows) -> list[Way]:
    """By any dimension that rows lie in, of the argument and of the result, which both operators may call rows."""
    return [{"rows": dim, "bytes": dim} for dim in range(a.rows.dim() - 1)]


QUANTIZE = Operator(
    "quantize_rows",
    QuantizeRows,
    contract,
    lambda a: QUANTIZED[a.row_format].quantize(a.rows),
    returns=("bytes",),
    vmap=vmap,
    sharding=sharding,
)
DEQUANTIZE = Operator(
    "dequantize_rows",
    DequantizeRows,
    contract_back,
    lambda a: QUANTIZED[a.row_format].dequantize(a.rows),
    returns=("rows",),
    vmap=vmap_back,
    sharding=sharding,
)
