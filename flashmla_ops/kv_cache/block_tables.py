"""Which pages hold the tokens of each sequence; pages are shared, and copied only when written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.kv_cache.allocator import PageAllocator


class PageCopy(NamedTuple):
    """The caller must copy the rows of page ``source`` to page ``target`` before writing to the sequence."""

    source: int
    target: int


class BlockTables:
    """The pages and the length of every sequence in one pool.

    A sequence is named by any hashable value and exists from its first `extend` or `fork` until `release`. Token t of a
    sequence lies in its page number ``t // page_size`` at offset ``t % page_size``. Every method either succeeds or
    raises and changes nothing.
    """

    def __init__(self, n_pages: int, page_size: int) -> None:
        """Raises `ArgumentError` unless both are at least 1."""
        if page_size < 1:
            raise ArgumentError("kv_cache", "page_size", "at least 1", page_size)
        self.page_size = page_size
        self.allocator = PageAllocator(n_pages)
        self._pages: dict[Hashable, list[int]] = {}
        self._lengths: dict[Hashable, int] = {}

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._lengths

    def length(self, sequence: Hashable) -> int:
        """Tokens in the sequence. Raises `ArgumentError` for an unknown sequence."""
        self._check_known(sequence)
        return self._lengths[sequence]

    def pages(self, sequence: Hashable) -> tuple[int, ...]:
        """The pages of the sequence in order. Raises `ArgumentError` for an unknown sequence."""
        self._check_known(sequence)
        return tuple(self._pages[sequence])

    def extend(self, sequences: Sequence[Hashable], count: int) -> list[PageCopy]:
        """Make room for ``count`` more tokens in each sequence; new sequences start empty.

        Returns the pages to copy: a last page that is shared and only partly filled gets a private copy. Raises
        `OutOfPagesError` if the pool has too few pages for all of them, `ArgumentError` if a sequence is named twice.
        """
        if count < 0:
            raise ArgumentError("kv_cache", "count", "at least 0", count)
        if len(set(sequences)) != len(sequences):
            raise ArgumentError("kv_cache", "sequences", "each sequence once", list(sequences))
        shared = self._tails_to_copy(sequences) if count else []
        missing = [self._missing_pages(sequence, count) for sequence in sequences]
        fresh = self.allocator.allocate(len(shared) + sum(missing))
        copies = []
        for sequence in shared:
            source, target = self._pages[sequence][-1], fresh.pop()
            self._pages[sequence][-1] = target
            self.allocator.release([source])
            copies.append(PageCopy(source, target))
        for sequence, n_new in zip(sequences, missing, strict=True):
            self._pages.setdefault(sequence, []).extend(fresh.pop() for _ in range(n_new))
            self._lengths[sequence] = self._lengths.get(sequence, 0) + count
        return copies

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Make ``child`` a new sequence with the tokens of ``parent``, in the same pages."""
        self._check_known(parent)
        if child in self:
            raise ArgumentError("kv_cache", "child", "a new sequence", child)
        self.allocator.retain(self._pages[parent])
        self._pages[child] = list(self._pages[parent])
        self._lengths[child] = self._lengths[parent]

    def truncate(self, sequence: Hashable, length: int) -> None:
        """Keep the first ``length`` tokens and release the pages that only held others."""
        self._check_known(sequence)
        if not 0 <= length <= self._lengths[sequence]:
            raise ArgumentError("kv_cache", "length", f"a length in [0, {self._lengths[sequence]}]", length)
        kept = -(-length // self.page_size)
        self.allocator.release(self._pages[sequence][kept:])
        del self._pages[sequence][kept:]
        self._lengths[sequence] = length

    def release(self, sequence: Hashable) -> None:
        """Forget the sequence and release its pages."""
        self._check_known(sequence)
        self.allocator.release(self._pages.pop(sequence))
        del self._lengths[sequence]

    def block_table(self, sequences: Iterable[Hashable], device: torch.device | None = None) -> Tensor:
        """``[b, max_pages]`` int32, as `flashmla::decode` takes it; rows shorter than the longest end in zeros."""
        rows = [self.pages(sequence) for sequence in sequences]
        longest = max((len(row) for row in rows), default=0)
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), longest)

    def cache_seqlens(self, sequences: Iterable[Hashable], device: torch.device | None = None) -> Tensor:
        """``[b]`` int32: the lengths."""
        return torch.tensor([self.length(sequence) for sequence in sequences], dtype=torch.int32, device=device)

    def _tails_to_copy(self, sequences: Sequence[Hashable]) -> list[Hashable]:
        """The sequences whose last page would be written while someone else holds it."""
        written: Counter[int] = Counter()
        tails = []
        for sequence in sequences:
            if self._lengths.get(sequence, 0) % self.page_size:
                page = self._pages[sequence][-1]
                written[page] += 1
                # Where nobody else holds the page, the last of its writers keeps it.
                if written[page] < self.allocator.references(page):
                    tails.append(sequence)
        return tails

    def _missing_pages(self, sequence: Hashable, count: int) -> int:
        total = self._lengths.get(sequence, 0) + count
        return -(-total // self.page_size) - len(self._pages.get(sequence, ()))

    def _check_known(self, sequence: Hashable) -> None:
        if sequence not in self._lengths:
            raise ArgumentError("kv_cache", "sequence", "a sequence of this cache", repr(sequence))


def slot_mapping(
    block_table: Tensor,  # [b, max_pages] int32
    positions: Tensor,  # [b, n] int64, the tokens' places in their sequences
    page_size: int,
) -> Tensor:  # [b * n] int64
    """The slots of tokens, as `flashmla::append_` takes them: page * page_size + offset."""
    pages = block_table.gather(1, positions // page_size).long()
    return (pages * page_size + positions % page_size).flatten()
