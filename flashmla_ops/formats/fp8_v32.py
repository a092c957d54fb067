"""``fp8_v32``: the FP8 cache of DeepSeek's FlashMLA package for DeepSeek-V3.2, 656 bytes a token.

512 values in e4m3; for each group of 128 of them a scale, a power of two in float32; then 64 rotary elements in
bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats.grouped import Grouped


@dataclass(frozen=True)
class Fp8V32(Grouped):
    name: str = "fp8_v32"
    cpp: str = "Fp8V32"
    #: Scales are at least 2 to this: the official package's 1e-4, rounded up to a power of two.
    least_exponent: int = -13

    def constants(self) -> dict[str, int]:
        return super().constants() | {"least_exponent": self.least_exponent}

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """An element that is not finite becomes NaN, with its sign, and no scale depends on it.

        A group's scale is the smallest power of two s, of 2^least_exponent and more, with |x| <= 448 s for all its
        finite x (448 is the largest e4m3 number); a value is x / s rounded to the nearest e4m3 number, ties to even.
        """
        largest = groups.abs().where(groups.isfinite(), 0.0).amax(dim=-1)
        mantissa, exponent = torch.frexp(largest)  # largest is mantissa * 2^exponent, mantissa in [1/2, 1)
        exponent = exponent - 9 + (mantissa > 0.875)  # 448 is 7/8 2^9
        exponent = exponent.where(largest > 0, self.least_exponent).clamp(min=self.least_exponent)
        scales = torch.ldexp(torch.ones_like(largest), exponent)
        scaled = (groups / scales[..., None]).where(groups.isfinite(), torch.nan)
        codes = scaled.float().to(torch.float8_e4m3fn).view(torch.uint8)
        return (codes & 0x7F) | (groups.signbit().to(torch.uint8) << 7), scales.float()

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).double()


FP8_V32 = Fp8V32()
