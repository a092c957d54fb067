"""A sequence of a pool."""

from __future__ import annotations

from array import array
from collections import deque

from flashmla_ops.errors import ArgumentError
from flashmla_ops.kv_cache.pages import Pages
from flashmla_ops.kv_cache.prefix import CachedPage
from flashmla_ops.kv_cache.swap import Swapped

#: The name of a sequence that has no pages: it was released, or is swapped out.
NOWHERE = -1


class Sequence:
    """Tokens whose rows lie in pages of a pool. `KVPool.open`, `fork` and `restore` make them.

    ``tokens`` are the ids that are known, which the prefix cache needs. They may be fewer than there are rows, or more,
    those to come: append what a model chose before the step ends that computes its row.
    """

    __slots__ = ("__weakref__", "abandoned", "books", "cached", "chain", "name", "swapped", "tokens")

    def __init__(
        self,
        books: Pages,
        abandoned: deque[int],
        name: int,
        tokens: array[int],
        chain: list[CachedPage],
        cached: int = 0,
    ) -> None:
        self.books, self.abandoned, self.name, self.tokens, self.chain = books, abandoned, name, tokens, chain
        #: Tokens that were found in the prefix cache when it was opened.
        self.cached = cached
        self.swapped: Swapped | None = None

    @property
    def length(self) -> int:
        """Tokens that have a place. Raises `ArgumentError` once it is released."""
        if self.swapped is not None:
            return self.swapped.length
        return self.books.length(self.known())

    @property
    def pending(self) -> int:
        """Tokens that are known and have no place yet: what a first step, the prefill, has to compute."""
        return max(0, len(self.tokens) - self.length)

    @property
    def pages(self) -> list[int]:
        """Its pages in order, those reserved for tokens to come at the end."""
        return [] if self.swapped is not None else self.books.pages_of(self.known())

    def known(self) -> int:
        """Its name in the books. Raises `ArgumentError` where it has none."""
        if self.name == NOWHERE:
            raise ArgumentError("kv_pool", "sequence", "a sequence with pages", self)
        return self.name

    def __del__(self) -> None:
        # A sequence that nobody knows any more is released by the pool's next method. Not here: garbage is collected
        # at any time, in the midst of a method too.
        if self.name != NOWHERE:
            self.abandoned.append(self.name)

    def __repr__(self) -> str:
        if self.swapped is not None:
            return f"Sequence({self.swapped.length} tokens, swapped out)"
        return "Sequence(released)" if self.name == NOWHERE else f"Sequence({self.length} tokens)"
