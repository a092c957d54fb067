"""The tensors of a batch, and how the books of a pool say what they found."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from flashmla_ops.errors import ArgumentError, FlashMLAError

#: The statuses of the books, as in ``cpu/csrc/pool/pages.h``.
FINE, OUT_OF_PAGES, UNKNOWN, REPEATED, TOO_LONG, BAD_LENGTH = range(6)


class PageCopy(NamedTuple):
    """The rows of page ``source`` must be copied to page ``target`` before anything is written."""

    source: int
    target: int


class PageCounts(NamedTuple):
    """Pages by what they are."""

    free: int
    used: int  # somebody holds them
    evictable: int  # nobody but the prefix cache
    deferred: int  # released, but a step that is open may read them
    reserved: int  # used, but without a token yet
    shared: int  # used by several
    peak: int  # the most that were ever used at once
    evictions: int
    rows: int  # tokens that the used pages hold
    longest_free: int  # the most free neighbours


class OutOfPages(FlashMLAError):
    """The books lack ``needed`` pages; the pool says the rest."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        super().__init__(f"{needed} pages are needed")


class BatchTables:
    """The tensors of a batch, which stay where they are, and what the books keep of them.

    ``sequences`` and ``counts`` are filled in for a step: names of sequences, and how many tokens each gets.
    """

    def __init__(
        self,
        block_tables: dict[int, Tensor],  # by how many of their pages make one of the pool: [b, most_pages * parts]
        cache_seqlens: Tensor,  # [b] int32
        slot_mapping: Tensor,  # [most tokens of a step] int64
    ) -> None:
        self.block_tables, self.cache_seqlens, self.slot_mapping = block_tables, cache_seqlens, slot_mapping
        self.rows = cache_seqlens.shape[0]
        self.most_pages = block_tables[1].shape[1]
        self.sequences = np.zeros(self.rows, np.int64)
        self.counts = np.zeros(self.rows, np.int64)
        self.copies = np.zeros((self.rows, 2), np.int32)
        #: The books keep this beside, from the first step on.
        self.kept: Any = None


def refuse(status: int, index: int, needed: int, names: Any = ()) -> FlashMLAError:
    """The error for a status. ``names`` are the sequences, or pages, that ``index`` counts."""
    if status == OUT_OF_PAGES:
        return OutOfPages(needed)
    if status == UNKNOWN:
        return ArgumentError("kv_pool", "sequences", "what the pool holds", f"{names[index]} at {index}")
    if status == REPEATED:
        return ArgumentError("kv_pool", "sequences", "each sequence once", f"another time at {index}")
    if status == TOO_LONG:
        return ArgumentError("kv_pool", "new_tokens", "sequences of at most max_length tokens", f"more at {index}")
    return ArgumentError("kv_pool", "length", "a length of the sequence, at most the one it has", names[index])
