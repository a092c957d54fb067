"""``fp8_model1``: the FP8 cache of DeepSeek's FlashMLA package for DeepSeek-V4 ("MODEL1"), 584 bytes a token.

448 values in e4m3, then 64 rotary elements in bfloat16: 576 bytes that lie together. For each group of 64 values a
scale in e8m0, seven of them and a byte of zero: 8 bytes, which a page holds behind the 576 of all its tokens. Key and
value are the whole row. The official package pads pages to multiples of 576 bytes; any stride of pages is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashmla_ops.formats.e4m3 import E4m3E8m0


@dataclass(frozen=True)
class Fp8Model1(E4m3E8m0):
    name: str = "fp8_model1"
    cpp: str = "Fp8Model1"
    values: int = 448
    group: int = 64

    @property
    def rope_at(self) -> int:
        return self.codes_bytes

    @property
    def scales_at(self) -> int:
        return self.rope_at + 2 * self.rope

    @property
    def tail(self) -> int:
        return self.groups + 1

    @property
    def bytes(self) -> int:
        return self.scales_at + self.tail


FP8_MODEL1 = Fp8Model1()
