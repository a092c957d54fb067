"""Caches of transformers whose pages have summaries, so that decoding can choose which of them it attends to.

A `SummarizedLayer` of a `DynamicCache` keeps summaries beside the keys and values that every other attention still
reads. Our paged caches have layers that write summaries where they append (`Summarizing`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils.import_utils import is_tracing

from flashmla_ops.integrations.transformers.growing import GrowingLayer
from flashmla_ops.integrations.transformers.rows import Rows
from flashmla_ops.kv_cache import as_cache, new_slab
from flashmla_ops.sparsity import Cached, DynamicSparsity
from flashmla_ops.sparsity.summaries import summary_bytes


class SummarizedLayer(GrowingLayer):
    """A layer of a `DynamicCache` whose room is whole pages, ``page_size`` tokens of one sequence each."""

    sparsity: DynamicSparsity
    keys_first: bool
    #: ``[b, h_kv, pages, n_bytes]`` uint8, of the pages that the room holds; None where the mode takes none.
    summaries: Tensor | None
    planes: Tensor | None
    #: How many pages of each sequence are summarized.
    summarized: int

    def room_for(self, tokens: int) -> int:
        page_size = self.sparsity.page_size
        return -(-super().room_for(tokens) // page_size) * page_size

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if getattr(self, "owner", self) is not self:  # a shallow copy
            self.summaries = None if self.summaries is None else self.summaries.clone()
        states: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if self.sparsity.kind is not None and self._in_pages():
            self._summarize()
        return states

    def cached(self, seqlens: Tensor) -> Cached | None:
        """The cache in pages, for sequences of these lengths ``[b]``; None while its rooms are none of pages."""
        if not self._in_pages() or (self.sparsity.kind is not None and self.summaries is None):
            return None
        first, second = self._rooms()
        b, h_kv, room, _ = first.shape
        page_size, pages = self.sparsity.page_size, room // self.sparsity.page_size
        starts = torch.arange(b, dtype=torch.int32, device=first.device) * (h_kv * pages)
        in_use = torch.arange(-(-self.keys.shape[-2] // page_size), dtype=torch.int32, device=first.device)
        n = (b - 1) * h_kv * pages + pages
        summaries = self.summaries
        if summaries is not None:
            n_bytes = summaries.shape[-1]
            summaries = summaries.as_strided((n, h_kv, n_bytes), (n_bytes, pages * n_bytes, 1))
        kv_cache, k_cache = (
            x.as_strided((n, page_size, h_kv, x.shape[-1]), (page_size * x.shape[-1], x.shape[-1], x.stride(1), 1))
            for x in (first, second)
        )
        return Cached(kv_cache, k_cache, starts[:, None] + in_use, seqlens, summaries, self.planes)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self.summarized = min(self.summarized, self.get_seq_length() // self.sparsity.page_size)

    def reset(self) -> None:
        super().reset()
        self.summarized = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rearrange(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.summaries is not None:
            self.summaries = self.summaries.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rearrange(indices)

    def _rearrange(self, indices: Tensor) -> None:
        if self.summaries is not None:
            self.summaries = self.summaries[indices.to(self.summaries.device)]

    def _rooms(self) -> tuple[Tensor, Tensor]:
        """In the order of a row's parts: ``[b, h_kv, room, d]`` each."""
        keys, values = self.room
        assert keys is not None
        assert values is not None
        return (keys, values) if self.keys_first else (values, keys)

    def _in_pages(self) -> bool:
        """Whether both states lie in rooms of the same whole pages."""
        keys, values = self.room
        return (
            keys is not None
            and values is not None
            and keys.shape[:3] == values.shape[:3]
            and keys.shape[2] % self.sparsity.page_size == 0
            and self.keys.data_ptr() == keys.data_ptr()
            and self.values.data_ptr() == values.data_ptr()
        )

    def _summarize(self) -> None:
        """Write the summaries of pages that have become complete."""
        first, second = self._rooms()
        b, h_kv, room, d = first.shape
        page_size = self.sparsity.page_size
        qk_start = 0 if self.keys_first else d
        d_key = d - qk_start + second.shape[-1]
        if self.summaries is None or self.summaries.shape[:3] != (b, h_kv, room // page_size):
            n_bytes = summary_bytes(self.sparsity.kind or "", page_size, d_key)
            grown = new_slab(b, room // page_size, h_kv, n_bytes, torch.uint8, first.device)
            if self.summaries is not None and self.summaries.shape[:2] == grown.shape[:2]:
                kept = min(self.summaries.shape[2], grown.shape[2])
                grown[:, :, :kept] = self.summaries[:, :, :kept]
            else:
                self.summarized = 0
            self.summaries = grown
            self.planes = self.sparsity.planes(d_key, first.device)
        complete = self.keys.shape[-2] // page_size
        if complete > self.summarized:
            pages = torch.arange(self.summarized + 1, complete + 1, device=first.device)
            for i in range(b):
                parts = (x[i].unflatten(1, (-1, page_size)).permute(1, 2, 0, 3) for x in (first, second))
                written = self.summaries[i].transpose(0, 1)
                slots = pages * page_size - 1
                torch.ops.flashmla.summarize_(written, *parts, slots, self.sparsity.kind, qk_start, self.planes)
            self.summarized = complete


class Summarizing:
    """A layer of our paged caches: summaries are written where rows are appended."""

    slab: Tensor  # [n_pages, h_kv, page_size, d]
    is_initialized: bool
    sparsity: DynamicSparsity | None = None
    #: Where keys begin in a row; known with the slab.
    qk_start: int
    #: ``[n_pages, h_kv, n_bytes]`` uint8.
    summaries: Tensor | None = None
    planes: Tensor | None = None

    def summarize_with(self, sparsity: DynamicSparsity) -> None:
        """Have summaries from now on, also of the pages that are there."""
        if self.sparsity is sparsity:
            return
        self.sparsity, self.summaries = sparsity, None
        if self.is_initialized:
            self.make_summaries()
            n_pages, page_size = self.slab.shape[0], self.slab.shape[2]
            last = torch.arange(page_size - 1, n_pages * page_size, page_size, device=self.slab.device)
            self.summarize(last)

    def make_summaries(self) -> None:
        """Room for them; called when there is a slab."""
        if self.sparsity is not None and self.sparsity.kind is not None:
            n_pages, h_kv, page_size, d = self.slab.shape
            n_bytes = summary_bytes(self.sparsity.kind, page_size, d - self.qk_start)
            self.summaries = new_slab(n_pages, 1, h_kv, n_bytes, torch.uint8, self.slab.device).squeeze(2)
            self.planes = self.sparsity.planes(d - self.qk_start, self.slab.device)

    def summarize(self, slots: Tensor) -> None:
        """Write the summaries of pages whose last slot is among those that were written."""
        if self.summaries is not None and self.sparsity is not None:
            rows = (as_cache(self.slab), None, slots)
            torch.ops.flashmla.summarize_(self.summaries, *rows, self.sparsity.kind, self.qk_start, self.planes)


def cached_in_pages(layer: Any, rows: Rows, seqlens: Tensor) -> Cached | None:
    """What decoding chooses its pages from; None where there is nothing to choose.

    ``layer``: one of a cache that has summaries, or None. ``seqlens [b]``: how many of ``rows`` the last query sees.
    """
    if layer is None or (not is_tracing(seqlens) and rows.s_kv < layer.sparsity.min_context):
        return None
    if isinstance(layer, SummarizedLayer):
        return layer.cached(seqlens)
    if layer.sparsity.kind is not None and layer.summaries is None:
        return None
    return Cached(rows.kv_cache, rows.k_cache, rows.block_table, seqlens, layer.summaries, layer.planes)


def summarized_layer(cache: Any, layer_idx: int | None, sparsity: DynamicSparsity, *, keys_first: bool) -> Any:
    """Layer ``layer_idx`` of a cache, with summaries from now on; None for caches that can have none.

    ``keys_first``: whether a row begins with what the cache has as keys (MLA), not values.
    """
    if layer_idx is None:
        return None
    if type(cache) is DynamicCache and not cache.offloading and not torch.compiler.is_compiling():
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layers.extend(DynamicLayer() for _ in range(len(cache.layers), layer_idx + 1))
        layer = cache.layers[layer_idx]
        if type(layer) in (DynamicLayer, GrowingLayer) or (
            type(layer) is SummarizedLayer and layer.sparsity is not sparsity
        ):
            layer.__class__ = SummarizedLayer
            layer.sparsity, layer.keys_first = sparsity, keys_first
            layer.room, layer.owner = [None, None], layer
            layer.summaries, layer.planes, layer.summarized = None, None, 0
        return layer if type(layer) is SummarizedLayer else None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, Summarizing):
        layer.summarize_with(sparsity)
        return layer
    return None
