"""``fp8_v32``: the FP8 cache of DeepSeek's FlashMLA package for DeepSeek-V3.2, 656 bytes a token.

512 values in e4m3; for each group of 128 of them a scale, a power of two in float32; then 64 rotary elements in
bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashmla_ops.formats.e4m3 import E4m3Float32


@dataclass(frozen=True)
class Fp8V32(E4m3Float32):
    name: str = "fp8_v32"
    cpp: str = "Fp8V32"


FP8_V32 = Fp8V32()
