"""Released pages wait for whoever may read them: for steps, and layer by layer."""

from __future__ import annotations

import threading

import pytest
import torch

from flashmla_ops.errors import ArgumentError, OutOfPagesError
from flashmla_ops.kv_cache import KVPool, Sequence, core

LAYERS = 3


def pool_of(n_pages: int = 4) -> KVPool:
    return KVPool(LAYERS, n_pages=n_pages, page_size=2, d=1, dtype=torch.float32, poison=True)


def rows_of(pool: KVPool, pages: list[int], layer: int) -> torch.Tensor:
    return pool.cache(layer)[pages].flatten()


def written(pool: KVPool, tokens: int, value: float) -> Sequence:
    sequence = pool.open()
    with pool.step([sequence], tokens) as step:
        for layer in range(LAYERS):
            pool.cache(layer).flatten()[step.slot_mapping] = value
    return sequence


def test_a_release_waits_for_every_older_step() -> None:
    pool = pool_of()
    a = written(pool, 4, 1.0)
    pages = a.pages
    first, second = pool.step([a], 0), pool.step([a], 0)
    pool.release(a)
    third = pool.step([], 0)  # opened since: it cannot read them
    assert pool.stats().deferred == 2
    second.close()
    third.close()
    assert pool.stats().deferred == 2
    assert (rows_of(pool, pages, 0) == 1.0).all()
    first.close()
    assert (pool.stats().deferred, pool.stats().free) == (0, 4)
    assert rows_of(pool, pages, 0).isnan().all()


def test_pages_that_wait_are_not_handed_out() -> None:
    pool = pool_of()
    a = written(pool, 6, 1.0)
    with pool.step([a], 0):
        pool.release(a)
        with pytest.raises(OutOfPagesError, match="2 pages are needed and 1 of 4 are free \\(0 evictable, 3 deferred"):
            written(pool, 4, 2.0)
    written(pool, 8, 2.0)


def test_cached_pages_wait_too() -> None:
    pool = pool_of()
    a = pool.open(range(8))
    with pool.step([a], 8):
        pass
    with pool.step([a], 0):
        pool.release(a)
        assert pool.stats().evictable == 4
        with pytest.raises(OutOfPagesError):
            written(pool, 1, 2.0)
        assert pool.open(range(8)).cached == 7
    written(pool, 1, 2.0)


@pytest.mark.parametrize("how", ["release", "truncate", "copy"])
def test_rows_that_an_open_step_reads_are_not_written_by_others(how: str) -> None:
    """A sequence that was cut would write them in a page that it holds alone."""
    pool = pool_of(8)
    a = written(pool, 4, 1.0)
    b = pool.fork(a)
    pages = a.pages
    step = pool.step([a], 0)
    if how == "truncate":
        pool.release(b)
        pool.truncate(a, 3)
        b = a
    else:
        pool.truncate(b, 3)
        if how == "release":
            pool.release(a)
    batch = [b]
    if how == "copy":  # both of them write the page that they share
        pool.truncate(a, 3)
        batch = [a, b]
    with pool.step(batch, 1) as other:
        for layer in range(LAYERS):
            pool.cache(layer).flatten()[other.slot_mapping] = 2.0
    assert rows_of(pool, pages, 0).tolist() == [1.0] * 4
    assert rows_of(pool, b.pages, 0)[:4].tolist() == [1.0, 1.0, 1.0, 2.0]
    step.close()
    for each in batch:
        pool.release(each)
    assert pool.stats().free == 8


def test_the_rows_of_a_finished_layer_are_released_while_later_ones_compute() -> None:
    pool = pool_of()
    a = written(pool, 4, 1.0)
    pages = a.pages
    with pool.trace() as events, pool.step([a], 0) as step:
        pool.release(a)
        step.layer_done(0)
        assert rows_of(pool, pages, 0).isnan().all()
        assert (rows_of(pool, pages, 1) == 1.0).all()
        step.layer_done(1)
    happened = [(event.what, event.layer, set(event.pages)) for event in events]
    assert happened[:5] == [
        ("open", -1, set()),
        ("layer done", 0, set()),
        ("rows released", 0, set(pages)),
        ("layer done", 1, set()),
        ("rows released", 1, set(pages)),
    ]


