"""What attention kernels are built for: the row that they read, and their tile. Needs no CuTe DSL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cutlass_kernels.errors import ConfigError

#: Warps side by side. They share the key's elements in the first product, and the value's in the second.
ACROSS = 4
WARP = 32
#: float32 scores of a row in shared memory, beyond those of its tile: so that rows fall into different banks.
SCORE_PADDING = 8
#: Registers of a thread for its part of the queries and of the sums; it has 255 in all.
QUERY_AND_SUM_REGISTERS = 160
#: Types of elements, and their names in PTX.
PTX_TYPES = {"bf16": "bf16", "fp16": "f16"}


@dataclass(frozen=True)
class Config(ABC):
    """What every kernel's configuration has. The module of ``kind`` in this package has its source."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 0

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Config:
        """From what `fields` gives."""
        return cls(**fields)


@dataclass(frozen=True)
class Codes:
    """A row of bytes: codes in groups, each with a scale, and elements in bfloat16. Places and sizes are in bytes."""

    name: str
    code: str  # e4m3, int8, e2m1 or int4
    bits: int  # of a code
    values: int  # codes of a row
    group: int  # codes of a scale
    scale: str  # float32, e8m0 or e4m3
    scales_at: int
    rope: int  # elements in bfloat16
    rope_at: int
    head: int  # bytes of a row that lie together
    tail: int = 0  # bytes of it that a page holds behind the heads of all its rows

    @property
    def elements(self) -> int:
        return self.values + self.rope

    @property
    def scale_bytes(self) -> int:
        return 4 if self.scale == "float32" else 1

    def problems(self) -> Iterator[str]:
        if self.head % 16 or self.tail not in (0, 8):
            yield f"a row of {self.head} + {self.tail} bytes, expected a multiple of 16, and 0 or 8"
        if self.group % 8 or self.values % 16 or self.rope % 8:
            yield f"{self.values} values in groups of {self.group}, and {self.rope} others: expected multiples of 8"


@dataclass(frozen=True)
class CallConfig(Config):
    """What a decode kernel is for. Sizes count elements; a whole row is ``kv`` elements, then those of ``k``.

    Each kernel's own one has ``rows``, the query rows of a block, and ``tile``, the tokens of a tile.
    """

    dtype: str  # bf16 or fp16
    kv: int  # elements of a row of kv_cache
    k: int  # elements of a row of k_cache; 0: there is none
    qk_start: int
    d_v: int
    source: str  # what names the rows of the cache: pages of a block table, or indices
    codes: Codes | None  # None: the cache holds elements
    second: bool  # whether there is a second source, of ``second_codes``
    second_codes: Codes | None

    if TYPE_CHECKING:

        @property
        def rows(self) -> int: ...

        @property
        def tile(self) -> int: ...

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(self.name, problems)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> CallConfig:
        """From what `fields` gives."""
        codes = {name: Codes(**fields[name]) for name in ("codes", "second_codes") if fields[name]}
        return cls(**(fields | codes))

    def _problems(self) -> Iterator[str]:
        if self.dtype not in PTX_TYPES:
            yield f"dtype is {self.dtype}, expected one of {', '.join(PTX_TYPES)}"
        if self.source not in ("pages", "indices") or (self.second and self.source == "pages"):
            yield f"source is {self.source}, expected pages, or indices of one cache or two"
        if self.second and (self.codes is None) != (self.second_codes is None):
            yield "one source of codes and one of elements, expected two of a kind"
        for codes in self.all_codes:
            yield from codes.problems()
            if codes.elements != self.kv or self.k or self.dtype != "bf16":
                yield f"rows of {codes.name} have {codes.elements} elements in bf16, expected {self.kv} in {self.dtype}"

    @property
    def all_codes(self) -> tuple[Codes, ...]:
        return tuple(codes for codes in (self.codes, self.second_codes) if codes is not None)

    @property
    def described(self) -> str:
        """The part of the name that says what the kernel is for."""
        row = self.codes.name if self.codes else f"{self.dtype}_{self.kv}" + (f"_{self.k}" if self.k else "")
        row += f"_{self.second_codes.name if self.second_codes else 'native'}" if self.second else ""
        return f"{'decode' if self.source == 'pages' else 'sparse_decode'}_{row}_k{self.qk_start}_v{self.d_v}"

    @property
    def d(self) -> int:
        return self.kv + self.k

    @property
    def d_qk(self) -> int:
        return self.d - self.qk_start


@dataclass(frozen=True)
class DecodeConfig(CallConfig):
    """A kernel for sm_80 and newer."""

    kind = "decode"

    rows: int  # 16, 32 or 64
    tile: int = 32
    stages: int = 3  # tiles in shared memory

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name, size, unit in (
            *((name, getattr(self, name), 8) for name in ("kv", "k", "qk_start")),
            *((name, getattr(self, name), 16) for name in ("d", "d_qk", "d_v")),
        ):
            if size % unit:
                yield f"{name} is {size}, expected a multiple of {unit}"
        if self.rows not in (16, 32, 64):
            yield f"rows is {self.rows}, expected 16, 32 or 64"
        if self.tile % 32 or self.stages < 2:
            yield f"a tile of {self.tile} tokens in {self.stages} stages, expected a multiple of 32 in at least 2"

    @property
    def down(self) -> int:
        """Groups of `ACROSS` warps, each with query rows of its own."""
        return 1 if self.rows == 16 else 2

    @property
    def blocks(self) -> int:
        """Query rows of a group, in units of 16."""
        return self.rows // self.down // 16

    @property
    def steps(self) -> int:
        """Steps of 16 elements of the key, a warp."""
        return -(-self.d_qk // 16 // ACROSS)

    @property
    def columns(self) -> int:
        """Columns of 16 elements of the value, a warp."""
        return -(-self.d_v // 16 // ACROSS)

    @property
    def crowded(self) -> bool:
        """Whether a thread's queries and sums leave too few registers for what only one phase of the work needs."""
        return 4 * self.blocks * (self.steps + 2 * self.columns) > QUERY_AND_SUM_REGISTERS

    @property
    def threads(self) -> int:
        return self.down * ACROSS * WARP

    @property
    def row_bytes(self) -> int:
        """A row in shared memory: an odd number of 16 bytes, so that eight rows fall into different banks."""
        return 2 * self.d + 16

    @property
    def score_row(self) -> int:
        """Bytes of a row of scores."""
        return 4 * (self.tile + SCORE_PADDING)

    @property
    def weight_row(self) -> int:
        """Bytes of a row of weights (probabilities)."""
        return 2 * self.tile + 16

    @property
    def raw_row(self) -> int:
        """A row of codes in shared memory."""
        return max((-(-(codes.head + codes.tail) // 16) * 16 for codes in self.all_codes), default=0)

    @property
    def live_at(self) -> int:
        """Where in a stage, behind its rows, a byte a token says whether it is to be attended to."""
        return self.tile * (self.raw_row or self.row_bytes)

    @property
    def stage_bytes(self) -> int:
        return self.live_at + self.tile

    @property
    def decoded_at(self) -> int:
        """The tile whose elements have been decoded."""
        return self.stages * self.stage_bytes

    @property
    def scores_at(self) -> int:
        return self.decoded_at + (self.tile * self.row_bytes if self.all_codes else 0)

    @property
    def group_scores(self) -> int:
        """Bytes of the partial scores of a group: one set a warp."""
        return ACROSS * self.blocks * 16 * self.score_row

    @property
    def weights_at(self) -> int:
        return self.scores_at + self.down * self.group_scores

    @property
    def factors_at(self) -> int:
        """A float32 a row: what the sums of earlier tiles are multiplied by."""
        return self.weights_at + self.rows * self.weight_row

    @property
    def rest_at(self) -> int:
        """Room for `rest_bytes` of each thread."""
        return self.factors_at + 4 * self.rows

    @property
    def shared_bytes(self) -> int:
        return self.rest_at + self.threads * self.rest_bytes

    @property
    def rest_bytes(self) -> int:
        """What rests while other phases work, if registers are crowded: with two sources, the item is part of it."""
        return (64 if self.second else 32) if self.crowded else 0

    @property
    def name(self) -> str:
        return f"{self.described}_m{self.rows}_n{self.tile}x{self.stages}"


@dataclass(frozen=True)
class DecodeSm90Config(CallConfig):
    """A kernel for sm_90a: two warpgroups compute, a third one copies; shared memory holds two tiles."""

    kind = "decode_sm90"
    rows: ClassVar[int] = 64
    tile: ClassVar[int] = 64
    #: Bytes of 64 rows of 64 elements: what shared memory is laid out in.
    block_bytes: ClassVar[int] = 64 * 128

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.kv % 64 or self.k % 64 or self.qk_start:
            yield f"rows of {self.kv} + {self.k} elements, keys from {self.qk_start} on: expected 64 n + 64 m, from 0"
        for codes in self.all_codes:
            if codes.values % 64 or codes.rope % 64:
                yield f"{codes.values} values and {codes.rope} others, expected multiples of 64"
        if self.d_v % 128 or not 128 <= self.d_v <= min(self.kv, 512):
            yield f"d_v is {self.d_v}, expected a multiple of 128 up to {min(self.kv, 512)}"

    @property
    def threads(self) -> int:
        return 3 * 4 * WARP

    @property
    def blocks(self) -> int:
        """Blocks of 64 elements of a row."""
        return self.d // 64

    @property
    def stage_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def queries_at(self) -> int:
        """Behind the two tiles."""
        return 2 * self.stage_bytes

    @property
    def shares(self) -> bool:
        """Whether the weights of odd tiles take the place of the tile's last block, which is no part of the value."""
        return self.d > self.d_v

    def weights_at(self, stage: int) -> int:
        if stage == 1 and self.shares:
            return 2 * self.stage_bytes - self.block_bytes
        return 3 * self.stage_bytes + stage * self.block_bytes

    @property
    def tops_at(self) -> int:
        """A float32 a row and stage: the maximum that the weights of its tile are relative to."""
        return 3 * self.stage_bytes + (1 if self.shares else 2) * self.block_bytes

    @property
    def norms_at(self) -> int:
        """A float32 a row and warpgroup, for even and odd items."""
        return self.tops_at + 2 * 4 * self.rows

    @property
    def live_at(self) -> int:
        """A byte a token and stage: whether it is to be attended to."""
        return self.norms_at + 4 * 4 * self.rows

    @property
    def full_at(self) -> int:
        """An mbarrier a stage and block: it has been copied."""
        return self.live_at + 2 * self.tile

    @property
    def free_at(self) -> int:
        """An mbarrier a stage and half of the value: it may be overwritten."""
        return self.full_at + 2 * 8 * self.blocks

    @property
    def weighed_at(self) -> int:
        """An mbarrier a stage: the weights of its tile are there."""
        return self.free_at + 4 * 8

    @property
    def queries_full_at(self) -> int:
        return self.weighed_at + 2 * 8

    @property
    def queries_free_at(self) -> int:
        return self.queries_full_at + 8

    @property
    def shared_bytes(self) -> int:
        return self.queries_free_at + 8

    @property
    def name(self) -> str:
        return f"{self.described}_sm90"


@dataclass(frozen=True)
class CombineConfig(Config):
    """``dtype`` of the result, bf16 or fp16; ``d_v`` elements, a multiple of 16."""

    kind = "combine"
    #: Rows of a block, one a warp.
    warps: ClassVar[int] = 8

    dtype: str
    d_v: int

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def name(self) -> str:
        return f"combine_{self.dtype}_v{self.d_v}"
