"""Torch's own tensors in memory of a pool."""

from __future__ import annotations

import copy

import pytest
import torch

from flashmla_ops.errors import ArgumentError
from flashmla_ops.kv_cache import Arena, KVPool

pytestmark = pytest.mark.usefixtures("cxx")


def pool(**options: object) -> KVPool:
    return KVPool(layers=2, n_pages=8, page_size=4, d=16, **options)


def test_a_step_of_a_model_on_memory_of_the_pool() -> None:
    kv_pool = pool()
    layer = torch.nn.Linear(16, 16)
    sequence = kv_pool.open()
    with torch.no_grad(), kv_pool.allocator(), kv_pool.step([sequence], 3) as step:
        rows = layer(torch.ones(3, 1, 16))
        torch.ops.flashmla.append_(kv_pool.cache(), rows, step.slot_mapping)
    arena = kv_pool.arena()
    assert isinstance(arena, Arena)
    assert arena.owns(rows)
    assert not arena.owns(torch.empty(3))
    first_page = kv_pool.cache()[sequence.pages[0], :3]
    torch.testing.assert_close(first_page, rows.to(first_page.dtype))
    assert kv_pool.explain().endswith(arena.explain())


def test_the_workspace_is_a_limit() -> None:
    kv_pool = pool(workspace="1MiB")
    with kv_pool.allocator():
        inside, elsewhere = torch.empty(1 << 19, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)
    arena = kv_pool.arena()
    assert isinstance(arena, Arena)
    assert arena.owns(inside)
    assert not arena.owns(elsewhere)
    with pytest.raises(ArgumentError, match="argument 'workspace'"):
        pool(workspace="none")


def test_a_tensor_outlives_the_pool() -> None:
    kv_pool = pool()
    with kv_pool.allocator():
        kept = torch.arange(1000)
    del kv_pool
    assert kept.tolist() == list(range(1000))


def test_a_copy_has_an_arena_of_its_own() -> None:
    kv_pool = pool()
    with kv_pool.allocator():
        torch.empty(10)
    copied = copy.deepcopy(kv_pool)
    assert copied.arena() is not kv_pool.arena()
