"""KVPool: what it holds, hands out and refuses, and what it says of itself."""

from __future__ import annotations

import copy
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmla_ops.errors import ArgumentError, OutOfPagesError, PoolBusyError
from flashmla_ops.formats import QUANTIZED
from flashmla_ops.kv_cache import KVPool, PoolStats, Sequence, core, storage
from flashmla_ops.kv_cache.native_pages import NativePages
from flashmla_ops.kv_cache.pages import new_pages
from flashmla_ops.kv_cache.python_pages import PythonPages
from tests.kv_cache.model import Broken


def small(**options: Any) -> KVPool:
    return KVPool(**{"n_pages": 8, "page_size": 4, "d": 2, "dtype": torch.float32} | options)


def filled(pool: KVPool, tokens: int, value: float = 1.0) -> Sequence:
    """A sequence of so many tokens whose rows all have this value."""
    sequence = pool.open()
    with pool.step([sequence], tokens) as step:
        for layer in range(len(pool.storage.layers)):
            pool.cache(layer).flatten(0, 1)[step.slot_mapping] = value
    return sequence


def rows_of(pool: KVPool, sequence: Sequence, layer: int = 0) -> torch.Tensor:
    pages = -(-sequence.length // pool.page_size)
    return pool.cache(layer)[sequence.pages[:pages]].flatten(0, 1)[: sequence.length]


@pytest.mark.parametrize("format", QUANTIZED)
def test_memory_holds_as_many_pages_as_fit(format: str) -> None:
    bytes_a_page = 3 * 64 * QUANTIZED[format].bytes
    pool = KVPool(3, format=format, memory="4MiB")
    assert pool.n_pages == (4 << 20) // bytes_a_page
    assert pool.cache(2).shape == (pool.n_pages, 64, 1, QUANTIZED[format].bytes)
    stats = pool.stats()
    assert (stats.bytes, stats.token_bytes) == (pool.n_pages * bytes_a_page, {format: 3 * QUANTIZED[format].bytes})


def test_two_tensors_a_layer() -> None:
    pool = KVPool(2, n_pages=5, page_size=8, d=(12, 4), dtype=torch.bfloat16, h_kv=3)
    assert [cache.shape for cache in pool.caches(1)] == [(5, 8, 3, 12), (5, 8, 3, 4)]
    assert pool.stats().token_bytes == {"native": 2 * 3 * 16 * 2}


def test_layers_of_their_own_formats_and_page_sizes() -> None:
    pool = KVPool(2, n_pages=6, page_size=[16, 4], format=["fp8_v32", "native"], d=[None, (8, 8)])
    assert pool.page_size == 16
    assert (pool.cache(0).shape, pool.cache(1).shape) == ((6, 16, 1, 656), (24, 4, 1, 8))
    a, b = pool.open(), pool.open()
    with pool.step([a, b], [17, 5]) as step:
        slots, length = step.slot_mapping.tolist(), step.cache_seqlens.tolist()
        for parts, size in ((1, 16), (4, 4)):
            table = step.block_tables[parts]
            places = [table[i, t // size] * size + t % size for i in range(2) for t in range(length[i])]
            assert slots == places


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"n_pages": 0}, "n_pages"),
        ({"n_pages": None}, "n_pages"),
        ({"memory": "1GiB"}, "n_pages"),
        ({"n_pages": None, "memory": "1 potato"}, "memory"),
        ({"n_pages": None, "memory": 31}, "memory"),
        ({"page_size": 0}, "page_size"),
        ({"layers": -1}, "layers"),
        ({"h_kv": 0}, "h_kv"),
        ({"d": None}, "d"),
        ({"d": (1, 2, 3)}, "d"),
        ({"layers": 2, "page_size": [4]}, "page_size"),
        ({"format": "fp9"}, "format"),
        ({"format": "fp8_v32"}, "d"),
        ({"format": "fp8_v32", "d": 576}, "dtype"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_length": -1}, "max_length"),
    ],
)
def test_bad_arguments(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        small(**options)


def test_tensors_of_a_step_are_on_the_cpu_whatever_torchs_default_device_is() -> None:
    with torch.device("meta"):
        pool = KVPool(layers=0, n_pages=8, page_size=4)
        with pool.step([pool.open()], 5) as step:
            tensors = (step.block_table, step.cache_seqlens, step.slot_mapping)
            assert [tensor.device.type for tensor in tensors] == ["cpu"] * 3
            assert step.cache_seqlens.tolist() == [5]


def test_tensors_stay_where_they_are() -> None:
    pool = small(n_pages=64)
    sequences = [pool.open(), pool.open()]
    seen = set()
    for _ in range(50):
        with pool.step(sequences) as step:
            seen.add((id(step.block_table), id(step.cache_seqlens), id(step.slot_mapping)))
            with pool.step([filled(pool, 1)]) as other:  # another step that is open has tensors of its own
                assert other.block_table.data_ptr() != step.block_table.data_ptr()
    assert len(seen) == 1


def test_a_batch_larger_than_foreseen() -> None:
    pool = small(n_pages=300, max_batch=2)
    sequences = [pool.open() for _ in range(260)]
    with pool.step(sequences) as step:
        assert sorted(step.slot_mapping.tolist()) == list(range(0, 1040, 4))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda pool, a: pool.step([a, a]), "sequences"),
        (lambda pool, a: pool.step([small().open()]), "sequences"),
        (lambda pool, a: pool.step([a], -1), "new_tokens"),
        (lambda pool, a: pool.step([a], [1, 2]), "new_tokens"),
        (lambda pool, a: pool.step([a], 6), "new_tokens"),
        (lambda pool, a: pool.truncate(a, 4), "length"),
        (lambda pool, a: pool.truncate(a, -1), "length"),
        (lambda pool, a: pool.fork(small().open()), "sequence"),
        (lambda pool, a: pool.swap_in(a), "sequence"),
        (lambda pool, a: pool.can_fit([1, 1], [a]), "new_tokens"),
        (lambda pool, a: pool.open(torch.zeros(1, 3)), "tokens"),
        (lambda pool, a: pool.watch(0.5, 0.1, print), "low"),
        (lambda pool, a: pool.plot("pages.txt"), "path"),
        (lambda pool, a: pool.add_layer(3, page_size=3), "page_size"),
    ],
)
def test_refusals_change_nothing(call: Any, argument: str) -> None:
    pool = small(max_length=8)
    a = filled(pool, 3)
    before = pool.snapshot()
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        call(pool, a)
    assert pool.snapshot() == before


