"""A layer of a `DynamicCache` that has room ahead: a step writes its rows behind the others and copies nothing.

transformers' own concatenates at each step, which copies all that the cache holds. Here tensors are views of memory
that is a half larger than what they held when it was taken, so each row is copied about twice in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

#: Tokens that are made room for at least.
LEAST_ROOM = 64


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` in everything but how it grows."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.room: list[Tensor | None] = [None, None]
        self.owner = self

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append n tokens ``[b, h_kv, n, d]``; views of all that are cached."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.owner is not self:  # a shallow copy, whose tensors go on to grow elsewhere
            self.room, self.owner = [None, None], self
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def room_for(self, tokens: int) -> int:
        """How many tokens a new room has that is to hold so many."""
        return max(tokens + tokens // 2, LEAST_ROOM)

    def _append(self, which: int, cached: Tensor, new: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (cached.requires_grad or new.requires_grad):
            return torch.cat([cached, new], dim=-2)  # writing in place would change what a backward saved
        start, end = cached.shape[-2], cached.shape[-2] + new.shape[-2]
        room = self.room[which]
        if room is None or room.shape[-2] < end or not _begins(cached, room) or room.dtype != new.dtype:
            room = new.new_empty((*new.shape[:-2], self.room_for(end), new.shape[-1]))
            room[..., :start, :] = cached
            self.room[which] = room
        room[..., start:end, :] = new
        return room[..., :end, :]


def preallocate_layer(cache: Any, layer_idx: int) -> None:
    """Let layer ``layer_idx`` of a `DynamicCache` have room ahead; other caches and sliding layers stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(len(cache.layers), layer_idx + 1))
    layer = cache.layers[layer_idx]
    if type(layer) is DynamicLayer:
        layer.__class__ = GrowingLayer
        layer.room, layer.owner = [None, None], layer


def _begins(cached: Tensor, room: Tensor) -> bool:
    """Whether ``cached`` is the beginning of ``room``, so that it can be continued there."""
    same = cached.shape[:-2] == room.shape[:-2] and cached.stride() == room.stride()
    return same and cached.data_ptr() == room.data_ptr()
