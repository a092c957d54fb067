"""``int8_g128``: 656 bytes a token, with half the error of e4m3 on values that are spread evenly.

512 values in int8; for each group of 128 of them a float32 scale; then 64 rotary elements in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats.grouped import Float32Scales

#: The least normal float32: no scale is below it.
LEAST = 2.0**-126


def encode_integers(groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """In float32: a group's scale is its largest |x| / ``most``, a value x / scale rounded to nearest, ties to even.

    A group that holds an element that is not finite has a NaN for its scale, and becomes NaN whole: integers have none.
    """
    x = groups.float()
    largest = x.abs().where(x.isfinite(), 0.0).amax(dim=-1)
    scales = (largest / most).clamp(min=LEAST)
    finite = x.isfinite().all(dim=-1)
    codes = (x / scales[..., None]).where(finite[..., None], 0.0).round().to(torch.int8)
    return codes.view(torch.uint8), scales.where(finite, torch.nan)


@dataclass(frozen=True)
class Int8G128(Float32Scales):
    name: str = "int8_g128"
    cpp: str = "Int8G128"

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        return encode_integers(groups, 127)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).double()


INT8_G128 = Int8G128()
