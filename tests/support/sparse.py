"""A sparse case: its geometry and seed, from which its tensors follow; and its comparison with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.formats import NATIVE, QUANTIZED
from flashmla_ops.ops.sparse import SPARSE_DECODE
from tests.support.compare import OFFICIAL_LSE, Tolerance, difference
from tests.support.poison import strided
from tests.support.rows import empty_cache, write

#: The tolerances of the official tests.
SPARSE_OUT = Tolerance(absolute=1e-3, relative=2.01 / 128, cosine=5e-6)
PREFILL_OUT = Tolerance(absolute=1e-3, relative=3.01 / 128, cosine=7e-6)
FLOAT32 = Tolerance(absolute=2e-5, relative=0.0, cosine=1e-8)
FLOAT32_LSE = Tolerance(absolute=2e-5, relative=2e-5, cosine=1e-8)

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def invalid_indices(n_slots: int) -> list[int]:
    """Eight numbers that name no slot of a cache."""
    return [-1, -2, -n_slots, INT_MIN, n_slots, n_slots + 1, 2147480000, INT_MAX]


@dataclass(frozen=True)
class Rows:
    """One source: a cache, and how many indices of each query token name its rows."""

    topk: int
    n_pages: int = 5
    page_size: int = 16
    row_format: str = NATIVE
    lengths: bool = False  # topk_length is given
    invalid: float = 0.2  # the part of indices that name nothing


@dataclass(frozen=True)
class SparseCase:
    rows: Rows
    extra: Rows | None = None
    b: int = 2
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    d: int = 576  # of a native row, of both tensors if there are two
    d_v: int = 512
    qk_start: int = 0
    d_k: int | None = None
    dtype: str = "bfloat16"
    softmax_scale: float | None = None
    sink: bool = False
    batch_invariant: bool = False
    strided: bool = True
    seed: int = 0

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"SparseCase({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


class _Builder:
    def __init__(self, case: SparseCase) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.generator = torch.Generator().manual_seed(case.seed)

    def lay(self, tensor: Tensor | None, contiguous_rows: bool = True) -> Tensor | None:
        if tensor is None or not self.case.strided:
            return tensor
        return strided(tensor, self.generator, contiguous_rows=contiguous_rows)

    def normal(self, *shape: int, spread: float = 0.1) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * spread).to(self.dtype)

    def source(self, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Cache, k_cache, indices and lengths; what no index that counts names is NaN in every byte."""
        case, n_slots = self.case, rows.n_pages * rows.page_size
        invalid = torch.tensor(invalid_indices(n_slots))
        shape = (case.b, case.s_q, rows.topk)
        chosen = invalid[torch.randint(0, 8, shape, generator=self.generator)]
        if n_slots:
            named = torch.randint(0, n_slots, shape, generator=self.generator)
            valid = torch.rand(shape, generator=self.generator) >= rows.invalid
            chosen = torch.where(valid, named, chosen)
        lengths = None
        counts = torch.ones(shape, dtype=torch.bool)
        if rows.lengths:
            lengths = torch.randint(0, rows.topk + 1, (case.b,), generator=self.generator, dtype=torch.int32)
            counts = torch.arange(rows.topk) < lengths[:, None, None]
        live = torch.zeros(n_slots, dtype=torch.bool)
        live[chosen[counts & (chosen >= 0) & (chosen < n_slots)]] = True
        slots = live.nonzero().flatten()
        cache, k_cache = self.caches(rows, live, slots)
        indices = self.lay(chosen.to(torch.int32), contiguous_rows=False)
        return cache, k_cache, indices, self.lay(lengths, contiguous_rows=False)

    def caches(self, rows: Rows, live: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        case = self.case
        if rows.row_format != NATIVE:
            row = QUANTIZED[rows.row_format]
            cache = empty_cache(row, rows.n_pages, rows.page_size, gaps=case.strided)
            spread = 0.3 * torch.rand(len(slots), 1, 1, generator=self.generator)
            elements = torch.randn(len(slots), 1, row.elements, generator=self.generator) * spread
            write(row, cache, slots, row.quantize(elements))
            return cache, None

        def native(d: int) -> Tensor:
            elements = self.normal(len(live), case.h_kv, d)
            elements[~live] = torch.nan
            return self.lay(elements.view(rows.n_pages, rows.page_size, case.h_kv, d))

        two = case.d_k is not None and rows is case.rows
        d = case.d - (case.d_k or 0) if two else case.d
        return native(d), native(case.d_k) if two else None


def build(case: SparseCase) -> dict[str, Any]:
    """The arguments of ``flashmla::sparse_decode``."""
    make = _Builder(case)
    kv_cache, k_cache, indices, topk_length = make.source(case.rows)
    named = {"extra_kv_cache": None, "extra_indices": None, "extra_topk_length": None, "extra_row_format": NATIVE}
    if case.extra is not None:
        extra, _, extra_indices, extra_length = make.source(case.extra)
        named = {"extra_kv_cache": extra, "extra_indices": extra_indices, "extra_topk_length": extra_length}
        named["extra_row_format"] = case.extra.row_format
    d = case.d if case.rows.row_format == NATIVE else QUANTIZED[case.rows.row_format].elements
    sink = torch.randn(case.h_q, generator=make.generator) if case.sink else None
    if sink is not None and case.h_q > 2:
        sink[0], sink[1] = torch.inf, -torch.inf
    return {
        "q": make.lay(make.normal(case.b, case.s_q, case.h_q, d - case.qk_start, spread=0.5), contiguous_rows=False),
        "kv_cache": kv_cache,
        "k_cache": k_cache,
        "indices": indices,
        "d_v": case.d_v,
        "qk_start": case.qk_start,
        "softmax_scale": case.softmax_scale,
        "row_format": case.rows.row_format,
        "attn_sink": make.lay(sink, contiguous_rows=False),
        "topk_length": topk_length,
        **named,
        "batch_invariant": case.batch_invariant,
    }


def tolerances(case: SparseCase) -> tuple[Tolerance, Tolerance]:
    formats = [rows.row_format for rows in (case.rows, case.extra) if rows is not None]
    if case.dtype == "bfloat16" and any(name.startswith("int") for name in formats):
        # An integer times a scale, held in bfloat16, is rounded, and scores with it.
        wider = max(1.0, 24 * abs(case.softmax_scale or 0.0))
        out = Tolerance(absolute=4e-3 * wider, relative=4.01 / 128, cosine=2e-5 * wider**2)
        return out, Tolerance(absolute=1e-3 * wider, relative=1e-3, cosine=1e-6 * wider**2)
    if case.dtype == "float32":
        return FLOAT32, FLOAT32_LSE
    lse = Tolerance(absolute=2e-6, relative=OFFICIAL_LSE.relative, cosine=OFFICIAL_LSE.cosine)
    return SPARSE_OUT, lse


def check(case: SparseCase, decode: Callable[..., tuple[Tensor, Tensor]] = torch.ops.flashmla.sparse_decode) -> None:
    """Assert that ``decode`` agrees with float64, which runs second: it cannot hide a bad write."""
    named = build(case)
    out, lse = decode(**named)
    expected, expected_lse = SPARSE_DECODE.reference(**named)
    out_tolerance, lse_tolerance = tolerances(case)
    problem = difference("out", out, expected, out_tolerance) or difference("lse", lse, expected_lse, lse_tolerance)
    assert problem is None, f"{problem} | {case!r}"