def test_layers_are_done_in_their_order() -> None:
    pool = pool_of()
    with pool.step([written(pool, 1, 1.0)]) as step:
        step.layer_done(1)
        with pytest.raises(ArgumentError, match="'layer'"):
            step.layer_done(0)
        with pytest.raises(ArgumentError, match="'layer'"):
            step.layer_done(LAYERS)
    with pytest.raises(ArgumentError, match="'step'"):
        step.layer_done(2)


def test_a_step_goes_behind_another_in_its_pages() -> None:
    """The second writes the first one's pages, layer by layer, and neither sees the other's rows."""
    pool = pool_of(5)
    a, b = written(pool, 6, 1.0), written(pool, 1, 5.0)
    tail = pool.fork(b)
    turns = [threading.Event() for _ in range(LAYERS)]
    read, wrote = [], []

    def first(step: object, places: list[int]) -> None:
        for layer in range(LAYERS):
            assert turns[layer].wait(30)
            with step.layer(layer):  # type: ignore[attr-defined]
                read.append(rows_of(pool, places, layer).tolist())
        step.close()  # type: ignore[attr-defined]

    with pool.trace() as events:
        ahead = pool.step([a], 0)
        places = a.pages
        pool.release(a)
        thread = threading.Thread(target=first, args=(ahead, places))
        thread.start()
        with pytest.raises(OutOfPagesError):
            pool.step([b, tail], [3, 3])
        behind = pool.step([b, tail], [3, 3], behind=True)  # with a copy of the page that they share
        for layer in range(LAYERS):
            turns[layer].set()
            with behind.layer(layer):
                rows = pool.cache(layer).flatten()
                assert rows[behind.slot_mapping].isnan().all()  # poisoned, not the first one's
                rows[behind.slot_mapping] = 9.0
                wrote.append([rows_of(pool, each.pages, layer)[:4].tolist() for each in (b, tail)])
        behind.close()
        thread.join()
    assert read == [[1.0] * 6] * LAYERS
    assert wrote == [[[5.0, 9.0, 9.0, 9.0]] * 2] * LAYERS
    order = [(event.step, event.what, event.layer) for event in events]
    for layer in range(LAYERS):
        assert order.index((ahead.number, "layer done", layer)) < order.index((behind.number, "layer begins", layer))
    # The second step was in its first layer while the first had not begun its last.
    assert order.index((behind.number, "layer begins", 0)) < order.index((ahead.number, "layer begins", LAYERS - 1))
    assert pool.stats().deferred == 0


def test_a_step_waits_for_no_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "PATIENCE", 0.001)
    pool = pool_of()
    a, b = written(pool, 8, 1.0), pool.open()
    held = [pool.step([a], 0)]
    pool.release(a)
    behind = pool.step([b], 8, behind=True)
    waits = threading.Thread(target=lambda: behind.layer(0).__enter__())
    waits.start()
    waits.join(0.05)
    assert waits.is_alive()
    held.clear()
    waits.join(30)
    assert not waits.is_alive()


class Fence:
    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def test_a_step_of_a_device_is_closed_by_its_fence() -> None:
    pool = pool_of()
    a = written(pool, 8, 1.0)
    fences: list[Fence] = []
    pool._fence = lambda: fences.append(Fence()) or fences[-1]
    for _ in range(2):
        with pool.step([a], 0):
            pass
    pool.release(a)
    assert pool.stats().deferred == 4
    fences[1].done = True
    assert pool.stats().deferred == 4
    with pytest.raises(OutOfPagesError):
        pool.step([pool.open()])
    fences[0].done = True
    assert pool.stats().free == 4
