"""A decode case: its geometry and seed, from which all of its tensors follow. Its repr reproduces it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.reference.attention import visible
from tests.support.poison import DEAD_PAGE, strided
from tests.support.threads import threads


@dataclass(frozen=True)
class DecodeCase:
    """See `flashmla_ops.ops.decode` for the meaning of the dimensions; the defaults are the official package's MLA."""

    lengths: tuple[int, ...]
    s_q: int = 1
    h_q: int = 128
    h_kv: int = 1
    page_size: int = 64
    d: int = 576  # of a kv_cache row
    d_v: int = 512
    qk_start: int = 0
    d_k: int | None = None  # of a k_cache row; None: no k_cache
    dtype: str = "bfloat16"
    causal: bool = False
    softmax_scale: float | None = None
    num_parts: int | None = None  # None: no schedule
    sink: bool = False
    strided: bool = True
    window: int = 0
    softcap: float = 0.0
    s_qs: tuple[int, ...] | None = None  # query tokens of each sequence: ragged, and s_q does not count
    batch_invariant: bool = False
    q_spread: float = 0.1  # standard deviation of q: 0.1 gives nearly equal weights, 30 nearly one-hot ones
    seed: int = 0

    @property
    def d_qk(self) -> int:
        return self.d - self.qk_start + (self.d_k or 0)

    @property
    def tokens(self) -> int:
        """Query tokens of all sequences."""
        return len(self.lengths) * self.s_q if self.s_qs is None else sum(self.s_qs)

    def attended(self, i: int) -> tuple[int, int]:
        """Where the rows that any query of sequence i sees begin and end."""
        s_q = self.s_q if self.s_qs is None else self.s_qs[i]
        begins, ends = visible(s_q, self.lengths[i], self.causal, self.window)
        return min(begins, default=0), max(ends, default=0)

    @property
    def small(self) -> bool:
        """Too little work for threads: waking them would take longer than the work itself."""
        return (
            sum(self.lengths) * self.h_kv * self.d < 2**23
            and sum(self.lengths) * max(self.s_qs or (self.s_q,)) * self.h_q < 2**19
        )

    @property
    def scale(self) -> float:
        return self.d_qk**-0.5 if self.softmax_scale is None else self.softmax_scale

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"DecodeCase({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


@dataclass
class DecodeInputs:
    q: Tensor  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k]
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    d_v: int
    qk_start: int = 0
    softmax_scale: float | None = None
    causal: bool = False
    schedule: Tensor | None = None
    attn_sink: Tensor | None = None  # [h_q] float32
    window: int = 0
    softcap: float = 0.0
    cu_seqlens_q: Tensor | None = None  # [b + 1] int32
    batch_invariant: bool = False

    def kwargs(self, **changes: Any) -> dict[str, Any]:
        """The operator's arguments by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | changes

    def reference_kwargs(self, **changes: Any) -> dict[str, Any]:
        """The arguments of `flashmla_ops.reference.decode`, which knows no way to compute."""
        return {name: x for name, x in self.kwargs(**changes).items() if name not in ("schedule", "batch_invariant")}


def paged_layout(case: DecodeCase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A block table with shuffled pages and dead entries, and which slots are live: [b, max_pages], [n_slots].

    Dead is what no query sees: rows past a sequence's end, and those before the windows of all of its queries.
    """
    counts = [-(-length // case.page_size) for length in case.lengths]
    n_pages = sum(counts) + 2  # two pages that belong to nobody
    pages = torch.randperm(n_pages, generator=generator, dtype=torch.int32)
    block_table = torch.full((len(counts), max(counts, default=0) + 1), DEAD_PAGE, dtype=torch.int32)
    live = torch.zeros(n_pages, case.page_size, dtype=torch.bool)
    taken = 0
    for i, count in enumerate(counts):
        own, (begin, end) = pages[taken : taken + count], case.attended(i)
        first = begin // case.page_size
        block_table[i, first:count] = own[first:]
        offsets = torch.arange(count * case.page_size).view(count, case.page_size)
        live[own.long()] = (offsets >= begin) & (offsets < end)
        taken += count
    return block_table, live.flatten()


def build(case: DecodeCase) -> DecodeInputs:
    """The case's tensors, with NaN in every slot that no sequence owns."""
    with threads(1 if case.small else torch.get_num_threads()):
        return _build(case)


def _build(case: DecodeCase) -> DecodeInputs:
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    block_table, live = paged_layout(case, generator)

    def rows(*shape: int, spread: float = 0.1) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).mul_(spread).clamp_(-10 * spread, 10 * spread)

    def cache(d: int) -> Tensor:
        slots = rows(live.numel(), case.h_kv, d)
        slots[~live] = torch.nan
        return slots.view(-1, case.page_size, case.h_kv, d)

    cache_seqlens = torch.tensor(case.lengths, dtype=torch.int32)
    schedule = None
    if case.num_parts is not None:
        heads = (case.s_q, case.h_q, case.h_kv)
        schedule = torch.ops.flashmla.decode_schedule(cache_seqlens, *heads, case.num_parts)
    sink = torch.randn(case.h_q, generator=generator) if case.sink else None
    if sink is not None and sink.numel() > 2:
        sink[0], sink[1] = torch.inf, -torch.inf

    def lay(tensor: Tensor | None, contiguous_rows: bool = True) -> Tensor | None:
        if tensor is None or not case.strided:
            return tensor
        return strided(tensor, generator, contiguous_rows=contiguous_rows)

    tokens, bounds = (len(case.lengths), case.s_q), None
    if case.s_qs is not None:
        tokens, bounds = (case.tokens,), torch.tensor([*accumulate(case.s_qs, initial=0)], dtype=torch.int32)
    return DecodeInputs(
        q=lay(rows(*tokens, case.h_q, case.d_qk, spread=case.q_spread)),
        kv_cache=lay(cache(case.d)),
        k_cache=lay(None if case.d_k is None else cache(case.d_k)),
        block_table=lay(block_table, contiguous_rows=False),
        cache_seqlens=lay(cache_seqlens, contiguous_rows=False),
        d_v=case.d_v,
        qk_start=case.qk_start,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        schedule=lay(schedule, contiguous_rows=False),
        attn_sink=lay(sink, contiguous_rows=False),
        window=case.window,
        softcap=case.softcap,
        cu_seqlens_q=lay(bounds, contiguous_rows=False),
        batch_invariant=case.batch_invariant,
    )
