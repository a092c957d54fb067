"""A step of a batch: where its new tokens lie, in tensors that stay where they are from step to step."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Sized
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from flashmla_ops.kv_cache.sequence import Sequence
from flashmla_ops.kv_cache.slab import zeros_on_demand
from flashmla_ops.kv_cache.tables import BatchTables, PageCopy

#: So many views of the tensors are kept, by batch and tokens.
MOST_VIEWS = 256


class StepTensors:
    """The tensors of one step at a time, and their views for batches of any size."""

    def __init__(
        self,
        number: int,
        rows: int,
        most_pages: int,
        most_tokens: int,
        parts: Sized[int],
        device: torch.device | None,
    ) -> None:
        self.number = number
        tables = {each: zeros_on_demand((rows, most_pages * each), torch.int32) for each in sorted({1, *parts})}
        lengths = torch.zeros(rows, dtype=torch.int32, device="cpu")
        self.host = BatchTables(tables, lengths, zeros_on_demand((most_tokens,), torch.int64))
        self.device = device or torch.device("cpu")
        self._tables = {each: table.to(self.device) for each, table in tables.items()}
        self._lengths = lengths.to(self.device)
        self._slots = self.host.slot_mapping.to(self.device)
        self._views: dict[tuple[int, int], tuple[dict[int, Tensor], Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        return self.host.rows

    def views(self, b: int, tokens: int) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """Block tables by parts, lengths and slots of the first ``b`` rows: the same objects every time."""
        if self.device.type != "cpu":
            for parts, table in self._tables.items():
                table[:b].copy_(self.host.block_tables[parts][:b])
            self._lengths[:b].copy_(self.host.cache_seqlens[:b])
            self._slots[:tokens].copy_(self.host.slot_mapping[:tokens])
        found = self._views.get((b, tokens))
        if found is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            tables = {parts: table[:b] for parts, table in self._tables.items()}
            found = self._views[b, tokens] = (tables, self._lengths[:b], self._slots[:tokens])
        return found


class Owner(Protocol):
    """The methods of a pool that its steps call."""

    def close_step(self, step: Step, *, written: bool | None) -> None: ...
    def begin_layer(self, step: Step, layer: int) -> None: ...
    def end_layer(self, step: Step, layer: int) -> None: ...


class Step:
    """Room for new tokens of a batch, made by `KVPool.step`. Open until its ``with`` block ends, or `close`.

    While it is open, no page that it can read is handed out again, and its tensors are nobody else's. Where the block
    raises, the sequences are as long as they were before.
    """

    block_table: Tensor  # [b, max_pages] int32, of the pool's pages
    block_tables: dict[int, Tensor]  # the same for layers of smaller pages, by how many of them make one of the pool
    cache_seqlens: Tensor  # [b] int32, new tokens included
    slot_mapping: Tensor  # [new tokens of all sequences] int64, whatever a layer's pages are

    def __init__(
        self,
        pool: Owner,
        abandoned: deque[Step],
        number: int,
        sequences: tuple[Sequence, ...],
        tensors: StepTensors,
    ) -> None:
        self.pool, self.number, self.sequences, self.tensors = pool, number, sequences, tensors
        self.is_open = True
        #: Steps that go ahead, pages that they may still read and this one has, and what to copy once they do not.
        self.ahead: list[int] = []
        self.late_pages: list[int] = []
        self.late_copies: list[PageCopy] = []
        self._abandoned = abandoned

    def show(self, tokens: int) -> None:
        """Have the tensors, which the pool filled for so many new tokens."""
        self.block_tables, self.cache_seqlens, self.slot_mapping = self.tensors.views(len(self.sequences), tokens)
        self.block_table = self.block_tables[1]

    def close(self) -> None:
        """All is written and read: full pages go to the prefix cache, and released ones to whoever asks next."""
        if self.is_open:
            self.pool.close_step(self, written=True)

    def layer_done(self, layer: int) -> None:
        """This step reads and writes no more of this layer, and of those before: its released rows are free."""
        self.pool.end_layer(self, layer)

    @contextlib.contextmanager
    def layer(self, layer: int) -> Iterator[None]:
        """One layer's turn. A step that was made with ``behind=True`` waits here for the steps before it."""
        self.pool.begin_layer(self, layer)
        yield
        self.pool.end_layer(self, layer)

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_open:
            self.pool.close_step(self, written=kind is None)

    def __del__(self) -> None:
        # Nobody said how it ended: what it wrote is not shared. The pool's next method closes it.
        if getattr(self, "is_open", False):
            self._abandoned.append(self)
