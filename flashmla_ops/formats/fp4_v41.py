"""``fp4_v41``: the FP4 rows of DeepSeek-V4.1's second source, 288 bytes a token.

512 values in e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two to a byte, the even element in its low half;
then for each group of 16 a scale in e4m3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats.grouped import Grouped

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Fp4V41(Grouped):
    name: str = "fp4_v41"
    cpp: str = "Fp4V41"
    group: int = 16
    rope: int = 0
    bits: int = 4
    scale_bytes: int = 1

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """In float32: a group's scale is the smallest positive e4m3 number s with |x| <= 6 s for all its x, or the
        largest where there is none; a value is x / s rounded to the nearest number, ties to the even code.

        A group that holds an element that is not finite has a NaN for its scale, and becomes NaN whole: e2m1 has none.
        """
        x = groups.float()
        finite = x.isfinite().all(dim=-1)
        x = x.where(finite[..., None], 0.0)
        positive = torch.arange(1, 127, dtype=torch.uint8, device=x.device)
        sizes = positive.view(torch.float8_e4m3fn).float()
        place = torch.searchsorted(sizes, (x.abs().amax(dim=-1) / 6.0).contiguous()).clamp(max=125)
        scaled = (x / sizes[place][..., None]).abs()
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        for code, (below, above) in enumerate(itertools.pairwise(NUMBERS)):
            middle = (below + above) / 2
            codes += scaled >= middle if code % 2 else scaled > middle
        codes |= x.signbit().to(torch.uint8) << 3
        return codes, positive[place].where(finite, 0x7F)

    def decode(self, codes: Tensor) -> Tensor:
        numbers = torch.tensor(NUMBERS + tuple(-x for x in NUMBERS), dtype=torch.float64, device=codes.device)
        return numbers[codes.long()]

    def decode_scales(self, scales: Tensor) -> Tensor:
        return scales.view(torch.float8_e4m3fn).double()


FP4_V41 = Fp4V41()
