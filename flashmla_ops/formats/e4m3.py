"""Codes of type e4m3 (one sign, four exponent and three mantissa bits) under scales that are powers of two."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats.grouped import Float32Scales, Grouped

#: Scales are at least 2 to this: the official package's 1e-4, rounded up to a power of two.
LEAST_EXPONENT = -13


@dataclass(frozen=True)
class E4m3(Grouped):
    """The formats of the official package: what differs is how exponents are stored."""

    def constants(self) -> dict[str, int]:
        return super().constants() | {"least_exponent": LEAST_EXPONENT}

    @abstractmethod
    def store(self, exponents: Tensor) -> Tensor:
        """Scales 2 to ``exponents`` as they lie in a row."""

    def exponents(self, groups: Tensor) -> Tensor:
        """``[..., group]`` of any float type to ``[...]`` int32, the exponents of the groups' scales.

        A group's scale is the smallest power of two s, of 2^LEAST_EXPONENT and more, with |x| <= 448 s for all its
        finite x: 448 is the largest e4m3 number.
        """
        largest = groups.abs().where(groups.isfinite(), 0.0).amax(dim=-1)
        mantissa, exponent = torch.frexp(largest)  # largest is mantissa * 2^exponent, mantissa in [1/2, 1)
        exponent = exponent - 9 + (mantissa > 0.875)  # 448 is 7/8 2^9
        return exponent.where(largest > 0, LEAST_EXPONENT).clamp(min=LEAST_EXPONENT)

    def scaled(self, groups: Tensor, exponents: Tensor) -> Tensor:
        """``[..., group]`` by their scales, which is exact: what is left is to round to e4m3."""
        scales = torch.ldexp(torch.ones_like(exponents, dtype=groups.dtype), exponents)
        return groups / scales[..., None]

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """An element that is not finite becomes NaN, with its sign, and no scale depends on it.

        A value is x / s, with the scale s of `exponents`, rounded to the nearest e4m3 number, ties to even.
        """
        exponents = self.exponents(groups)
        scaled = self.scaled(groups, exponents).where(groups.isfinite(), torch.nan)
        codes = scaled.float().to(torch.float8_e4m3fn).view(torch.uint8)
        return (codes & 0x7F) | (groups.signbit().to(torch.uint8) << 7), self.store(exponents)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).double()


@dataclass(frozen=True)
class E4m3Float32(E4m3, Float32Scales):
    """Scales in float32."""

    def store(self, exponents: Tensor) -> Tensor:
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


@dataclass(frozen=True)
class E4m3E8m0(E4m3):
    """Scales in e8m0: the exponent plus 127; 255 is NaN."""

    scale_bytes: int = 1

    def store(self, exponents: Tensor) -> Tensor:
        return (exponents + 127).to(torch.uint8)

    def decode_scales(self, scales: Tensor) -> Tensor:
        numbers = torch.ldexp(torch.ones_like(scales, dtype=torch.float64), scales.int() - 127)
        return numbers.where(scales != 255, torch.nan)
