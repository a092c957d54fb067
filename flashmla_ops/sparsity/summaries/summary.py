"""What a summary of a page is: bytes made of the keys of one KV head, from which the page's softmax mass is estimated.

The mass of a page for a query is the sum of the exponentials of its scaled scores; here it is always a logarithm.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Summary(ABC):
    """One kind of summary: its layout, its codec in torch, which is the definition, and the estimate it allows."""

    #: The name by which operators take it.
    name: str
    #: Whether the slack of `mass` is proven and small enough to be of use.
    proves: bool = False
    #: Planes that `encode` and `mass` take; 0 where they take none.
    n_planes: int = 0

    @abstractmethod
    def n_bytes(self, page_size: int, d: int) -> int:
        """Bytes of a summary of ``page_size`` keys of ``d`` elements."""

    @abstractmethod
    def multiply_adds(self, page_size: int, d: int) -> int:
        """What `mass` costs a query and page."""

    @abstractmethod
    def encode(self, keys: Tensor, planes: Tensor | None) -> Tensor:
        """Keys ``[n, page_size, d]`` float32 of n pages to ``[n, n_bytes]`` uint8. ``planes``: ``[d, n_planes]``."""

    @abstractmethod
    def mass(self, q: Tensor, pages: Tensor, page_size: int, planes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries ``[r, d]`` float64, scaled, and n summaries to mass and slack ``[r, n]``, float64.

        The true mass lies within ``mass - slack`` and ``mass + slack``. The slack is infinite where nothing is proven.
        """


def joined(*parts: Tensor) -> Tensor:
    """Tensors ``[n, ...]`` of any type, as the bytes ``[n, m]`` of one after another."""
    return torch.cat([part.contiguous().view(torch.uint8).flatten(1) for part in parts], dim=1)


def part(pages: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor ``[n, *shape]`` that begins at byte ``start`` of each summary ``[n, n_bytes]``."""
    n_bytes = math.prod(shape) * dtype.itemsize
    return pages[:, start : start + n_bytes].contiguous().view(dtype).view(-1, *shape)


def down_to_bfloat16(x: Tensor) -> Tensor:
    """The largest bfloat16 that is not above each finite float32."""
    bits = x.view(torch.int32)
    away = torch.where(x < 0, bits + 0xFFFF, bits)  # of a negative number the next below is larger in magnitude
    return (away & ~0xFFFF).view(torch.float32).bfloat16()


def up_to_bfloat16(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below each finite float32."""
    return -down_to_bfloat16(-x)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step
