"""Memory that calls are verified on: pages in any order, and NaN in every byte that no query may read."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.formats import NATIVE, QUANTIZED

#: An entry of a block table or of indices that names nothing.
NOWHERE = 2147480000


def cache(row_format: str, dtype: torch.dtype, d: int, owned: Tensor, generator: torch.Generator) -> Tensor:
    """Random rows [n_pages, page_size, 1, d or bytes] where ``owned`` [n_pages, page_size] says so."""
    if row_format == NATIVE:
        rows = torch.randn(*owned.shape, 1, d, generator=generator).to(dtype)
        rows[~owned] = torch.nan
        return rows
    row = QUANTIZED[row_format]
    spread = torch.rand(*owned.shape, 1, 1, generator=generator)
    rows = row.quantize(torch.randn(*owned.shape, 1, row.elements, generator=generator) * spread)
    rows[~owned] = 0xFF
    made = torch.empty(*owned.shape, 1, row.bytes, dtype=torch.uint8)
    parts = row.parts(made)
    for part, piece in zip(parts, rows.split([part.size(-1) for part in parts], dim=-1), strict=True):
        part.copy_(piece)
    return made


def pages(lengths: tuple[int, ...], page_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A block table, and which slots [n_pages, page_size] sequences of these lengths own."""
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator).int()  # two pages are nobody's
    table = torch.full((len(lengths), max(counts) + 1), NOWHERE, dtype=torch.int32)
    owned = torch.zeros(sum(counts) + 2, page_size, dtype=torch.bool)
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[i, :count], order = order[:count], order[count:]
        owned[table[i, :count].long()] = (torch.arange(count * page_size) < length).view(count, page_size)
    return table, owned


def indices(
    shape: tuple[int, int, int], lengths: Tensor | None, n_slots: int, generator: torch.Generator, valid: bool
) -> tuple[Tensor, Tensor]:
    """Indices [b, s_q, topk] into slots, and which slots those that count name.

    Unless all are to be ``valid``, an eighth of them names nothing.
    """
    chosen = torch.randint(0, n_slots, shape, generator=generator)
    outside = torch.tensor([-1, n_slots, NOWHERE, -(2**31)])
    if not valid:
        chosen[..., 3::8] = outside[torch.arange(chosen[..., 3::8].size(-1)) % 4]
    counts = torch.ones(shape, dtype=torch.bool)
    if lengths is not None:
        counts = torch.arange(shape[2]) < lengths[:, None, None]
        counts = counts.expand(shape)
    owned = torch.zeros(n_slots, dtype=torch.bool)
    owned[chosen[counts & (chosen >= 0) & (chosen < n_slots)]] = True
    return chosen.int(), owned
