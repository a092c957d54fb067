"""Formats whose values are codes in groups, each group with a scale, beside a rotary part in bfloat16."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats.row_format import RowFormat


@dataclass(frozen=True)
class Grouped(RowFormat):
    """``values`` codes of ``bits``, ``groups`` scales, ``rope`` bfloat16 elements: in that order, unless overridden."""

    values: int = 512
    group: int = 128
    rope: int = 64
    #: The bits of a code: 8, or 4 with the even element in the low half of a byte.
    bits: int = 8
    scale_bytes: int = 4

    @property
    def elements(self) -> int:
        return self.values + self.rope

    @property
    def groups(self) -> int:
        return self.values // self.group

    @property
    def codes_bytes(self) -> int:
        return self.values * self.bits // 8

    @property
    def scales_at(self) -> int:
        """Where the scales begin, in bytes."""
        return self.codes_bytes

    @property
    def rope_at(self) -> int:
        return self.scales_at + self.scale_bytes * self.groups

    @property
    def bytes(self) -> int:
        return self.rope_at + 2 * self.rope

    def constants(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("values", "group", "groups", "rope", "scales_at", "rope_at")}

    @abstractmethod
    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., groups, group]`` float64 to codes of the same shape, uint8, and scales ``[..., groups]`` as stored:
        of a type of ``scale_bytes``."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """``[..., values]`` uint8 to numbers in float64, which scales multiply."""

    @abstractmethod
    def decode_scales(self, scales: Tensor) -> Tensor:
        """``[..., groups * scale_bytes]`` uint8, contiguous, to ``[..., groups]`` float64."""

    def quantize(self, rows: Tensor) -> Tensor:
        """Values by `encode`; rotary elements rounded to bfloat16, all NaN with the same bits."""
        values, rope = rows.double().split([self.values, self.rope], dim=-1)
        codes, scales = self.encode(values.unflatten(-1, (self.groups, self.group)))
        # Conversions of torch differ in the bits of a NaN.
        rotary = rope.float().to(torch.bfloat16).view(torch.int16).where(~rope.isnan(), 0x7FC0)
        out = rows.new_zeros((*rows.shape[:-1], self.bytes), dtype=torch.uint8)
        for at, part in ((0, self._packed(codes.flatten(-2))), (self.scales_at, scales), (self.rope_at, rotary)):
            stored = part.clone(memory_format=torch.contiguous_format).view(torch.uint8)
            out[..., at : at + stored.size(-1)] = stored
        return out

    def dequantize(self, rows: Tensor) -> Tensor:
        """A value is its number times the scale of its group."""

        def part(at: int, size: int) -> Tensor:
            return rows.view(torch.uint8)[..., at : at + size].clone(memory_format=torch.contiguous_format)

        codes, scales = part(0, self.codes_bytes), part(self.scales_at, self.groups * self.scale_bytes)
        values = self.decode(self._unpacked(codes)).unflatten(-1, (self.groups, self.group))
        values = torch.mul(values, self.decode_scales(scales)[..., None]).flatten(-2)
        if not self.rope:
            return values
        rope = part(self.rope_at, 2 * self.rope).view(torch.bfloat16)
        return torch.cat([values, rope.double()], dim=-1)

    def _packed(self, codes: Tensor) -> Tensor:
        return codes if self.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4

    def _unpacked(self, stored: Tensor) -> Tensor:
        return stored if self.bits == 8 else torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Float32Scales(Grouped):
    """Scales in float32."""

    def decode_scales(self, scales: Tensor) -> Tensor:
        return scales.view(torch.float32).double()
