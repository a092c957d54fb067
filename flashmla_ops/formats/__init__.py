"""Row formats: how one token of one KV head lies in memory, one file a format.

A cache row is a *value* (its first ``d_v`` elements) and a *key* (its elements from ``qk_start`` on, followed by the
row of a second tensor where one is given). ``native`` rows hold the elements themselves in the cache tensor's dtype. A
quantised format has its layout and its codec in torch here, which are the definition; its constants become a C++ header
(`header`), so that no number stands twice; and its codec in C++ is ``cpu/csrc/flashmla/formats/NAME.h``.

To add one: its file here, its C++ header, its line in `QUANTIZED`.
"""

from __future__ import annotations

from flashmla_ops.formats.fp4_v41 import FP4_V41
from flashmla_ops.formats.fp8_model1 import FP8_MODEL1
from flashmla_ops.formats.fp8_v32 import FP8_V32
from flashmla_ops.formats.fp8_v41 import FP8_V41
from flashmla_ops.formats.grouped import Grouped
from flashmla_ops.formats.int4_g32 import INT4_G32
from flashmla_ops.formats.int8_g128 import INT8_G128
from flashmla_ops.formats.row_format import RowFormat

#: The format of elements as they are.
NATIVE = "native"
#: Those of caches of bytes, by name. Their order is their number in C++, which begins at 1.
QUANTIZED: dict[str, RowFormat] = {
    each.name: each for each in (FP8_V32, INT8_G128, FP8_MODEL1, FP8_V41, FP4_V41, INT4_G32)
}
#: Those of MLA's latents: elements of a latent, and of its rotary key.
LATENTS = {each.name: (each.values, each.rope) for each in (FP8_V32, INT8_G128, INT4_G32)}
NAMES = (NATIVE, *QUANTIZED)
FORMAT_NAMES = ", ".join(NAMES)
QUANTIZED_NAMES = ", ".join(QUANTIZED)


def row_elements(row_format: str) -> int:
    """Elements of a row of a quantised format."""
    return QUANTIZED[row_format].elements


def row_bytes(row_format: str) -> int:
    """Bytes of a row of a quantised format."""
    return QUANTIZED[row_format].bytes


def row_tail(row_format: str) -> int:
    """Bytes of a row of a quantised format that a page holds apart."""
    return QUANTIZED[row_format].tail


__all__ = [
    "FORMAT_NAMES",
    "FP4_V41",
    "FP8_MODEL1",
    "FP8_V32",
    "FP8_V41",
    "INT4_G32",
    "INT8_G128",
    "LATENTS",
    "NAMES",
    "NATIVE",
    "QUANTIZED",
    "QUANTIZED_NAMES",
    "Grouped",
    "RowFormat",
    "row_bytes",
    "row_elements",
    "row_tail",
]
