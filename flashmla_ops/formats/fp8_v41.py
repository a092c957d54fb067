"""``fp8_v41``: the FP8 cache of DeepSeek-V4.1, 528 bytes a token.

512 values in e4m3, the rotary part among them; then for each group of 32 a scale in e8m0. Key and value are the whole
row.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashmla_ops.formats.e4m3 import E4m3E8m0


@dataclass(frozen=True)
class Fp8V41(E4m3E8m0):
    name: str = "fp8_v41"
    cpp: str = "Fp8V41"
    group: int = 32
    rope: int = 0


FP8_V41 = Fp8V41()
