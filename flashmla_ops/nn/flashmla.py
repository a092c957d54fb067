"""`FlashMLA`: the attention core of one layer together with its paged cache."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError, NotDifferentiableError
from flashmla_ops.kv_cache import BlockTables, as_cache, copy_pages, new_slab, slot_mapping
from flashmla_ops.ops._library import FLOAT_NAMES, FLOATS


class Step(NamedTuple):
    """Where the tokens of one call lie: what `FlashMLA.plan` returns and `FlashMLA.attend` takes."""

    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32, new tokens included
    slot_mapping: Tensor  # [b * s_q] int64, of the new tokens


class FlashMLA(nn.Module):
    """Absorbed MLA over rows ``[c_kv, k_pe]``: append the new tokens' rows, then attend to all rows of each sequence.

    It has no weights: queries come absorbed (multiplied by W_UK), and the output is still latent, to be multiplied by
    W_UV. Sequences are named by any hashable value; `tables` forks, truncates and releases them.

        mla = FlashMLA(d_c=512, d_r=64, n_pages=1024)
        out, lse = mla(q, rows, ["a", "b"])     # both sequences grow by s_q tokens
        mla.tables.fork("a", "c")               # "c" shares the pages of "a" until one of them grows
        mla.tables.release("b")

    `forward` is `plan`, which keeps the books on the host, and `attend`, which is tensors only and compiles with
    ``fullgraph=True`` into one graph for all lengths.
    """

    slab: Tensor  # [n_pages, h_kv, page_size, d_c + d_r]

    def __init__(
        self,
        *,
        d_c: int = 512,
        d_r: int = 64,
        h_kv: int = 1,
        n_pages: int,
        page_size: int = 64,
        softmax_scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """A cache of ``n_pages * page_size`` tokens. ``softmax_scale`` None means ``(d_c + d_r) ** -0.5``.

        Models scale by the width of their expanded heads, not of the row: give the model's own scale. Raises
        `ArgumentError` for a size below 1 (``d_r`` may be 0) and for a dtype other than float32, bfloat16 and float16.
        """
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATS:
            raise ArgumentError("FlashMLA", "dtype", FLOAT_NAMES, dtype)
        for name, size, least in (("d_c", d_c, 1), ("d_r", d_r, 0), ("h_kv", h_kv, 1)):
            if size < least:
                raise ArgumentError("FlashMLA", name, f"at least {least}", size)
        self.d_c, self.d_r, self.h_kv = d_c, d_r, h_kv
        self.softmax_scale = softmax_scale
        self.tables = BlockTables(n_pages, page_size)
        slab = new_slab(n_pages, page_size, h_kv, d_c + d_r, dtype, device)
        self.register_buffer("slab", slab, persistent=False)

    def forward(
        self,
        q: Tensor,  # [b, s_q, h_q, d_c + d_r]
        rows: Tensor,  # [b, s_q, h_kv, d_c + d_r]
        sequences: Sequence[Hashable],  # b names
    ) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_c], lse [b, h_q, s_q] float32
        """Append ``rows`` and attend causally. ``lse`` is the natural log of the sum of exponentials of scaled scores.

        Raises `ArgumentError` for tensors that do not fit, `OutOfPagesError` if the pool is full; then nothing changed.
        """
        self._check(q, rows, len(sequences))
        return self.attend(q, rows, self.plan(sequences, q.shape[1]))

    def plan(self, sequences: Sequence[Hashable], s_q: int) -> Step:
        """Make room for ``s_q`` tokens in each sequence (a new name starts an empty one) and say where they lie."""
        copy_pages(self.slab, self.tables.extend(sequences, s_q))
        device = self.slab.device
        block_table = self.tables.block_table(sequences, device)
        cache_seqlens = self.tables.cache_seqlens(sequences, device)
        positions = torch.arange(-s_q, 0, device=device) + cache_seqlens[:, None]
        return Step(block_table, cache_seqlens, slot_mapping(block_table, positions, self.tables.page_size))

    def attend(self, q: Tensor, rows: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Write ``rows`` and attend; arguments and results as in `forward`."""
        cache = as_cache(self.slab)
        torch.ops.flashmla.append_(cache, rows.flatten(0, 1), step.slot_mapping)
        out: Tensor
        lse: Tensor
        out, lse = torch.ops.flashmla.decode(
            q,
            cache,
            None,
            step.block_table,
            step.cache_seqlens,
            self.d_c,
            softmax_scale=self.softmax_scale,
            causal=True,
        )
        return out, lse

    def extra_repr(self) -> str:
        pages = f"n_pages={self.tables.allocator.n_pages}, page_size={self.tables.page_size}"
        return f"d_c={self.d_c}, d_r={self.d_r}, h_kv={self.h_kv}, {pages}"

    def _check(self, q: Tensor, rows: Tensor, b: int) -> None:
        """Everything that could fail after `plan` has given out pages."""
        row = self.d_c + self.d_r
        if q.dim() != 4 or q.shape[0] != b or q.shape[1] < 1 or q.shape[2] % self.h_kv or q.shape[3] != row:
            expected = f"[{b}, s_q, h_q, {row}] with s_q at least 1 and h_q a multiple of {self.h_kv}"
            raise ArgumentError("FlashMLA", "q", expected, list(q.shape))
        expected_rows = [b, q.shape[1], self.h_kv, row]
        if list(rows.shape) != expected_rows:
            raise ArgumentError("FlashMLA", "rows", str(expected_rows), list(rows.shape))
        for name, tensor in (("q", q), ("rows", rows)):
            if tensor.dtype != self.slab.dtype or tensor.device != self.slab.device:
                expected = f"{self.slab.dtype} on {self.slab.device}, as the cache"
                raise ArgumentError("FlashMLA", name, expected, f"{tensor.dtype} on {tensor.device}")
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise NotDifferentiableError("FlashMLA", name)