def test_a_released_sequence_is_known_no_more() -> None:
    pool = small()
    a = filled(pool, 3)
    pool.release(a)
    filled(pool, 1)  # in its place
    for call in (
        pool.release,
        pool.fork,
        pool.swap_out,
        lambda a: pool.step([a]),
        lambda a: a.length,
        lambda a: a.pages,
    ):
        with pytest.raises(ArgumentError, match="sequence"):
            call(a)


def test_out_of_pages_says_all() -> None:
    pool = small(n_pages=10)
    prompt = pool.open(range(9))
    with pool.step([prompt], 9):
        pass
    pool.release(prompt)  # two full pages are known
    held = filled(pool, 5)
    pool.reserve(held, 9)
    waits = filled(pool, 1)
    with pool.step([held], 0):
        pool.release(waits)
        with pytest.raises(OutOfPagesError, match="9 pages are needed and 3 of 10 are free") as caught:
            pool.step([pool.open()], 33)
    error = caught.value
    assert (error.needed, error.free, error.evictable, error.deferred, error.reserved) == (9, 3, 2, 1, 2)
    assert isinstance(error, MemoryError)
    assert pool.stats().used == 4


def test_can_fit() -> None:
    pool = small()
    a = filled(pool, 5)
    assert pool.can_fit([4, 20])
    assert not pool.can_fit([4, 21])
    assert not pool.can_fit([4, 20], headroom=1)
    assert pool.can_fit(27, [a])
    assert not pool.can_fit(28, [a])
    b = pool.fork(a)
    assert pool.can_fit([13, 11], [a, b])
    assert not pool.can_fit([16, 12], [a, b])


def test_reserved_pages_cannot_be_lacked() -> None:
    pool = small()
    a, b = filled(pool, 1), pool.open()
    pool.reserve(a, 15)
    others = filled(pool, 16)
    with pytest.raises(OutOfPagesError):
        pool.step([b])
    with pool.step([a], 15):
        pass
    assert (pool.stats().free, others.length) == (0, 16)


