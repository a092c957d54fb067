"""PageAllocator: what it hands out, counts and refuses."""

from __future__ import annotations

import pytest

from flashmla_ops.errors import ArgumentError, OutOfPagesError
from flashmla_ops.kv_cache import PageAllocator


def test_a_page_is_free_when_its_last_reference_goes() -> None:
    allocator = PageAllocator(3)
    first, second = allocator.allocate(2)
    allocator.retain([first])
    allocator.release([first, second])
    assert (allocator.references(first), allocator.references(second)) == (1, 0)
    assert allocator.n_free == 2
    allocator.release([first])
    assert allocator.n_free == 3


def test_the_page_freed_last_comes_first() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    allocator.release([pages[1]])
    assert allocator.allocate(1) == [pages[1]]


def test_out_of_pages_takes_none() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(OutOfPagesError, match="3 pages are needed and 2 of 4 are free"):
        allocator.allocate(3)
    assert allocator.n_free == 2
    with pytest.raises(MemoryError):
        allocator.allocate(3)


@pytest.mark.parametrize("pages", [[0, 1], [0, 0], [0, -1], [0, 5]])
def test_release_of_what_is_not_held_drops_nothing(pages: list[int]) -> None:
    allocator = PageAllocator(2)
    assert allocator.allocate(1) == [0]
    with pytest.raises(ArgumentError, match="allocated pages"):
        allocator.release(pages)
    assert allocator.references(0) == 1


def test_retain_of_a_free_page_adds_nothing() -> None:
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    with pytest.raises(ArgumentError, match="page 1 with 0 references"):
        allocator.retain([page, 1])
    assert allocator.references(page) == 1


def test_no_pages() -> None:
    with pytest.raises(ArgumentError, match="n_pages"):
        PageAllocator(0)
