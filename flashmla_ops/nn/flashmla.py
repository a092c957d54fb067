"""`FlashMLA`: the attention core of one layer together with its paged cache."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sized
from functools import partial

import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError, NotDifferentiableError
from flashmla_ops.formats import NATIVE
from flashmla_ops.kv_cache import KVPool, Sequence, Step, as_cache
from flashmla_ops.ops.check import FLOAT_NAMES, FLOATS


class FlashMLA(nn.Module):
    """Absorbed MLA over rows ``[c_kv, k_pe]``: append the new tokens' rows, then attend to all rows of each sequence.

    It has no weights: queries come absorbed (multiplied by W_UK), and the output is still latent, to be multiplied by
    W_UV. Sequences are those of `pool`, which forks, truncates and releases them.

        mla = FlashMLA(d_c=512, d_r=64, n_pages=1024)
        a, b = mla.pool.open(), mla.pool.open()
        out, lse = mla(q, rows, [a, b])  # both sequences grow by s_q tokens
        c = mla.pool.fork(a)             # shares the pages of a until one of them grows
        mla.pool.release(b)

    `forward` is a step of the pool, which keeps the books on the host, and `attend`, which is tensors only and compiles
    with ``fullgraph=True`` into one graph for all lengths. The layers of a model share one pool and one step:

        pool = KVPool(layers=27, d=576, memory="8GiB")
        layers = [FlashMLA(pool=pool, layer=i) for i in range(27)]
        with pool.step(sequences) as step:
            ...  # layers[i].attend(q, rows, step)
    """

    slab: Tensor  # [n_pages, h_kv, page_size, d_c + d_r]: the pool's

    def __init__(
        self,
        *,
        d_c: int = 512,
        d_r: int = 64,
        h_kv: int = 1,
        n_pages: int | None = None,
        page_size: int = 64,
        softmax_scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pool: KVPool | None = None,
        layer: int = 0,
    ) -> None:
        """A layer of ``pool``, or a cache of its own of ``n_pages * page_size`` tokens.

        ``softmax_scale`` None means ``(d_c + d_r) ** -0.5``. Models scale by the width of their expanded heads, not of
        the row: give the model's own scale. Raises `ArgumentError` for a size below 1 (``d_r`` may be 0), for a dtype
        other than float32, bfloat16 and float16, and for a pool whose layer has other rows.
        """
        super().__init__()
        for name, size, least in (("d_c", d_c, 1), ("d_r", d_r, 0), ("h_kv", h_kv, 1)):
            if size < least:
                raise ArgumentError("FlashMLA", name, f"at least {least}", size)
        if pool is None:
            dtype = torch.get_default_dtype() if dtype is None else dtype
            pool = KVPool(
                n_pages=n_pages, page_size=page_size, d=d_c + d_r, h_kv=h_kv, dtype=_float(dtype), device=device
            )
        elif (n_pages, dtype, device) != (None, None, None):
            raise ArgumentError("FlashMLA", "pool", "no n_pages, dtype and device beside it", (n_pages, dtype, device))
        if not 0 <= layer < len(pool.storage.layers):
            raise ArgumentError("FlashMLA", "layer", f"one of the pool's {len(pool.storage.layers)}", layer)
        rows = pool.storage.layers[layer]
        if (rows.widths, rows.h_kv) != ((d_c + d_r,), h_kv):
            expected = f"one tensor of rows [{h_kv}, {d_c + d_r}]"
            raise ArgumentError("FlashMLA", "pool", expected, f"{rows.h_kv} heads of {rows.widths}")
        if rows.format == NATIVE:
            _float(rows.dtype)
        self.d_c, self.d_r, self.h_kv, self.layer = d_c, d_r, h_kv, layer
        self.softmax_scale, self.row_format = softmax_scale, rows.format
        self.pool = pool
        #: How many pages of this layer make one of the pool.
        self.parts = pool.storage.parts(rows)
        self.register_buffer("slab", pool.storage.slabs[layer][0], persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlashMLA:
        """``Module.to`` and its like move the pool, once for all of its layers."""
        slabs = self.pool.storage.slabs
        if slabs[self.layer][0] is self.slab:
            self.pool.replace_slabs(fn if self.row_format == NATIVE else partial(_bytes, fn))

        def moved(tensor: Tensor) -> Tensor:
            return self.pool.storage.slabs[self.layer][0] if tensor is self.slab else fn(tensor)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        q: Tensor,  # [b, s_q, h_q, d_c + d_r]
        rows: Tensor,  # [b, s_q, h_kv, d_c + d_r]
        sequences: Sized[Sequence],  # b of the pool's
    ) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_c], lse [b, h_q, s_q] float32
        """Append ``rows`` and attend causally. ``lse`` is the natural log of the sum of exponentials of scaled scores.

        Raises `ArgumentError` for tensors that do not fit, `OutOfPagesError` if the pool is full; then nothing changed.
        """
        self._check(q, rows, len(sequences))
        with self.pool.step(sequences, q.shape[1]) as step:
            return self.attend(q, rows, step)

    def attend(self, q: Tensor, rows: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Write ``rows`` and attend; arguments and results as in `forward`."""
        cache = as_cache(self.slab)
        torch.ops.flashmla.append_(cache, rows.flatten(0, 1), step.slot_mapping, row_format=self.row_format)
        out: Tensor
        lse: Tensor
        out, lse = torch.ops.flashmla.decode(
            q,
            cache,
            None,
            step.block_tables[self.parts],
            step.cache_seqlens,
            self.d_c,
            softmax_scale=self.softmax_scale,
            causal=True,
            row_format=self.row_format,
        )
        return out, lse

    def extra_repr(self) -> str:
        pages = f"n_pages={self.slab.shape[0]}, page_size={self.slab.shape[2]}"
        return f"d_c={self.d_c}, d_r={self.d_r}, h_kv={self.h_kv}, {pages}"

    def _check(self, q: Tensor, rows: Tensor, b: int) -> None:
        """Everything that could fail after the pool's step has given out pages."""
        row = self.d_c + self.d_r
        if q.dim() != 4 or q.shape[0] != b or q.shape[1] < 1 or q.shape[2] % self.h_kv or q.shape[3] != row:
            expected = f"[{b}, s_q, h_q, {row}] with s_q at least 1 and h_q a multiple of {self.h_kv}"
            raise ArgumentError("FlashMLA", "q", expected, list(q.shape))
        expected_rows = [b, q.shape[1], self.h_kv, row]
        if list(rows.shape) != expected_rows:
            raise ArgumentError("FlashMLA", "rows", str(expected_rows), list(rows.shape))
        for name, tensor in (("q", q), ("rows", rows)):
            dtype = self.slab.dtype if self.row_format == NATIVE else q.dtype
            if tensor.dtype != dtype or tensor.device != self.slab.device:
                expected = f"{dtype} on {self.slab.device}, as the cache"
                raise ArgumentError("FlashMLA", name, expected, f"{tensor.dtype} on {tensor.device}")
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise NotDifferentiableError("FlashMLA", name)


def _float(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOATS:
        raise ArgumentError("FlashMLA", "dtype", FLOAT_NAMES, dtype)
    return dtype


def _bytes(change: Callable[[Tensor], Tensor], slab: Tensor) -> Tensor:
    """The slab on the device that a change moves tensors to: bytes have no other dtype."""
    return slab.to(change(torch.empty(0, dtype=slab.dtype, device=slab.device)).device)
