"""The attention mask in the forms that `flashmla::decode` reads.

transformers asks a registered mask function once for each forward, before any layer runs, and hands what it returns to
every layer. `absorbed_mask` returns an int32 tensor in place of the boolean mask, in one of two forms. Long queries get
the first, or the boolean mask, and from `grouped_mask` all queries do. Both forms are 4-D, because transformers passes
a 4-D mask on untouched:

- **prefix** ``[b, 1, s_q, 1]``: query i sees the first ``mask[b, 0, i, 0]`` tokens of the cache, one more than query
  i - 1. This is causal attention without padding, and needs no list of tokens.
- **tokens** ``[b, 1, s_q, 1 + s_kv]``: first the number n of tokens that the query sees, then their n positions in the
  cache, in order; what follows means nothing. Any boolean mask can be written so.

No mask is read on the host while a graph is traced, so a compiled forward has neither a graph break nor a guard on
values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

#: Longest query (in tokens of one sequence) that attends in the latent space. Longer ones expand the cache to heads, as
#: transformers does. Expanding a cached token costs d_c * (d_nope + d_v) multiply-adds a head, and each query then
#: saves 2 d_c - d_nope - d_v of them: at DeepSeek's sizes the expansion pays from 170 queries on. Without a cached
#: prefix the expanded form is never dearer, which is why this bound is lower.
MAX_ABSORBED_QUERIES = 64


def absorbed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    tokens: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of `absorbed_attention`, called by transformers' ``create_causal_mask`` and its relatives.

    Arguments are those of ``transformers.masking_utils.sdpa_mask``; ``attention_mask`` is the 2-D padding mask
    ``[b, tokens so far]``, bool. Returns a prefix mask where it can, a tokens mask for other short queries, else what
    ``sdpa_mask`` returns; without ``tokens``, a boolean mask for those short queries.
    """
    common: dict[str, Any] = {
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    long = q_length > MAX_ABSORBED_QUERIES
    plain = mask_function is causal_mask_function and kv_offset == 0
    # A long query of a traced graph expands the whole cache: cutting it into chunks takes lengths on the host.
    if plain and not (long and is_tracing()) and _is_unpadded(attention_mask, q_length, kv_length, q_offset):
        return prefix_mask(batch_size, q_length, q_offset, device)
    if long:
        return _sdpa_mask(batch_size, q_length, kv_length, **common, **kwargs)
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = _sdpa_mask(batch_size, q_length, kv_length, **common, **kwargs)
    return tokens_mask(mask) if tokens and mask is not None else mask


#: The mask function of `grouped_attention`: `flashmla::attend_masked` reads boolean masks.
grouped_mask = partial(absorbed_mask, tokens=False)


def prefix_mask(b: int, s_q: int, q_offset: int | Tensor, device: torch.device | str) -> Tensor:
    """The prefix form ``[b, 1, s_q, 1]`` of causal attention: query i sits at ``q_offset + i`` and sees itself."""
    lengths = torch.arange(1, s_q + 1, device=device, dtype=torch.int32) + q_offset
    return lengths.to(torch.int32)[None, None, :, None].expand(b, 1, s_q, 1)


def tokens_mask(mask: Tensor) -> Tensor:
    """The tokens form ``[b, 1, s_q, 1 + s_kv]`` int32 of a boolean mask ``[b, 1, s_q, s_kv]``. Exact for any mask."""
    s_kv = mask.shape[-1]
    rank = mask.cumsum(dim=-1)  # 1 for the first token that the query sees
    # The n-th token goes to place n. Tokens that are not seen go to place 0, where the count then replaces them.
    place = torch.where(mask, rank, 0)
    positions = torch.arange(s_kv, device=mask.device, dtype=torch.int32).expand(mask.shape)
    tokens = positions.new_zeros((*mask.shape[:-1], 1 + s_kv)).scatter(-1, place, positions)
    return torch.cat([rank[..., -1:].to(torch.int32), tokens[..., 1:]], dim=-1)


def is_prefix(mask: Tensor) -> bool:
    """Whether an int32 mask is in the prefix form."""
    return mask.shape[-1] == 1


def boolean_mask(mask: Tensor, s_kv: int) -> Tensor:
    """The boolean mask ``[b, 1, s_q, s_kv]`` that a prefix or tokens mask stands for."""
    live = torch.arange(s_kv, device=mask.device) < mask[..., :1]
    if is_prefix(mask):
        return live
    places = torch.where(live, mask[..., 1:], s_kv).long()  # what is not live goes to a column that is cut off
    seen = torch.zeros(*mask.shape[:-1], s_kv + 1, dtype=torch.bool, device=mask.device)
    return seen.scatter(-1, places, torch.ones_like(live))[..., :s_kv]


def without_needless(mask: Tensor | None) -> Tensor | None:
    """None for a mask, boolean or added, that hides nothing from a single query. Not asked while tracing."""
    if mask is None or mask.dtype == torch.int32 or mask.shape[2] != 1 or is_tracing(mask):
        return mask
    return None if bool((mask if mask.dtype == torch.bool else mask == 0).all()) else mask


def mask_for_sdpa(mask: Tensor | None, s_q: int, s_kv: int) -> Tensor | None:
    """A mask that SDPA understands. Where there is no prefix its own causal mask will do: None."""
    if mask is None or mask.dtype != torch.int32:
        return mask
    return None if is_prefix(mask) and s_kv == s_q > 1 else boolean_mask(mask, s_kv)


def _is_unpadded(padding: Tensor | None, q_length: int, kv_length: int, q_offset: int | Tensor) -> bool:
    """Whether every token up to the last query takes part. Not asked of a tensor's values while tracing."""
    if isinstance(q_offset, int) and q_offset + q_length > kv_length:
        return False
    if padding is None:
        return True
    if is_tracing(padding):
        return False
    end = int(q_offset) + q_length
    return padding.shape[-1] >= end and bool(padding[:, :end].all())


def _sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask
