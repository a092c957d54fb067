"""The prefix cache: what begins alike shares pages, and nothing else does, whatever digests say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashmla_ops.kv_cache import KVPool, Sequence
from flashmla_ops.kv_cache.prefix import PrefixCache


def pool_of(n_pages: int = 12, digest: Any = None) -> KVPool:
    pool = KVPool(n_pages=n_pages, page_size=4, d=1, dtype=torch.int64, poison=True)
    if digest is not None:
        pool.prefixes = PrefixCache(pool.pages, digest)
    return pool


def computed(pool: KVPool, tokens: list[int]) -> Sequence:
    """A sequence of these tokens. Each row holds its token's id; those that were cached are compared."""
    sequence = pool.open(tokens)
    assert rows_of(pool, sequence) == tokens[: sequence.cached]
    with pool.step([sequence], sequence.pending) as step:
        pool.cache().flatten()[step.slot_mapping] = torch.tensor(tokens[sequence.cached :])
    return sequence


def rows_of(pool: KVPool, sequence: Sequence) -> list[int]:
    return pool.cache()[sequence.pages].flatten()[: sequence.length].tolist()


def test_full_pages_are_shared_while_they_live_and_after() -> None:
    pool = pool_of()
    first = computed(pool, [*range(10)])
    second = computed(pool, [*range(8), 70, 71, 72])
    assert second.cached == 8
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]
    pool.release(first)
    pool.release(second)
    third = computed(pool, [*range(12)])
    assert third.cached == 8
    assert (pool.stats().hits, pool.stats().lookups) == (16, 9 + 10 + 11)


def test_one_token_is_left_to_compute_and_a_shared_page_is_copied_for_it() -> None:
    pool = pool_of()
    first = computed(pool, [*range(8)])
    second = computed(pool, [*range(8)])
    assert second.cached == 7
    assert first.pages[0] == second.pages[0]
    assert first.pages[1] != second.pages[1]
    pool.release(first)
    pool.release(second)
    third = computed(pool, [*range(8)])
    assert (third.cached, pool.stats().used) == (7, 2)


def test_generated_tokens_are_found_again() -> None:
    pool = pool_of()
    sequence = computed(pool, [1, 2, 3])
    for token in (4, 5, 6, 7, 8):
        sequence.tokens.append(token)
        with pool.step([sequence]) as step:
            pool.cache().flatten()[step.slot_mapping] = token
    assert computed(pool, [*range(1, 10)]).cached == 8


def test_what_a_page_holds_depends_on_all_before() -> None:
    pool = pool_of()
    computed(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert computed(pool, [0, 2, 3, 4, 5, 6, 7, 8, 9]).cached == 0
    assert computed(pool, [5, 6, 7, 8, 9]).cached == 0


@pytest.mark.parametrize("digest", [lambda before, tokens: b"", lambda before, tokens: tokens[:8]])
def test_digests_that_collide_are_misses(digest: Any) -> None:
    pool = pool_of(24, digest)
    prompts = [
        [1, 2, 3, 4, 5],
        [1, 9, 3, 4, 5],
        [1, 2, 3, 4, 1, 2, 3, 4, 5],
        [1, 9, 9, 9, 1, 2, 3, 4, 5],
        [2, 1, 2, 1, 5],
    ]
    held = [computed(pool, prompt) for _ in range(2) for prompt in prompts]
    assert pool.stats().collisions > 0
    assert held[len(prompts)].cached == 4  # the first that had the digest is found
    for sequence, prompt in zip(held, prompts * 2, strict=True):
        assert rows_of(pool, sequence) == prompt


def test_no_phantom_hits_after_eviction() -> None:
    pool = pool_of(n_pages=4)
    pool.release(computed(pool, [*range(8)]))
    assert pool.stats().evictable == 2
    other = computed(pool, [*range(50, 62)])  # takes the page that is found last in the chain
    assert pool.stats().evictions == 1
    pool.release(other)
    third = computed(pool, [*range(9)])
    assert third.cached == 4


def test_the_least_recently_used_goes_first() -> None:
    pool = pool_of(n_pages=4)
    for first in (10, 20, 30):
        pool.release(computed(pool, [first] * 5))
    pool.release(computed(pool, [10] * 5))
    pool.release(computed(pool, [40] * 9))
    assert [pool.open([first] * 5).cached for first in (10, 20, 30)] == [4, 0, 0]


def test_rows_that_were_not_written_are_not_shared() -> None:
    pool = pool_of()
    sequence = pool.open(range(8))
    step = pool.step([sequence], 8)
    assert pool.open(range(8)).cached == 0  # still being computed
    with pytest.raises(ZeroDivisionError), step:
        _ = 1 / 0
    assert pool.open(range(8)).cached == 0
    step = pool.step([sequence], 8)
    del step  # nobody said how it ended
    assert pool.open(range(8)).cached == 0


def test_steps_that_close_in_another_order_share_no_gap() -> None:
    pool = pool_of()
    sequence = pool.open(range(12))
    first, second = pool.step([sequence], 4), pool.step([sequence], 8)
    second.close()
    assert pool.open(range(12)).cached == 0
    first.close()
    assert pool.open(range(12)).cached == 4


def test_taking_tokens_back_unshares_them() -> None:
    pool = pool_of()
    sequence = computed(pool, [*range(8)])
    pool.truncate(sequence, 6)
    sequence.tokens.extend([60, 70])
    with pool.step([sequence], 2) as step:
        pool.cache().flatten()[step.slot_mapping] = torch.tensor([60, 70])
    assert computed(pool, [*range(9)]).cached == 4
    assert computed(pool, [*range(6), 60, 70, 0]).cached == 8


def test_evict_forgets_all() -> None:
    pool = pool_of()
    held = computed(pool, [*range(8)])
    pool.release(computed(pool, [5] * 8))
    pool.evict()
    assert (pool.stats().evictable, pool.stats().used) == (0, 2)
    assert pool.open(range(9)).cached == 0
    assert rows_of(pool, held) == [*range(8)]


def test_moved_pages_are_found() -> None:
    pool = pool_of()
    before = computed(pool, [9] * 12)
    pool.release(computed(pool, [*range(8)]))
    held = computed(pool, [7] * 8)
    pool.release(before)
    pool.evict()
    pool.release(computed(pool, [7] * 9))
    assert pool.compact_() > 0
    assert computed(pool, [7] * 9).cached == 8
    assert rows_of(pool, held) == [7] * 8
