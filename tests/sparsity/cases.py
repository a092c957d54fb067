"""Cases of dynamic sparsity: a paged cache with poison in all that is not live, and what each query truly loses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops.sparsity import Cached, Chosen
from flashmla_ops.sparsity.summaries import summary_bytes

#: How keys are drawn. All but "normal" are made to mislead: offsets that dwarf what tells keys apart, one key that the
#: query points at among others that hide it, elements of very different sizes, keys that are all one, huge ones.
KEYS = ("normal", "offset", "needle", "scaled", "equal", "huge", "outlier")


@dataclass(frozen=True)
class SparsityCase:
    """Sizes as in `flashmla::decode`; a key is ``[d - d_v of kv_cache, d_k]``."""

    lengths: tuple[int, ...]
    s_q: int = 1
    h_q: int = 4
    h_kv: int = 2
    page_size: int = 16
    d: int = 40
    d_v: int = 16
    d_k: int | None = None
    dtype: str = "float32"
    keys: str = "normal"
    q_spread: float = 1.0
    seed: int = 0

    @property
    def d_qk(self) -> int:
        return self.d - self.d_v + (self.d_k or 0)

    def build(self, kind: str | None = "codes", planes: Tensor | None = None) -> tuple[Tensor, Cached]:
        """Queries, and the cache with the summaries of its complete pages."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype, n = getattr(torch, self.dtype), [-(-length // self.page_size) for length in self.lengths]
        width = max([*n, 1])
        order = torch.randperm(sum(n) + 2, generator=generator).to(torch.int32)
        rows = torch.randn(len(order), self.page_size, self.h_kv, self.d + (self.d_k or 0), generator=generator)
        q = torch.randn(len(n), self.s_q, self.h_q, self.d_qk, generator=generator) * self.q_spread
        _shape_keys(self.keys, rows[..., self.d_v :], q, generator)
        rows, q = rows.to(dtype), q.to(dtype)
        live = torch.zeros(rows.shape[:2], dtype=torch.bool)
        block_table = torch.full((len(n), width), 2**30, dtype=torch.int32)
        for i, (length, pages) in enumerate(zip(self.lengths, n, strict=True)):
            block_table[i, :pages] = order[sum(n[:i]) : sum(n[: i + 1])]
            for page in range(pages):
                live[block_table[i, page], : length - page * self.page_size] = True
        rows[~live] = math.nan
        kv_cache, k_cache = rows[..., : self.d].contiguous(), rows[..., self.d :].contiguous() if self.d_k else None
        summaries = None
        if kind is not None:
            n_bytes = summary_bytes(kind, self.page_size, self.d_qk)
            summaries = torch.full((len(order), self.h_kv, n_bytes), 0xFF, dtype=torch.uint8)
            complete = live.all(dim=1).nonzero().flatten()
            slots = complete * self.page_size + self.page_size - 1
            torch.ops.flashmla.summarize_(summaries, kv_cache, k_cache, slots, kind, self.d_v, planes)
        seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        return q, Cached(kv_cache, k_cache, block_table, seqlens, summaries, planes)

    def scores(self, q: Tensor, cache: Cached, i: int) -> Tensor:
        """Those of sequence i, ``[h_q, s_q, length]`` float64; -inf where a query does not see a row."""
        length, pages = self.lengths[i], cache.block_table[i, : -(-self.lengths[i] // self.page_size)].long()
        keys = cache.kv_cache[pages][..., self.d_v :]
        if cache.k_cache is not None:
            keys = torch.cat([keys, cache.k_cache[pages]], dim=-1)
        keys = keys.flatten(0, 1)[:length].double().repeat_interleave(self.h_q // self.h_kv, dim=1)
        scores = torch.einsum("shd,thd->hst", q[i].double(), keys) * self.d_qk**-0.5
        hidden = torch.arange(length) > torch.arange(self.s_q)[:, None] + length - self.s_q
        return scores.masked_fill(hidden, -math.inf)

    def kept(self, cache: Cached, chosen: Chosen, i: int, head: int) -> Tensor:
        """Which rows of sequence i a KV head attends to, bool ``[length]``."""
        length, row = self.lengths[i], i * self.h_kv + head
        own = cache.block_table[i, : -(-length // self.page_size)]
        own = own * chosen.heads.page_step + head * chosen.heads.head_step
        pages = chosen.pages[row, : -(-int(chosen.lengths[row]) // self.page_size)]
        return torch.isin(own, pages).repeat_interleave(self.page_size)[:length]


def _shape_keys(how: str, keys: Tensor, q: Tensor, generator: torch.Generator) -> None:
    """Change keys ``[n_pages, page_size, h_kv, d_qk]`` in place."""
    d = keys.size(-1)
    if how == "offset":
        keys += 30 * torch.randn(d, generator=generator)
    elif how == "needle" and q.size(0):
        keys *= 0.3
        at = torch.randint(keys.size(1), (keys.size(0),), generator=generator)
        direction = q[0, 0, 0] / q[0, 0, 0].norm().clamp_min(1e-6)
        keys[torch.arange(keys.size(0)), at] += 8 * torch.rand(keys.size(0), 1, 1, generator=generator) * direction
    elif how == "scaled":
        keys *= torch.logspace(-3, 2, d)
    elif how == "equal":
        keys[:] = keys[:1, :1].clone()
    elif how == "huge":
        keys *= 1e3
    elif how == "outlier":
        keys[:, 0, :, :: max(1, d // 3)] *= 200


@st.composite
def sparsity_cases(draw: st.DrawFn, keys: tuple[str, ...] = KEYS) -> SparsityCase:
    """Any small case."""
    h_kv, page_size = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 16, 32]))
    longest = 24 * page_size
    return SparsityCase(
        lengths=tuple(draw(st.lists(st.integers(0, longest), min_size=1, max_size=3))),
        s_q=draw(st.sampled_from([1, 1, 3])),
        h_q=h_kv * draw(st.integers(1, 5)),
        h_kv=h_kv,
        page_size=page_size,
        d=draw(st.integers(9, 60)),
        d_v=draw(st.sampled_from([1, 8])),
        d_k=draw(st.none() | st.integers(1, 20)),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        keys=draw(st.sampled_from(keys)),
        q_spread=draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        seed=draw(st.integers(0, 2**31 - 1)),
    )
