"""transformers caches over our pages: one tensor of rows a layer, appended to and read in place.

Rows are ``[c_kv, k_pe]`` of MLA, and ``[V, K]`` of each KV head of GQA, MHA and MQA.

`PagedLatentCache` grows page by page and shares pages between beams. `StaticPagedLatentCache` reserves its pages at the
first token; its lengths and block table are tensors, so that a compiled decode step serves every length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils.import_utils import is_tracing

from flashmla_ops.errors import ArgumentError, UnsupportedModelError
from flashmla_ops.formats import NATIVE
from flashmla_ops.integrations.transformers.families import MLA, family_of
from flashmla_ops.integrations.transformers.hook import all_served, served_modules
from flashmla_ops.integrations.transformers.rows import Pages
from flashmla_ops.integrations.transformers.served import Served
from flashmla_ops.integrations.transformers.summarized import Summarizing
from flashmla_ops.kv_cache import KVPool, Sequence, as_cache

DEFAULT_PAGES = 256


class PagedLatentCache(Cache):  # type: ignore[misc]
    """A growing cache for ``generate``: all layers share one block table, and beams share pages until they write.

    Its rows are kept in the format that `enable` was given.
    Serves greedy, sampled, beam, assisted and chunked generation, and several turns on one cache.
    """

    takes_formats = True

    def __init__(self, model: nn.Module, *, n_pages: int = DEFAULT_PAGES, page_size: int = 64) -> None:
        """A pool of ``n_pages`` pages of ``page_size`` tokens for all sequences of a batch together.

        A page holds its tokens' rows of every layer. ``model`` says how many layers there are; it is not kept. Raises
        `UnsupportedModelError` if the model is not enabled or has layers that cache something else than rows of our
        attention.
        When pages run out, the forward raises `OutOfPagesError`.
        """
        self.sequences = PagedSequences(n_pages, page_size)
        layout, row_format = row_layout(model), format_of(model)
        layers = [PagedLatentLayer(self.sequences, layout, row_format) for _ in range(count_layers(model))]
        super().__init__(layers=layers)

    @property
    def batch_size(self) -> int:
        return len(self.sequences.batch)

    def n_bytes(self) -> int:
        """Bytes of the pages in use, in all layers."""
        pool = self.sequences.pool
        return pool.stats().used * pool.storage.page_bytes

    def reset(self) -> None:
        """Forget all tokens and release all pages."""
        self.sequences.select([])
        self._set_length(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from sequence ``beam_idx[i]``. Copies nothing: pages are copied when written."""
        self.sequences.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.sequences.select([i for i in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.sequences.select(torch.arange(self.batch_size, device=indices.device)[indices].tolist())

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep, as in transformers."""
        length = length_after_crop(self.sequences.length, tokens_to_remove)
        self.sequences.truncate(length)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length


class PagedSequences:
    """The sequences of one batch in a pool, which all have one length. Shared by the layers of a cache."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.pool = KVPool(layers=0, n_pages=n_pages, page_size=page_size)
        self.batch: list[Sequence] = []
        self.length = 0
        self._step: tuple[Pages, Tensor] | None = None

    def extend(self, b: int, length: int) -> tuple[Pages, Tensor]:
        """Make the sequences ``length`` tokens long; how to read them, and the slots ``[b * n]`` of the new ones.

        The first layer of a forward makes the room; the others come here for the same tokens and find it made.
        """
        batch = self.batch or [self.pool.open() for _ in range(b)]
        if b != len(batch):
            raise ArgumentError("PagedLatentCache", "key_states", f"a batch of {len(batch)}, as cached", b)
        if self._step is None or length > self.length:
            # The forward reads these tensors before anything else is asked of the pool, so that the step may end here.
            with self.pool.step(batch, length - self.length) as step:
                self.batch = batch
                used = -(-length // self.pool.page_size)
                self._step = Pages(step.block_table[:, :used], step.cache_seqlens, length), step.slot_mapping
            self.length = length
        return self._step

    def select(self, parents: list[int]) -> None:
        """Make the batch out of the sequences at these indices; each may be taken any number of times, or never."""
        old, self.batch = self.batch, [self.pool.fork(self.batch[parent]) for parent in parents]
        for sequence in old:
            self.pool.release(sequence)
        self.length = self.length if parents else 0
        self._step = None

    def truncate(self, length: int) -> None:
        for sequence in self.batch:
            self.pool.truncate(sequence, length)
        self.length = length
        self._step = None


class PagedLatentLayer(Summarizing, CacheLayerMixin):  # type: ignore[misc]
    """The rows of one layer of a `PagedLatentCache`."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, sequences: PagedSequences, layout: RowLayout, row_format: str) -> None:
        super().__init__()
        self.row_format = row_format
        self.sequences = sequences
        self.layout = layout
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.slab = add_slab(self.sequences.pool, key_states, value_states, self.row_format)
        self.qk_start = key_start(self.layout, key_states, value_states)
        self.make_summaries()
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,  # [b, h_kv, n, d_qk], or latents [b, 1, n, d_c]
        value_states: Tensor,  # [b, h_kv, n, d_v], or rotary keys [b, 1, n, d_r]
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Pages]:
        """Append n tokens; the slab and how to read it, which our attention functions take as key and value."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        b, _, n, _ = key_states.shape
        view, slots = self.sequences.extend(b, self.length + n)
        append_rows(self.slab, self.layout(key_states, value_states), slots, self.row_format)
        self.summarize(slots)
        self.length += n
        return self.slab, view._replace(row_format=self.row_format)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class StaticPagedLatentCache(Cache):  # type: ignore[misc]
    """A cache of fixed capacity for compiled decoding: one graph serves every length, and no step copies the cache.

    Pages are given out at the first token, as many as the batch needs at full length. Serves greedy, sampled and beam
    generation, for batches of one size.
    """

    takes_formats = True

    def __init__(self, model: nn.Module, max_cache_len: int, *, page_size: int = 64) -> None:
        """Room for ``max_cache_len`` tokens in each sequence of the first batch. Raises as `PagedLatentCache` does.

        A forward that would write past ``max_cache_len`` raises `ArgumentError`; a compiled one raises the RuntimeError
        of `append_`, which names slots. So does a size below 1.
        """
        if max_cache_len < 1:
            raise ArgumentError("StaticPagedLatentCache", "max_cache_len", "at least 1", max_cache_len)
        self.page_size = page_size
        layout, row_format = row_layout(model), format_of(model)
        layers = [StaticPagedLatentLayer(self, max_cache_len, layout, row_format) for _ in range(count_layers(model))]
        super().__init__(layers=layers)
        self.pool: KVPool | None = None
        self.batch: list[Sequence] = []
        self.block_table: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return -1 if self.block_table is None else self.block_table.shape[0]

    def n_bytes(self) -> int:
        """Bytes of all pages, in all layers."""
        return sum(layer.slab.nbytes for layer in self.layers if layer.is_initialized)

    def reserve(self, b: int, device: torch.device) -> tuple[KVPool, Tensor]:
        """A pool with pages for the batch at full length, and its block table ``[b, max_pages]``.

        The first layer to ask makes them.
        """
        if self.pool is None or self.block_table is None:
            capacity = self.layers[0].max_cache_len
            pages = -(-capacity // self.page_size)
            sizes = {"n_pages": b * pages, "page_size": self.page_size, "max_batch": b, "max_length": capacity}
            self.pool = KVPool(layers=0, device=device, **sizes)
            self.batch = [self.pool.open() for _ in range(b)]
            with self.pool.step(self.batch, capacity) as step:
                self.block_table = step.block_table.clone()
            mark_static(self.block_table)
        return self.pool, self.block_table

    def reset(self) -> None:
        """Forget all tokens. Pages stay reserved, and tensors where they are."""
        self._rearrange(0, list(range(self.batch_size)))
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from sequence ``beam_idx[i]``: it shares full pages and gets a copy of the last one."""
        self._rearrange(int(self.layers[0].get_seq_length()), beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises `UnsupportedModelError` unless the batch keeps its size."""
        self._select([i for i in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make the batch out of these sequences. Raises `UnsupportedModelError` unless it keeps its size."""
        self._select(torch.arange(max(0, self.batch_size), device=indices.device)[indices].tolist())

    def check_room(self, n: int) -> None:
        """Raise `ArgumentError` unless ``n`` more tokens fit. Reads the length, so not while a graph is traced."""
        layer = self.layers[0]
        check_room(int(layer.get_seq_length()), n, layer.max_cache_len)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep, as in transformers."""
        length = length_after_crop(int(self.layers[0].get_seq_length()), tokens_to_remove)
        self._rearrange(length, list(range(self.batch_size)))
        for layer in self.layers:
            layer.cumulative_length.fill_(length)

    def _select(self, parents: list[int]) -> None:
        if len(parents) != max(0, self.batch_size):
            raise UnsupportedModelError(
                f"StaticPagedLatentCache: its pages are for a batch of {self.batch_size}, not {len(parents)};"
                " make one for the new size, or use PagedLatentCache"
            )
        self._rearrange(int(self.layers[0].get_seq_length()), parents)

    def _rearrange(self, length: int, parents: list[int]) -> None:
        """Cut all sequences to ``length``, make the batch out of ``parents``, and reserve the pages behind again."""
        if self.pool is None or self.block_table is None:
            return
        for sequence in self.batch:
            self.pool.truncate(sequence, length)
        old, self.batch = self.batch, [self.pool.fork(self.batch[parent]) for parent in parents]
        for sequence in old:
            self.pool.release(sequence)
        with self.pool.step(self.batch, self.layers[0].max_cache_len - length) as step:
            self.block_table.copy_(step.block_table)


class StaticPagedLatentLayer(Summarizing, CacheLayerMixin):  # type: ignore[misc]
    """The rows of one layer of a `StaticPagedLatentCache`."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: StaticPagedLatentCache, max_cache_len: int, layout: RowLayout, row_format: str) -> None:
        super().__init__()
        self.row_format = row_format
        self.cache = cache
        self.layout = layout
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pool, self.block_table = self.cache.reserve(key_states.shape[0], key_states.device)
        self.slab = add_slab(pool, key_states, value_states, self.row_format)
        self.qk_start = key_start(self.layout, key_states, value_states)
        self.make_summaries()
        self.cumulative_length = self.cumulative_length.to(key_states.device)
        mark_static(self.slab, self.cumulative_length)
        if self.summaries is not None:
            mark_static(self.summaries)
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,  # [b, h_kv, n, d_qk], or latents [b, 1, n, d_c]
        value_states: Tensor,  # [b, h_kv, n, d_v], or rotary keys [b, 1, n, d_r]
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Pages]:
        """Do as `PagedLatentLayer.update`, with tensors for all that changes from step to step."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        b, _, n, _ = key_states.shape
        if b != self.block_table.shape[0]:
            expected = f"a batch of {self.block_table.shape[0]}, as reserved"
            raise ArgumentError("StaticPagedLatentCache", "key_states", expected, b)
        if not is_tracing(key_states):
            check_room(int(self.cumulative_length), n, self.max_cache_len)
        positions = (torch.arange(n, device=key_states.device) + self.cumulative_length).expand(b, n)
        inside = positions < self.max_cache_len
        slots = slot_mapping(self.block_table, torch.where(inside, positions, 0), self.cache.page_size)
        # A compiled step cannot look: a token past the end gets a slot past the end, which append_ refuses by name.
        slots = torch.where(inside.flatten(), slots, self.block_table.numel() * self.cache.page_size)
        append_rows(self.slab, self.layout(key_states, value_states), slots, self.row_format)
        self.summarize(slots)
        self.cumulative_length.add_(n)
        seqlens = self.cumulative_length.to(torch.int32).expand(b).contiguous()
        return self.slab, Pages(self.block_table, seqlens, self.max_cache_len, self.row_format)

    def reset(self) -> None:
        if self.is_initialized:
            self.slab.zero_()
        self.cumulative_length.zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Tensor | int:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len


def count_layers(model: nn.Module) -> int:
    """How many layers of rows the model caches. Raises `UnsupportedModelError` if it caches anything else."""
    if not all_served(model):
        raise UnsupportedModelError(f"{type(model).__name__}: call enable(model) before making a paged cache for it")
    indices = sorted(module.layer_idx for _, module in served_modules(model))
    if indices != list(range(len(indices))):
        name = type(model).__name__
        raise UnsupportedModelError(f"{name}: only layers {indices} cache rows, and a paged cache needs all to")
    return len(indices)


def check_room(length: int, n: int, max_cache_len: int) -> None:
    """Raise `ArgumentError` unless a cache of ``max_cache_len`` tokens that holds ``length`` takes ``n`` more."""
    if length + n > max_cache_len:
        expected = f"{max_cache_len} tokens at most, the cache's max_cache_len"
        raise ArgumentError("StaticPagedLatentCache", "key_states", expected, f"{n} behind {length} cached")


#: The states that a model caches, in the order in which a row has them.
RowLayout = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def row_layout(model: nn.Module) -> RowLayout:
    """The order of a row's parts: ``[c_kv, k_pe]`` where a model caches latents, and else ``[V, K]``."""
    return keys_first if any(family_of(module) is MLA for _, module in served_modules(model)) else values_first


def format_of(model: nn.Module) -> str:
    """How `enable` was told to keep the rows of the model's paged caches."""
    return next((module.cache_format for _, module in served_modules(model) if isinstance(module, Served)), NATIVE)


def keys_first(key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    return key_states, value_states


def values_first(key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    return value_states, key_states


def key_start(layout: RowLayout, key_states: Tensor, value_states: Tensor) -> int:
    """Where keys begin in a row."""
    first, _ = layout(key_states, value_states)
    return 0 if first is key_states else first.shape[-1]


def add_slab(pool: KVPool, key_states: Tensor, value_states: Tensor, row_format: str) -> Tensor:
    """A layer of rows of the states' widths, dtype and device, or of the format's bytes."""
    if row_format == NATIVE:
        d = key_states.shape[-1] + value_states.shape[-1]
        layer = pool.add_layer(d, h_kv=key_states.shape[1], dtype=key_states.dtype, device=key_states.device)
    else:
        layer = pool.add_layer(format=row_format, h_kv=key_states.shape[1], device=key_states.device)
    return pool.storage.slabs[layer][0]


def slot_mapping(
    block_table: Tensor,  # [b, max_pages] int32
    positions: Tensor,  # [b, n] int64, the tokens' places in their sequences
    page_size: int,
) -> Tensor:  # [b * n] int64
    """The slots of tokens, as `flashmla::append_` takes them: page * page_size + offset."""
    pages = block_table.gather(1, positions // page_size).long()
    return (pages * page_size + positions % page_size).flatten()


def append_rows(slab: Tensor, states: tuple[Tensor, Tensor], slots: Tensor, row_format: str = NATIVE) -> None:
    """Write the states ``[b, h_kv, n, d]`` of n tokens of b sequences to ``slots [b * n]``."""
    rows = torch.cat(states, dim=-1).transpose(1, 2).flatten(0, 1)
    torch.ops.flashmla.append_(as_cache(slab), rows, slots, row_format)


def length_after_crop(length: int, tokens_to_remove: int | Tensor) -> int:
    """The length that transformers' ``crop`` leaves: 0 removes nothing, a positive number is the length to keep.

    Drafting hands over a tensor of one element where it means a number.
    """
    removed = int(tokens_to_remove)
    return min(length, removed) if removed > 0 else max(0, length + removed)


def mark_static(*tensors: Tensor) -> None:
    """Tell torch.compile that these tensors stay where they are. Not possible while it traces."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
