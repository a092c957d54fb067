"""``fp8_v32``: the FP8 cache of DeepSeek's FlashMLA package for DeepSeek-V3.2, 656 bytes a token.

512 values in e4m3; for each group of 128 of them a scale, a power of two in float32; then 64 rotary elements in
bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats.row_format import RowFormat


@dataclass(frozen=True)
class Fp8V32(RowFormat):
    name: str = "fp8_v32"
    cpp: str = "Fp8V32"
    values: int = 512
    group: int = 128
    rope: int = 64
    #: Scales are at least 2 to this: the official package's 1e-4, rounded up to a power of two.
    least_exponent: int = -13

    @property
    def elements(self) -> int:
        return self.values + self.rope

    @property
    def groups(self) -> int:
        return self.values // self.group

    @property
    def scales_at(self) -> int:
        """Where the scales begin, in bytes."""
        return self.values

    @property
    def rope_at(self) -> int:
        return self.scales_at + 4 * self.groups

    @property
    def bytes(self) -> int:
        return self.rope_at + 2 * self.rope

    def constants(self) -> dict[str, int]:
        names = ("values", "group", "groups", "rope", "scales_at", "rope_at", "least_exponent")
        return {name: getattr(self, name) for name in names}

    def quantize(self, rows: Tensor) -> Tensor:
        """Raises nothing: a value that is not finite becomes NaN, with the sign of the element.

        A group's scale is the smallest power of two s, of 2^least_exponent and more, with |x| <= 448 s for all its
        finite x (448 is the largest e4m3 number); a value is x / s rounded to the nearest e4m3 number, ties to even.
        """
        values, rope = rows.double().split([self.values, self.rope], dim=-1)
        groups = values.unflatten(-1, (self.groups, self.group))
        largest = groups.abs().where(groups.isfinite(), 0.0).amax(dim=-1)
        mantissa, exponent = torch.frexp(largest)  # largest is mantissa * 2^exponent, mantissa in [1/2, 1)
        exponent = exponent - 9 + (mantissa > 0.875)  # 448 is 7/8 2^9
        exponent = exponent.where(largest > 0, self.least_exponent).clamp(min=self.least_exponent)
        scales = torch.ldexp(torch.ones_like(largest), exponent)
        scaled = (groups / scales[..., None]).where(groups.isfinite(), torch.nan)
        codes = scaled.flatten(-2).float().to(torch.float8_e4m3fn)
        codes = (codes.view(torch.uint8) & 0x7F) | (values.signbit().to(torch.uint8) << 7)
        # Conversions of torch differ in the bits of a NaN.
        rotary = rope.float().to(torch.bfloat16).view(torch.int16).where(~rope.isnan(), 0x7FC0)
        parts = (codes, scales.float(), rotary)
        return torch.cat([part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in parts], -1)

    def dequantize(self, rows: Tensor) -> Tensor:
        """A value is its e4m3 number times the scale of its group."""
        sizes = [self.scales_at, self.rope_at - self.scales_at, 2 * self.rope]
        codes, scales, rope = (
            part.clone(memory_format=torch.contiguous_format) for part in rows.view(torch.uint8).split(sizes, dim=-1)
        )
        values = codes.view(torch.float8_e4m3fn).double().unflatten(-1, (self.groups, self.group))
        values = values * scales.view(torch.float32).double()[..., None]
        return torch.cat([values.flatten(-2), rope.view(torch.bfloat16).double()], dim=-1)


FP8_V32 = Fp8V32()
