"""BlockTables against a model: a dictionary of token lists. Pages are written as the caller of `extend` would."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from flashmla_ops.errors import ArgumentError, OutOfPagesError
from flashmla_ops.kv_cache import BlockTables, PageCopy, copy_pages, new_slab, slot_mapping

N_PAGES, PAGE_SIZE = 12, 3


class AgainstLists(RuleBasedStateMachine):
    """Every sequence reads back the tokens written to it, whatever was shared, copied, cut or refused in between."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(N_PAGES, PAGE_SIZE)
        self.slab = new_slab(N_PAGES, PAGE_SIZE, 1, 1, dtype=torch.int64)[:, 0, :, 0]
        self.written: dict[int, list[int]] = {}
        self.next_name = self.next_token = 0

    def new_name(self) -> int:
        self.next_name += 1
        return self.next_name

    def write(self, names: list[int], count: int) -> None:
        """Extend and write, or check that a refusal changed nothing."""
        before = {name: (self.tables.pages(name), self.tables.length(name)) for name in self.written}
        try:
            copies = self.tables.extend(names, count)
        except OutOfPagesError:
            assert before == {name: (self.tables.pages(name), self.tables.length(name)) for name in self.written}
            assert all((name in self.tables) == (name in self.written) for name in names)
            return
        copy_pages(self.slab[:, None, :, None], copies)
        for name in names:
            tokens = self.written.setdefault(name, [])
            for _ in range(count):
                self.next_token += 1
                page = self.tables.pages(name)[len(tokens) // PAGE_SIZE]
                self.slab[page, len(tokens) % PAGE_SIZE] = self.next_token
                tokens.append(self.next_token)

    @rule(target=names, count=st.integers(0, 8))
    def start(self, count: int) -> int:
        name = self.new_name()
        self.write([name], count)
        return name

    @rule(chosen=st.lists(names, min_size=1, max_size=4, unique=True), count=st.integers(0, 5))
    def grow(self, chosen: list[int], count: int) -> None:
        self.write([name for name in chosen if name in self.written], count)

    @rule(target=names, parent=names)
    def fork(self, parent: int) -> int:
        name = self.new_name()
        if parent in self.written:
            self.tables.fork(parent, name)
            self.written[name] = list(self.written[parent])
        return name

    @rule(name=names, share=st.floats(0, 1))
    def truncate(self, name: int, share: float) -> None:
        if name in self.written:
            length = int(share * len(self.written[name]))
            self.tables.truncate(name, length)
            del self.written[name][length:]

    @rule(name=consumes(names))
    def release(self, name: int) -> None:
        if name in self.written:
            self.tables.release(name)
            del self.written[name]

    @invariant()
    def sequences_read_back(self) -> None:
        for name, tokens in self.written.items():
            pages = list(self.tables.pages(name))
            assert self.tables.length(name) == len(tokens)
            assert self.slab[pages].flatten()[: len(tokens)].tolist() == tokens

    @invariant()
    def pages_are_counted(self) -> None:
        held = Counter(page for name in self.written for page in self.tables.pages(name))
        allocator = self.tables.allocator
        assert all(allocator.references(page) == held[page] for page in range(N_PAGES))
        assert allocator.n_free == N_PAGES - len(held)
        assert all(
            len(self.tables.pages(name)) == -(-len(tokens) // PAGE_SIZE) for name, tokens in self.written.items()
        )


AgainstLists.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestAgainstLists = AgainstLists.TestCase


def test_the_last_holder_of_a_shared_page_does_not_copy_it() -> None:
    tables = BlockTables(8, 4)
    tables.extend(["a"], 6)
    full, tail = tables.pages("a")
    tables.fork("a", "b")
    assert tables.extend(["a", "b"], 1) == [PageCopy(tail, tables.pages("a")[1])]
    assert tables.pages("b") == (full, tail)
    assert tables.extend(["a", "b"], 1) == []


def test_tensors() -> None:
    tables = BlockTables(8, 4)
    tables.extend(["a"], 9)
    tables.extend(["b"], 2)
    table, a, b = tables.block_table(["b", "a"]), tables.pages("a"), tables.pages("b")
    assert table.dtype == torch.int32
    assert table.tolist() == [[*b, 0, 0], [*a]]
    assert tables.cache_seqlens(["b", "a"]).tolist() == [2, 9]
    assert tables.cache_seqlens(["b", "a"]).dtype == torch.int32
    slots = slot_mapping(table, torch.tensor([[1], [8]]), page_size=4)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [b[0] * 4 + 1, a[2] * 4]
    assert tables.block_table([]).shape == (0, 0)


def test_refusals() -> None:
    tables = BlockTables(4, 2)
    tables.extend(["a"], 3)
    with pytest.raises(ArgumentError, match="each sequence once"):
        tables.extend(["a", "a"], 1)
    with pytest.raises(ArgumentError, match="'count'"):
        tables.extend(["a"], -1)
    with pytest.raises(ArgumentError, match="a new sequence"):
        tables.fork("a", "a")
    for length in (-1, 4):
        with pytest.raises(ArgumentError, match=r"a length in \[0, 3\]"):
            tables.truncate("a", length)
    for call in (tables.length, tables.pages, tables.release):
        with pytest.raises(ArgumentError, match="a sequence of this cache, got 'b'"):
            call("b")
    with pytest.raises(ArgumentError, match="page_size"):
        BlockTables(4, 0)
    assert tables.length("a") == 3
