"""What the kernels around attention are built for: they append to caches, merge results, and make schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from cutlass_kernels.attention.config import WARP, Codes, Config
from cutlass_kernels.errors import ConfigError

#: Types of elements that are copied, encoded or merged, and their sizes.
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class AppendConfig(Config):
    """How rows get into a cache: copied, or encoded as ``codes``.

    ``width``: bytes of an access, which addresses and strides are multiples of. Rows to be encoded always are of 16;
    then it is of the cache alone, 16 or 1.
    """

    kind = "append"
    #: Warps of a block, each with a row at a time.
    warps: ClassVar[int] = 8
    #: Rows of a block at most: one a bit of a word.
    most_rows: ClassVar[int] = 32
    #: Entries of a table in shared memory: the lowest bits of a slot name one.
    table: ClassVar[int] = 1024

    width: int
    codes: Codes | None = None
    dtype: str = ""  # of rows to be encoded: bf16, fp16 or fp32
    least_exponent: int = 0  # of the scales of e4m3

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(self.name, problems)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> AppendConfig:
        """From what `fields` gives."""
        return cls(**(fields | {"codes": Codes(**fields["codes"]) if fields["codes"] else None}))

    def _problems(self) -> Iterator[str]:
        widths = (16, 1) if self.codes else (16, 8, 4, 2)
        if self.width not in widths:
            yield f"width is {self.width}, expected one of {widths}"
        if self.codes is not None:
            yield from self.codes.problems()
            if self.dtype not in ELEMENT_BYTES:
                yield f"dtype is {self.dtype}, expected one of {', '.join(ELEMENT_BYTES)}"
            if self.codes.group // 8 not in (2, 4, 8, 16, 32):
                yield f"groups of {self.codes.group}, expected 16 to 256, a power of two"

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def slots_at(self) -> int:
        """Behind the table: the slots of the block's rows."""
        return 4 * self.table

    @property
    def late_at(self) -> int:
        """A word with a bit for each row of the block that a later one replaces."""
        return self.slots_at + 4 * self.most_rows

    @property
    def shared_bytes(self) -> int:
        return self.late_at + 16

    @property
    def name(self) -> str:
        return f"append_{f'{self.codes.name}_{self.dtype}' if self.codes else 'native'}_w{self.width}"


@dataclass(frozen=True)
class MergeConfig(Config):
    """``dtype`` of the parts: bf16, fp16 or fp32; ``width``: elements of an access, 16 bytes of them or 1."""

    kind = "merge"
    #: Rows of a block, one a warp.
    warps: ClassVar[int] = 8
    #: Parts of a launch.
    parts: ClassVar[int] = 8

    dtype: str
    width: int

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES or self.width not in (1, 16 // ELEMENT_BYTES[self.dtype]):
            raise ConfigError(self.name, [f"{self.width} elements of {self.dtype}, expected 16 bytes, or 1 element"])

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def name(self) -> str:
        return f"merge_{self.dtype}_w{self.width}"


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """``unit``: tokens that cuts fall on multiples of; a part has ``least_units`` of them or more."""

    kind = "schedule"

    unit: int
    least_units: int
    header: int  # numbers before the lengths

    @property
    def threads(self) -> int:
        return 1024

    @property
    def totals_at(self) -> int:
        """Behind what has been summed up to each sequence of a chunk: the sums of warps."""
        return 8 * self.threads

    @property
    def shared_bytes(self) -> int:
        return self.totals_at + 8 * WARP

    @property
    def name(self) -> str:
        return f"schedule_u{self.unit}x{self.least_units}_h{self.header}"