@pytest.mark.parametrize("books", [NativePages, PythonPages])
def test_a_fork_has_no_part_in_reserved_pages(
    books: type[NativePages] | type[PythonPages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "new_pages", books)
    pool = small()
    a = filled(pool, 4)
    pool.reserve(a, 4)
    b = pool.fork(a)
    with pool.step([a, b], 4) as step:
        assert len(set(step.slot_mapping.tolist())) == 8
    assert a.pages[0] == b.pages[0]
    assert pool.stats().used == 3


def test_watermarks_have_a_gap() -> None:
    pool, told = small(n_pages=10), list[int]()
    pool.watch(0.3, 0.6, lambda stats: told.append(stats.free))
    held = [filled(pool, 4) for _ in range(7)]
    assert told == []
    held.append(filled(pool, 4))
    assert told == [2]
    for _ in range(4):
        pool.release(held.pop())
    assert told == [2, 6]


def test_a_step_that_raises_leaves_nothing() -> None:
    pool = small()
    a, b = filled(pool, 3), filled(pool, 4)
    before = pool.stats()
    with pytest.raises(Broken), pool.step([a, b], [7, 9]):
        raise Broken
    assert pool.stats() == PoolStats(**before.as_dict() | {"peak": 7})


def test_a_failed_copy_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = small()
    a = filled(pool, 3)
    b = pool.fork(a)
    monkeypatch.setattr(storage, "copy_pages", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.step([a, b], 3)
    assert (a.length, b.length, pool.stats().open_steps) == (3, 3, 0)
    pool.release(a)
    pool.release(b)
    assert pool.stats().free == 8


@pytest.mark.parametrize("new_tokens", [1.5, [1.5], "1", None])
def test_counts_that_are_none(new_tokens: Any) -> None:
    pool = small()
    a = filled(pool, 3)
    before = pool.snapshot()
    with pytest.raises(TypeError):
        pool.step([a], new_tokens)
    assert pool.snapshot() == before


def test_a_prefix_cache_that_fails_leaves_no_step_open(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = small()
    step = pool.step([pool.open(range(9))], 9)
    monkeypatch.setattr(pool.prefixes, "add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step.close()
    assert pool.stats().open_steps == 0


def test_lost_steps_and_sequences_are_taken_back() -> None:
    pool = small()
    step = pool.step([filled(pool, 9)])
    assert pool.stats().used == 3
    del step
    assert pool.stats().free == 8
    assert pool.stats().open_steps == 0


@pytest.mark.parametrize("format", ["native", *QUANTIZED])
def test_whoever_reads_a_page_too_late_is_found_out(format: str) -> None:
    """A step that says it has read everything, and has not."""
    row = {} if format != "native" else {"d": 576, "dtype": torch.bfloat16}
    pool = KVPool(n_pages=2, page_size=4, format=format, poison=True, **row)
    elements = pool.storage.layers[0].widths[0]
    sequence = pool.open()
    step = pool.step([sequence], 5)
    rows = torch.randn(5, 1, elements, dtype=torch.bfloat16)
    torch.ops.flashmla.append_(pool.cache(), rows, step.slot_mapping, row_format=format)

    def read() -> torch.Tensor:
        cache = pool.cache()
        if format != "native":
            parts = torch.cat(QUANTIZED[format].parts(cache), dim=-1)
            cache = QUANTIZED[format].dequantize(parts)
        return cache[sequence_pages].flatten(0, 1)[:5].float()

    sequence_pages = sequence.pages
    pool.release(sequence)
    assert not read().isnan().any()  # the step is open
    step.close()
    assert read().isnan().any(dim=-1).all()


def test_copies_go_their_own_ways() -> None:
    pool = small()
    a = filled(pool, 3)
    other, same = copy.deepcopy((pool, a))
    with pool.step([a]) as step, pytest.raises(PoolBusyError):
        copy.deepcopy(pool)
    assert step.is_open is False
    other.release(same)
    assert (a.length, pool.stats().used, other.stats().used) == (4, 1, 0)
    filled(other, 3, value=2.0)
    assert rows_of(pool, a)[:3].unique().tolist() == [1.0]


def test_a_page_that_moves_is_not_what_was_cached_where_it_goes() -> None:
    """Page 0 was cached as [1, 1], and handed out again since; then page 1, cached as [0, 0], moves there."""
    pool = KVPool(n_pages=2, page_size=2, d=1, dtype=torch.float32)

    def written(tokens: list[int]) -> Sequence:
        sequence = pool.open(tokens)
        pool.step([sequence], sequence.pending).close()
        return sequence

    pool.release(written([1, 1]))
    sequence = written([0, 0, 0])
    pool.truncate(sequence, 2)
    assert sequence.pages == [1]
    pool.compact_()
    assert sequence.pages == [0]
    assert pool.open([1, 1, 1]).length == 0
    assert pool.open([0, 0, 0]).length == 2


def test_compaction_leaves_used_pages_in_front() -> None:
    pool = small(n_pages=12)
    sequences = [filled(pool, 4, value=float(i)) for i in range(10)]
    shared = pool.fork(sequences[9])
    for i in (0, 2, 3, 6):
        pool.release(sequences[i])
    with pool.step([sequences[1]], 0), pytest.raises(PoolBusyError):
        pool.compact_()
    assert pool.stats().external_fragmentation > 0
    assert pool.compact_() == 3
    assert pool.stats().external_fragmentation == 0
    assert pool.compact_() == 0
    assert shared.pages == sequences[9].pages
    for i in (1, 4, 5, 7, 8, 9):
        assert rows_of(pool, sequences[i]).unique().tolist() == [float(i)]
    with pool.step([sequences[9]], 0) as step:
        assert step.block_table[0, 0] == sequences[9].pages[0]


def test_stats_and_words() -> None:
    pool = KVPool(layers=27, format="fp8_v32", d=576, n_pages=100)
    a = pool.open()
    with pool.step([a], 96):
        pass
    stats = pool.stats()
    assert (stats.used, stats.tokens, stats.utilisation, stats.peak) == (2, 96, 0.75, 2)
    assert stats.internal_fragmentation == 0.25
    words = pool.explain()
    assert words.startswith("108.1 MiB hold 100 pages of 64 tokens x 27 layers: 6,400 tokens.\n")
    assert "17,712 bytes as fp8_v32" in words


def test_snapshot_and_maps(tmp_path: Path) -> None:
    pool = small(n_pages=200)
    a = filled(pool, 9)
    pool.fork(a)
    b = pool.fork(a)
    found = json.loads(pool.snapshot())
    assert found["pages"][:4] == ["shared"] * 3 + ["free"]
    assert {tuple(each["pages"]) for each in found["sequences"]} == {tuple(b.pages)}
    pool.plot(tmp_path / "pages.svg")
    assert "3 shared" in (tmp_path / "pages.svg").read_text()
    pytest.importorskip("matplotlib")
    pool.plot(str(tmp_path / "pages.png"))
    assert (tmp_path / "pages.png").read_bytes().startswith(b"\x89PNG")


def test_preallocated_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(storage, "CHUNK", 1 << 20)
    pool = KVPool(2, n_pages=1024, d=576, dtype=torch.bfloat16)
    pool.storage.touch(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (pool.storage.n_bytes, pool.storage.n_bytes)
    assert len(seen) == 2 * -(-pool.storage.n_bytes // 2 // (1 << 20))
    assert not KVPool(n_pages=64, d=576, preallocate=True).cache().any()


def test_long_preallocation_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(storage, "CHUNK", 1 << 16)
    for seconds, shown in ((100.0, False), (0.0, True)):
        monkeypatch.setattr(storage, "SILENT_SECONDS", seconds)
        KVPool(n_pages=64, d=576, preallocate=True)
        assert ("KV pool: 100%" in capsys.readouterr().err) == shown


def test_without_a_compiler_the_books_are_kept_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: NativePages, *_: int) -> None:
        raise OSError("no library")

    monkeypatch.setattr(NativePages, "__init__", fails)
    with pytest.warns(UserWarning, match="kept in Python, slowly: no library"):
        assert isinstance(new_pages(2, 2), PythonPages)


@pytest.mark.parametrize("books", [NativePages, PythonPages])
def test_pages_by_themselves(books: type[NativePages] | type[PythonPages]) -> None:
    pages = books(4, 1)
    first, second = pages.allocate(2)
    pages.retain([first])
    with pytest.raises(ArgumentError):
        pages.release([second, second])
    with pytest.raises(ArgumentError):
        pages.release_one(3)
    with pytest.raises(ArgumentError):
        pages.retain([first, 3])
    pages.release([first, second])
    assert (pages.references(first), pages.references(second), pages.n_free) == (1, 0, 3)
    assert pages.allocate_one() == second  # freed last, warm
    with pytest.raises(RuntimeError, match="3 pages are needed"):
        pages.allocate(3)
    assert pages.n_free == 2


def test_the_child_of_a_fork_has_a_pool_of_its_own() -> None:
    pool = small()
    a = filled(pool, 3)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._lock:
            held.set()
            go.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        try:
            pool.release(a)
            os._exit(0 if pool.stats().free == 8 else 1)
        finally:
            os._exit(2)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.stats().used == 1


def test_many_threads() -> None:
    """32 threads of 50 turns with 50 sequences: no page is two sequences' unless they share it, and none is lost."""
    pool = KVPool(n_pages=1 << 18, page_size=4, d=1, dtype=torch.int64, max_length=64)
    rows = pool.cache().flatten()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for turn in range(50):
                mine = [pool.open([seed, *range(draw.randrange(1, 9))]) for _ in range(50)]
                with pool.step(mine, draw.randrange(1, 4)) as step:
                    rows[step.slot_mapping] = tag = seed * 1000 + turn
                    assert rows[step.slot_mapping].eq(tag).all()
                for each in mine if draw.random() < 0.9 else ():
                    pool.release(each)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    pool.evict()
    assert pool.stats().free == 1 << 18
