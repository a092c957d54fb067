"""What dynamic sparsity skipped, what that may have lost, and what it cost to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerReport:
    """One layer. Rows are those of KV heads: a token of a cache with 8 of them has 8."""

    layer: int
    calls: int
    pages: int
    rows: int
    rows_attended: int
    bytes: int
    bytes_attended: int
    bytes_to_choose: int
    multiply_adds: int
    multiply_adds_attended: int
    multiply_adds_to_choose: int
    #: The largest bound of the share of its softmax that a query may have lost; 1 where nothing is proven.
    lost: float

    @classmethod
    def of(cls, layer: int, tally: Tally) -> LayerReport:
        counts: list[float] = tally.counts.tolist()
        sums = dict(zip(NAMES[:-1], map(int, counts), strict=False))
        return cls(layer, **sums, lost=counts[-1])

    @property
    def rows_skipped(self) -> float:
        """Of all rows, the share that was not attended to."""
        return 1 - self.rows_attended / self.rows if self.rows else 0.0

    @property
    def bytes_saved(self) -> float:
        """Of the bytes that attending to all reads, the share that was not read, neither to attend nor to choose."""
        return 1 - (self.bytes_attended + self.bytes_to_choose) / self.bytes if self.bytes else 0.0

    @property
    def multiply_adds_saved(self) -> float:
        spent = self.multiply_adds_attended + self.multiply_adds_to_choose
        return 1 - spent / self.multiply_adds if self.multiply_adds else 0.0


#: The places of a tally.
NAMES = tuple(each.name for each in fields(LayerReport))[1:]


@dataclass
class Tally:
    """Sums over the calls of a layer; the last is not a sum but the largest."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(len(NAMES), dtype=torch.float64))

    def add(self, sums: Sequence[Tensor | float], lost: Tensor) -> None:
        """``sums`` in the order of `NAMES`, without ``lost``: bounds of the share of softmax mass that was lost."""
        if self.counts.device != lost.device:
            self.counts = self.counts.to(lost.device)
        values = [torch.as_tensor(x, dtype=torch.float64, device=lost.device) for x in sums]
        self.counts[:-1] += torch.stack(values)
        self.counts[-1] = torch.maximum(self.counts[-1], lost.max().double())


@dataclass(frozen=True)
class Report:
    """What was skipped, layer by layer and together."""

    sparsity: str
    layers: list[LayerReport]

    @property
    def together(self) -> LayerReport:
        """All layers: sums, and the largest loss."""
        sums = {name: sum(getattr(layer, name) for layer in self.layers) for name in NAMES[:-1]}
        return LayerReport(-1, **sums, lost=max((layer.lost for layer in self.layers), default=0.0))

    def __str__(self) -> str:
        heads = ("layer", "calls", "pages", "rows skipped", "bytes saved", "to choose", "multiply-adds saved", "lost")
        lines = [heads, *(_line(str(layer.layer), layer) for layer in self.layers), _line("all", self.together)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([self.sparsity, *table])


def _line(name: str, layer: LayerReport) -> tuple[str, ...]:
    choosing = layer.bytes_to_choose / layer.bytes if layer.bytes else 0.0
    shares = (layer.rows_skipped, layer.bytes_saved, choosing, layer.multiply_adds_saved, layer.lost)
    skipped, saved, chosen, multiplied, lost = (f"{100 * share:.1f} %" for share in shares)
    return name, str(layer.calls), str(layer.pages), skipped, saved, chosen, multiplied, f"<= {lost}"
