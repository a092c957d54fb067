"""What every quantised row format says of itself."""

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

    @abstractmethod
    def constants(self) -> dict[str, int]:
        """The numbers that its C++ code needs beside ``elements`` and ``bytes``, by name."""

    @abstractmethod
    def quantize(self, rows: Tensor) -> Tensor:
        """``[..., elements]`` to ``[..., bytes]`` uint8."""

    @abstractmethod
    def dequantize(self, rows: Tensor) -> Tensor:
        """``[..., bytes]`` of any one-byte type to ``[..., elements]`` float64: exact."""
