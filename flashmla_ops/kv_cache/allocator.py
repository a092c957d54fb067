"""A free list of page numbers with reference counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flashmla_ops.errors import ArgumentError, OutOfPagesError


class PageAllocator:
    """Hands out the page numbers ``0 .. n_pages - 1``. A page is free again when its last reference is released.

    The page freed last is handed out first, while it is warm in the processor's cache. Not thread-safe.
    """

    def __init__(self, n_pages: int) -> None:
        """Raises `ArgumentError` unless ``n_pages`` is at least 1."""
        if n_pages < 1:
            raise ArgumentError("kv_cache", "n_pages", "at least 1", n_pages)
        self.n_pages = n_pages
        self._references = [0] * n_pages
        self._free = list(range(n_pages - 1, -1, -1))

    @property
    def n_free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many holders a page has; 0 if it is free."""
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages, each with one reference. Raises `OutOfPagesError`, taking none, if there are fewer."""
        if count > len(self._free):
            raise OutOfPagesError(
                f"{count} pages are needed and {len(self._free)} of {self.n_pages} are free:"
                " release sequences, or make the cache with more pages"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add a reference to each page. Raises `ArgumentError`, adding none, if one of them is not allocated."""
        self._check(pages)
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each page. Raises `ArgumentError`, dropping none, where there are too few to drop."""
        self._check(pages, dropping=True)
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def _check(self, pages: Sequence[int], *, dropping: bool = False) -> None:
        for page, count in Counter(pages).items():
            held = self._references[page] if 0 <= page < self.n_pages else 0
            if held < (count if dropping else 1):
                raise ArgumentError("kv_cache", "pages", "allocated pages", f"page {page} with {held} references")
