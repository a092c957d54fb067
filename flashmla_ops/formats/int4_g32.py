"""``int4_g32``: 448 bytes a token.

512 values in int4 (two's complement, -7 to 7), two to a byte, the even element in its low half; for each group of 32 of
them a float32 scale; then 64 rotary elements in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashmla_ops.formats.grouped import Float32Scales
from flashmla_ops.formats.int8_g128 import encode_integers


@dataclass(frozen=True)
class Int4G32(Float32Scales):
    name: str = "int4_g32"
    cpp: str = "Int4G32"
    group: int = 32
    bits: int = 4

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = encode_integers(groups, 7)
        return codes & 15, scales

    def decode(self, codes: Tensor) -> Tensor:
        return ((codes ^ 8).double()) - 8


INT4_G32 = Int4G32()
