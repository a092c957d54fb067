"""Rows of quantised formats: from elements to bytes, and back, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.layouts import Fp8V32Row


def quantize_rows(rows: Tensor, row: Fp8V32Row) -> Tensor:
    """``[..., elements]`` to ``[..., bytes]`` uint8.

    A group's scale is the smallest power of two s, of 2^least_exponent and more, with |x| <= 448 s for all its finite
    x; a value is x / s rounded to the nearest e4m3 number, ties to even. What is not finite becomes NaN.
    """
    values, rope = rows.double().split([row.values, row.rope], dim=-1)
    groups = values.unflatten(-1, (row.groups, row.group))
    largest = groups.abs().where(groups.isfinite(), 0.0).amax(dim=-1)
    mantissa, exponent = torch.frexp(largest)  # largest is mantissa * 2^exponent, mantissa in [1/2, 1); 448 is 7/8 2^9
    exponent = (exponent - 9 + (mantissa > 0.875)).where(largest > 0, row.least_exponent).clamp(min=row.least_exponent)
    scales = torch.ldexp(torch.ones_like(largest), exponent)
    scaled = (groups / scales[..., None]).where(groups.isfinite(), torch.nan)
    codes = scaled.flatten(-2).float().to(torch.float8_e4m3fn)
    # A NaN has the sign of the element.
    codes = (codes.view(torch.uint8) & 0x7F) | (values.signbit().to(torch.uint8) << 7)
    # Conversions of torch differ in the bits of a NaN.
    rotary = rope.float().to(torch.bfloat16).view(torch.int16).where(~rope.isnan(), 0x7FC0)
    parts = (codes, scales.float(), rotary)
    return torch.cat([part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in parts], dim=-1)


def dequantize_rows(rows: Tensor, row: Fp8V32Row) -> Tensor:
    """``[..., bytes]`` uint8 or float8_e4m3fn to ``[..., elements]`` float64: exact."""
    codes, scales, rope = (
        part.clone(memory_format=torch.contiguous_format)
        for part in rows.view(torch.uint8).split([row.scales_at, row.rope_at - row.scales_at, 2 * row.rope], dim=-1)
    )
    values = codes.view(torch.float8_e4m3fn).double().unflatten(-1, (row.groups, row.group))
    values = values * scales.view(torch.float32).double()[..., None]
    return torch.cat([values.flatten(-2), rope.view(torch.bfloat16).double()], dim=-1)
