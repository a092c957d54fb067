"""The description of a quantised row format: its layout, and its codec in torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowFormat(ABC):
    """A format of bytes. Its codec is in float64, exact but for the one rounding that it is there for."""

    #: The name that operators take.
    name: str
    #: The name of its struct in C++.
    cpp: str

    @property
    @abstractmethod
    def elements(self) -> int:
        """Elements of a row."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of a row."""

    @property
    def tail(self) -> int:
        """How many bytes at the end of a row a page holds apart, behind the rest of all its tokens.

        A page is then one piece of ``page_size * bytes`` bytes and of one KV head: ``bytes - tail`` of each token, and
        after them ``tail`` of each token. A row by itself, as the codec takes it, is a page of one token.
        """
        return 0

    def parts(self, cache: Tensor) -> list[Tensor]:
        """The views ``[n_pages, page_size, h_kv, d]`` that hold the rows of a cache of bytes: side by side, a row."""
        if not self.tail:
            return [cache]
        n_pages, page_size = cache.shape[:2]
        head = self.bytes - self.tail

        def view(at: int, d: int) -> Tensor:
            strides = (cache.stride(0), d, d, 1)
            return cache.as_strided((n_pages, page_size, 1, d), strides, cache.storage_offset() + at)

        return [view(0, head), view(page_size * head, self.tail)]

    @abstractmethod
    def constants(self) -> dict[str, int]:
        """The numbers that its C++ code needs beside ``elements``, ``bytes`` and ``tail``, by name."""

    @abstractmethod
    def quantize(self, rows: Tensor) -> Tensor:
        """``[..., elements]`` to ``[..., bytes]`` uint8."""

    @abstractmethod
    def dequantize(self, rows: Tensor) -> Tensor:
        """``[..., bytes]`` of any one-byte type to ``[..., elements]`` float64: exact."""
