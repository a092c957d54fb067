"""Attention of continuous batching: sequences with any number of new tokens each, one after another, over pages.

transformers' ``generate_batch`` and server keep keys and values in a `PagedAttentionCache`. Attention functions get all
new tokens as one row of tokens, the slots where these are to be written, and the slots of all tokens that each sequence
then has. The slots say which pages a sequence has, so the operators read the cache where it lies; transformers' own
"paged" functions copy what every sequence has cached at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers.masks import MAX_ABSORBED_QUERIES
from flashmla_ops.integrations.transformers.rows import Rows
from flashmla_ops.nn.prefix import prefill_with_prefix

#: Transformers' prefix of the names of attention functions that take continuous batches.
PAGED = "paged|"
#: Its names of types of layers.
FULL, SLIDING = "full_attention", "sliding_attention"


class Batch(NamedTuple):
    """Sequences, and their rows in a cache that has the new ones already."""

    bounds: Tensor  # [b + 1] int32: the new tokens of sequence i are those from bounds[i] on
    rows: Rows  # cache_seqlens count the new tokens too

    def prefix_lens(self) -> Tensor:  # [b] int32
        return self.rows.cache_seqlens - self.bounds.diff()

    def some(self, sequences: Tensor) -> Rows:
        """The rows of these sequences."""
        table, lengths = self.rows.block_table[sequences], self.rows.cache_seqlens[sequences]
        return self.rows._replace(block_table=table, cache_seqlens=lengths)

    def padded(self, t: int) -> Batch:
        """The batch with one more sequence, without rows, of those of ``t`` tokens behind the last bound, which pad."""
        table, lengths = self.rows.block_table, self.rows.cache_seqlens
        rows = self.rows._replace(
            block_table=torch.cat([table, table.new_zeros(1, table.shape[1])]),
            cache_seqlens=torch.cat([lengths, lengths.new_zeros(1)]),
        )
        return Batch(torch.cat([self.bounds, self.bounds.new_full((1,), t)]), rows)


#: Queries ``[t, h_q, d_qk]`` of all sequences of a batch, one after another: outputs ``[t, h_q, d_v]``.
Attend = Callable[[Tensor, Batch], Tensor]


def is_ragged(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an attention function was called with the arguments of continuous batching.

    Raises `UnsupportedModelError` where it was not, while the model is set to it: such a forward has no mask.
    """
    ragged = kwargs.get("read_index") is not None
    if not ragged and module.config._attn_implementation.startswith(PAGED):
        raise UnsupportedModelError("a forward without a paged cache, while the model serves continuous batches")
    return ragged


def write(
    layer_idx: int,
    first: Tensor,  # [1, h_kv, t, d]: values, or latents, of the new tokens
    second: Tensor,  # [1, h_kv, t, d_k]: keys, or rotary keys
    caches: tuple[list[Tensor], list[Tensor]],  # of the same two, a tensor [slots, h_kv, ...] for each layer of a group
    kwargs: dict[str, Any],
) -> Batch:
    """Write the new tokens' rows into a `PagedAttentionCache`."""
    cache = kwargs["cache"]
    group, place = cache.layer_index_to_group_indices[layer_idx]
    written = kwargs["write_index"][group]
    kv_cache, k_cache = (tensors[place].unflatten(0, (-1, cache.block_size)) for tensors in caches)
    new = (states[0].transpose(0, 1) for states in (first, second))
    torch.ops.flashmla.append_.two(kv_cache, k_cache, *new, written)
    read = kwargs["read_index"][group]
    # Where nothing was cached before, no slots are said to be read: what was written is all that there is.
    slots = read if read.numel() else written
    bounds_k, longest = (_of_type(kwargs[name], FULL) for name in ("cu_seq_lens_k", "max_seqlen_k"))
    pages = torch.arange(0, max(1, longest), cache.block_size, device=slots.device)
    # What stands behind a sequence's last page does not matter, only that it can be looked up.
    at = (bounds_k[:-1, None] + pages).clamp(max=slots.shape[0] - 1)
    block_table = (slots[at] // cache.block_size).to(torch.int32)
    return Batch(kwargs["cu_seq_lens_q"], Rows(kv_cache, k_cache, block_table, bounds_k.diff(), longest))


def window_of(layer_idx: int, kwargs: dict[str, Any]) -> int:
    """How many of the last tokens the cache keeps of a layer that attends within a window; 0 for all."""
    window = int(kwargs["cache"].sliding_windows[layer_idx])
    return window if window > 1 else 0


def read_window(
    layer_idx: int, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A window's keys and values of all sequences, new tokens included, ``[t_k, h_kv, d]``, and both bounds.

    The cache overwrites what has left the window, so that new tokens may stand where older queries still look: they
    are read before that, by transformers' own code.
    """
    keys, values = kwargs["cache"].update(key, value, layer_idx, kwargs["read_index"], kwargs["write_index"])
    return (keys, values), (kwargs["cu_seq_lens_q"], _of_type(kwargs["cu_seq_lens_k"], SLIDING))


def _of_type(found: Any, layer_type: str) -> Any:
    """transformers hands one value for all layers, or one for each type where a model has several."""
    return found[layer_type] if isinstance(found, dict) else found


def attend_ragged(
    q: Tensor,  # [t, h_q, d_qk]
    keys: Tensor,  # [t, h_kv, d_qk] of the new tokens
    values: Tensor,  # [t, h_kv, d_v]
    batch: Batch,
    attend: Attend | None,
    **options: Any,
) -> Tensor:  # [t, h_q, d_v]
    """Each new token attends to its sequence up to itself. Tokens behind the last bound, which pad, get 0.

    Sequences with few new tokens, as most have, go through ``attend`` together; the others, or without ``attend`` all,
    prefill behind what they have cached, with the ``options`` of `prefill_with_prefix`. The bounds are read on the host
    for that. A traced graph reads none: there all go through ``attend``.
    """
    if attend is not None and is_tracing(q):
        return attend(q, batch.padded(q.shape[0]))
    bounds: list[int] = batch.bounds.tolist()
    counts = [stop - start for start, stop in pairwise(bounds)]
    most = 0 if attend is None else MAX_ABSORBED_QUERIES
    few = [i for i, count in enumerate(counts) if 0 < count <= most]
    many = [i for i, count in enumerate(counts) if count > most]
    out = values.new_zeros(*q.shape[:2], values.shape[2])

    def chosen(sequences: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Their numbers, their tokens, and where these begin and end among themselves."""
        tokens = torch.cat([torch.arange(bounds[i], bounds[i + 1], device=q.device) for i in sequences])
        own = torch.tensor([0, *(counts[i] for i in sequences)], device=q.device).cumsum(0, dtype=torch.int32)
        return torch.tensor(sequences, device=q.device), tokens, own

    if few and attend is not None:
        sequences, tokens, own = chosen(few)
        out[tokens] = attend(q[tokens], Batch(own, batch.some(sequences)))
    if many:
        sequences, tokens, own = chosen(many)
        kv_cache, k_cache, block_table, *_ = batch.some(sequences)
        new, cached = (q[tokens], keys[tokens], values[tokens], own), (kv_cache, k_cache, block_table)
        out[tokens] = prefill_with_prefix(*new, *cached, batch.prefix_lens()[sequences], **options)[0]
    return out
