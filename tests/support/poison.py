"""Layouts and values that catch a kernel reading what it was not given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Stands in block-table entries past a sequence's end: near INT32_MAX, so that any use of it shows.
DEAD_PAGE = 2147480000


def poison_of(dtype: torch.dtype) -> float | int:
    """NaN for floats; for integers a number that is neither a page, nor a slot, nor a length."""
    return math.nan if dtype.is_floating_point else DEAD_PAGE


def strided(tensor: Tensor, generator: torch.Generator, *, contiguous_rows: bool = True) -> Tensor:
    """The same values in another layout: dimensions in a random order, poison between rows, an odd storage offset.

    ``contiguous_rows`` keeps the last dimension contiguous, as the operators ask of queries and caches; without it the
    last dimension has stride 2.
    """
    dims = tensor.dim()
    order = [*torch.randperm(dims - 1, generator=generator).tolist(), dims - 1]
    pads = torch.randint(0, 3, (dims,), generator=generator).tolist()
    step = 1 if contiguous_rows else 2
    sizes = [tensor.shape[dim] + pad for dim, pad in zip(order, pads, strict=True)]
    room = tensor.new_full((*sizes[:-1], step * sizes[-1] + 1), poison_of(tensor.dtype))
    view = room.permute([order.index(dim) for dim in range(dims)])
    view = view[tuple(slice(0, size) for size in tensor.shape[:-1])]
    view = view[..., 1 : 1 + step * tensor.shape[-1] : step]
    view.copy_(tensor)
    return view


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN equals NaN and 0.0 differs from -0.0."""
    return tensor.contiguous().view(torch.uint8)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y))
