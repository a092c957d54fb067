"""Full pages whose tokens are known, found again by other sequences that begin with the same tokens.

A page is named by a digest of its tokens and of the page before it, so that it stands for everything up to its end.
Digests only find pages. A hit compares the tokens themselves and that the page before is the very one of the chain, so
that a collision is a miss; and the books compare the generation of the page, so that one that was evicted and handed
out since is a miss too.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashmla_ops.kv_cache.pages import Pages
from flashmla_ops.kv_cache.tables import PageCopy

Digest = Callable[[bytes, bytes], bytes]


def blake2b(before: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(before + tokens, digest_size=16).digest()


@dataclass(eq=False, slots=True)
class CachedPage:
    """A page that is known by its tokens, int64 as bytes, and the page before it."""

    digest: bytes
    tokens: bytes
    before: CachedPage | None
    page: int
    generation: int


class PrefixCache:
    """The cached pages of one pool. Not thread-safe: the pool has a lock."""

    def __init__(self, pages: Pages, digest: Digest = blake2b) -> None:
        self._pages, self._digest = pages, digest
        self._by_digest: dict[bytes, CachedPage] = {}
        self._by_page: dict[int, CachedPage] = {}
        #: Tokens that were looked up and found, and digests that two different prefixes had.
        self.looked_up = self.found = self.collisions = 0

    def open(self, tokens: array[int]) -> tuple[int, int, list[CachedPage]]:
        """A sequence that holds the cached pages at the start of ``tokens``: its name, length and those pages.

        One token at least is left to be computed, since a model's step needs one.
        """
        most = max(0, len(tokens) - 1)
        chain = self._match(tokens)[: -(-most // self._pages.page_size)]
        pages, generations = [each.page for each in chain], [each.generation for each in chain]
        name, alive = self._pages.adopt(pages, generations, most)
        for gone in chain[alive:]:
            self._remove(gone)
        length = self._pages.length(name)
        self.looked_up += most
        self.found += length
        # The page of the last token, if it is shared, is written again, and is then no longer the cached one.
        return name, length, chain[: length // self._pages.page_size]

    def add(self, tokens: array[int], chain: list[CachedPage], pages: Sequence[int], length: int) -> None:
        """The first ``length`` tokens lie in ``pages``; ``chain``, of those that are cached, grows by the full ones."""
        size = self._pages.page_size
        while (len(chain) + 1) * size <= min(length, len(tokens)):
            i = len(chain)
            added = self._add(tokens[i * size : (i + 1) * size].tobytes(), chain[-1] if chain else None, pages[i])
            if added is None:
                break
            chain.append(added)

    def clear(self) -> None:
        for each in list(self._by_digest.values()):
            if self._pages.remembers(each.page, each.generation):
                self._pages.forget(each.page)
        self._by_digest.clear()
        self._by_page.clear()

    def move(self, moves: Sequence[PageCopy]) -> None:
        """The books moved pages, and their generations with them."""
        moved = {move.target: self._by_page.pop(move.source) for move in moves if move.source in self._by_page}
        for page, each in moved.items():
            each.page = page
        self._by_page |= moved

    def _match(self, tokens: array[int]) -> list[CachedPage]:
        size = self._pages.page_size
        chain: list[CachedPage] = []
        before = None
        for end in range(size, len(tokens) + 1, size):
            chunk = tokens[end - size : end].tobytes()
            found = self._by_digest.get(self._digest(before.digest if before else b"", chunk))
            if found is None:
                break
            if found.tokens != chunk or found.before is not before:
                self.collisions += found.tokens != chunk
                break
            chain.append(found)
            before = found
        return chain

    def _add(self, chunk: bytes, before: CachedPage | None, page: int) -> CachedPage | None:
        """The cached page of these tokens, an older one if there is one; None if another prefix has its digest."""
        digest = self._digest(before.digest if before else b"", chunk)
        there = self._by_digest.get(digest)
        if there is not None and self._pages.remembers(there.page, there.generation):
            if there.tokens == chunk and there.before is before:
                return there
            if self._is_reachable(there):
                self.collisions += 1
                return None
            self._pages.forget(there.page)
        if there is not None:
            self._remove(there)
        if stale := self._by_page.get(page):
            self._remove(stale)
        added = CachedPage(digest, chunk, before, page, self._pages.remember(page))
        self._by_digest[digest] = self._by_page[page] = added
        return added

    def _is_reachable(self, page: CachedPage | None) -> bool:
        """Whether a chain of cached pages leads to it."""
        while page is not None:
            alive = self._pages.remembers(page.page, page.generation)
            if not alive or self._by_digest.get(page.digest) is not page:
                return False
            page = page.before
        return True

    def _remove(self, page: CachedPage) -> None:
        if self._by_digest.get(page.digest) is page:
            del self._by_digest[page.digest]
        if self._by_page.get(page.page) is page:
            del self._by_page[page.page]
