"""What formats share whose row is one byte a value, a float32 scale a group of them, and a rotary part in bfloat16."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats.row_format import RowFormat


@dataclass(frozen=True)
class Grouped(RowFormat):
    """``values`` codes of one byte, ``groups`` scales, ``rope`` bfloat16 elements, in that order."""

    values: int = 512
    group: int = 128
    rope: int = 64

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
        return {name: getattr(self, name) for name in ("values", "group", "groups", "rope", "scales_at", "rope_at")}

    @abstractmethod
    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., groups, group]`` float64 to codes of the same shape and scales ``[..., groups]`` float32."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """``[..., values]`` uint8 to numbers in float64, which scales multiply."""

    def quantize(self, rows: Tensor) -> Tensor:
        """Values by `encode`; rotary elements rounded to bfloat16, all NaN with the same bits."""
        values, rope = rows.double().split([self.values, self.rope], dim=-1)
        codes, scales = self.encode(values.unflatten(-1, (self.groups, self.group)))
        # Conversions of torch differ in the bits of a NaN.
        rotary = rope.float().to(torch.bfloat16).view(torch.int16).where(~rope.isnan(), 0x7FC0)
        parts = (codes.flatten(-2), scales, rotary)
        return torch.cat([part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in parts], -1)

    def dequantize(self, rows: Tensor) -> Tensor:
        """A value is its number times the scale of its group."""
        sizes = [self.scales_at, self.rope_at - self.scales_at, 2 * self.rope]
        codes, scales, rope = (
            part.clone(memory_format=torch.contiguous_format) for part in rows.view(torch.uint8).split(sizes, dim=-1)
        )
        values = self.decode(codes).unflatten(-1, (self.groups, self.group))
        values = values * scales.view(torch.float32).double()[..., None]
        return torch.cat([values.flatten(-2), rope.view(torch.bfloat16).double()], dim=-1)
