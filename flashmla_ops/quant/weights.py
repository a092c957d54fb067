"""Formats of quantised weights: integers in panels, as `flashmla::gemm` reads them, and their scales.

``int8`` has a float32 scale for each row, 127 of which is the row's largest magnitude. ``int4_gN`` has a bfloat16 scale
for each N elements of a row, chosen among a few that clip more or less, so that the squared error is least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats.int8_g128 import encode_integers
from flashmla_ops.ops.check import FLOAT_NAMES, FLOATS, dtype_name
from flashmla_ops.panels import PANEL, pack_int4, to_panels
from flashmla_ops.quant.feedback import round_with_feedback
from flashmla_ops.reference.gemm import values

#: A weight that stays as it is.
NATIVE = "native"
#: Which code the element of largest magnitude of a group gets: beyond -8 it is clipped, and the others are finer.
EXTREMES = (-6.0, -7.0, -7.5, -8.0, -8.5, -9.0, -10.0, -11.0)
#: Elements that are rounded at once: a few tensors of this size are in memory.
AT_ONCE = 1 << 22


@dataclass(frozen=True)
class WeightFormat:
    """How a weight ``[n, k]`` is kept."""

    name: str
    bits: int  # of an element
    group: int  # elements of k that share a scale; 0: all of a row
    scale: torch.dtype
    round: Callable[[Tensor], tuple[Tensor, Tensor]]  # rows to integers [n, k] and scales [n] or [n, k / group]

    def obstacle(self, n: int, k: int) -> str:
        """Why a weight cannot have this format; empty if it can."""
        if n % PANEL:
            return f"{n} rows, no multiple of {PANEL}"
        return f"rows of {k}, no multiple of {self.group}" if self.group and k % self.group else ""

    def encode(self, weight: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A weight ``[n, k]`` as panels, and scales as `flashmla::gemm` takes them: ``[n]`` or panels.

        ``moments [k, k]``: of the inputs, by which int4 rounds with `feedback`; None: each group by itself.
        Raises `ArgumentError` for sizes and types that do not fit, and for elements that are not finite.
        """
        check_weight(weight)
        if reason := self.obstacle(*weight.shape):
            raise ArgumentError("quantize", "weight", f"a weight that {self.name} fits", reason)
        rows = max(1, AT_ONCE // max(1, weight.size(1)))
        feeds = moments is not None and self.bits == 4
        parts = [
            self.round_fed(part.float(), moments) if feeds else self.round(part.float())
            for part in weight.detach().split(weight.size(0) if feeds else rows)
        ]
        codes, scale = (torch.cat(each) for each in zip(*parts, strict=True))
        return (pack_int4(codes), to_panels(scale)) if self.bits == 4 else (to_panels(codes), scale)

    def round_fed(self, weight: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
        assert moments is not None
        return round_with_feedback(weight, moments, self.group, self.round, _codes)

    def empty(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        """The shapes and types of `encode`, on the meta device."""
        panels = (n // PANEL, k // 8, PANEL) if self.bits == 4 else (n // PANEL, k, PANEL)
        scale = (n // PANEL, k // self.group, PANEL) if self.group else (n,)
        packed = torch.empty(panels, dtype=torch.int32 if self.bits == 4 else torch.int8, device="meta")
        return packed, torch.empty(scale, dtype=self.scale, device="meta")


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise `ArgumentError` for a weight that no format takes, whatever its sizes."""
    if weight.dim() != 2:
        raise ArgumentError("quantize", name, "shape [n, k]", f"{weight.dim()} dimensions")
    if weight.dtype not in FLOATS:
        raise ArgumentError("quantize", name, FLOAT_NAMES, dtype_name(weight.dtype))
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise ArgumentError("quantize", name, "finite elements", "some that are infinite or NaN")


def decode(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `WeightFormat.encode` kept, ``[n, k]``: integers times scales, rounded once."""
    return values(packed, scale, torch.float32).to(dtype)


def _round_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = encode_integers(rows, 127)
    return codes.view(torch.int8), scale


def _round_int4(group: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def round_groups(rows: Tensor) -> tuple[Tensor, Tensor]:
        x = rows.unflatten(1, (-1, group))  # [n, k / group, group]
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        # By a power of two, so that nothing is rounded and no square overflows.
        _, exponent = torch.frexp(extreme)
        x, extreme = (torch.ldexp(each, -exponent) for each in (x, extreme))
        codes, scale, least = torch.zeros_like(x), torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
        for code in EXTREMES:
            tried = _fitted(x, _nonzero(extreme / code))
            rounded = _codes(x, tried)
            error = (rounded * tried - x).square().sum(-1, keepdim=True)
            better = error < least
            found = ((rounded, codes), (tried, scale), (error, least))
            codes, scale, least = (torch.where(better, new, old) for new, old in found)
        return codes.flatten(1).to(torch.int8), torch.ldexp(scale, exponent).squeeze(-1).to(torch.bfloat16)

    return round_groups


def _fitted(x: Tensor, scale: Tensor) -> Tensor:
    """The scale that is best for the codes that ``scale`` gives, as a bfloat16 has it."""
    codes = _codes(x, scale)
    fitted = (codes * x).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
    return _nonzero(fitted.nan_to_num(nan=0.0).to(torch.bfloat16).float())


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-8, 7)


def _nonzero(scale: Tensor) -> Tensor:
    """1 in place of 0, the scale of zeros."""
    return scale.where(scale != 0, 1.0)


INT8 = WeightFormat("int8", 8, 0, torch.float32, _round_int8)
#: All formats, by name.
FORMATS = {
    each.name: each
    for each in (INT8, *(WeightFormat(f"int4_g{n}", 4, n, torch.bfloat16, _round_int4(n)) for n in (128, 64, 32)))
}
#: ``int4``: the largest of these groups that divides a weight's rows.
INT4_NAMES = tuple(name for name in FORMATS if name.startswith("int4"))
