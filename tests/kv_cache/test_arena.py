"""An arena serves torch's allocations where it should, and gives memory back when nothing can reach it."""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashmla_ops import capability
from flashmla_ops.cpu import allocator
from flashmla_ops.errors import ArenaFullError, ArenaUnavailableError, ArgumentError, FlashMLAError
from flashmla_ops.kv_cache import Arena

pytestmark = pytest.mark.usefixtures("cxx")
MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena from which everything comes back."""
    arena = Arena(16 * MIB)
    yield arena
    if arena.stats().blocks:
        gc.collect()
    assert (arena.stats().blocks, arena.stats().deferred_blocks) == (0, 0)


def mib(count: float) -> torch.Tensor:
    return torch.empty(int(count * MIB), dtype=torch.uint8)


def test_what_torch_allocates_in_the_context_lies_in_the_arena(arena: Arena) -> None:
    before = torch.randn(64, 64)
    with arena.allocator():
        made = [torch.empty(3), torch.randn(64, 64) @ before, torch.arange(7).sum(), torch.zeros(1000)]
    assert all(arena.owns(tensor) for tensor in made)
    assert not arena.owns(before)
    assert not arena.owns(torch.empty(3))
    torch.testing.assert_close(made[3], torch.zeros(1000))


@pytest.mark.parametrize("n_bytes", [1, 64, 65, 512, 513, 1024, 8192, 8193, 100_000, MIB])
def test_alignment_by_size(arena: Arena, n_bytes: int) -> None:
    with arena.allocator():
        tensors = [torch.empty(n_bytes, dtype=torch.uint8) for _ in range(5)]
    alignment = 64 if n_bytes <= 512 else 128
    assert all(arena.owns(tensor) and tensor.data_ptr() % alignment == 0 for tensor in tensors)
    assert n_bytes * 5 <= arena.stats().in_use <= max(1.25 * n_bytes, n_bytes + 64) * 5 + 5 * 1024


def test_contexts_nest(arena: Arena) -> None:
    inner = Arena(MIB)
    with arena.allocator():
        first = torch.empty(10)
        with inner.allocator():
            second = torch.empty(10)
        third = torch.empty(10)
    assert arena.owns(first)
    assert inner.owns(second)
    assert arena.owns(third)


def test_contexts_may_be_left_in_any_order(arena: Arena) -> None:
    inner = Arena(MIB)
    outer_context, inner_context = arena.allocator(), inner.allocator()
    outer_context.__enter__()
    inner_context.__enter__()
    outer_context.__exit__(None, None, None)
    with_inner = torch.empty(10)
    inner_context.__exit__(None, None, None)
    assert inner.owns(with_inner)
    assert not any(each.owns(torch.empty(10)) for each in (arena, inner))


def test_an_exception_leaves_the_context(arena: Arena) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"), arena.allocator():
        torch.ones(10, 10) @ torch.ones(3, 3)
    assert not arena.owns(torch.empty(10))


def test_best_fit_and_neighbours_that_become_one(arena: Arena) -> None:
    with arena.allocator():
        blocks = [mib(size) for size in (1, 2, 1, 3, 1, 4)]
        addresses = [block.data_ptr() for block in blocks]
        blocks[1] = blocks[3] = None  # holes of 2 and 3 MiB
        assert mib(1.5).data_ptr() == addresses[1]
        assert mib(2.5).data_ptr() == addresses[3]
        blocks[2] = None  # and one of 6 between the blocks
        assert arena.stats().free_blocks == 2
        assert mib(6).data_ptr() == addresses[1]
    del blocks
    assert arena.stats().largest_free == 16 * MIB


def test_a_full_arena_lets_torch_serve_and_counts(arena: Arena) -> None:
    with arena.allocator():
        held, elsewhere = mib(10), mib(10)
    assert arena.owns(held)
    assert not arena.owns(elsewhere)
    assert (arena.stats().fallthroughs, arena.stats().fallthrough_bytes) == (1, 10 * MIB)
    assert "1 requests of 10 MiB" in arena.explain()


def test_a_strict_one_raises(arena: Arena) -> None:
    with arena.allocator(strict=True):
        held = mib(10)
        with pytest.raises(torch.OutOfMemoryError, match=r"a free block of 10485760 bytes, got one of 6291456"):
            mib(10)
        with arena.allocator():
            assert not arena.owns(mib(10))
    with pytest.raises(ArenaFullError, match="in use 10485760") as caught, arena.allocator(strict=True):
        mib(10)
    assert isinstance(caught.value, FlashMLAError)
    assert isinstance(caught.value, MemoryError)
    assert arena.owns(held)


def test_small_blocks_fit_where_no_span_does() -> None:
    arena = Arena("64KiB")
    with arena.allocator(strict=True):
        held = [torch.empty(60 * 1024, dtype=torch.uint8), torch.empty(10), torch.empty(300), torch.empty(10)]
    assert all(map(arena.owns, held))


def test_small_blocks_are_reused_wherever_they_were() -> None:
    arena = Arena("64KiB")
    with arena.allocator(strict=True):
        held = [torch.empty(16) for _ in range(1024)]
        assert arena.stats().free == 0
        del held[:10], held[500:510], held[-10:]
        held += [torch.empty(16) for _ in range(30)]
    assert len({block.data_ptr() for block in held}) == 1024


def test_it_grows_up_to_its_limit() -> None:
    arena = Arena("1MiB", limit="8MiB")
    with arena.allocator():
        held = [mib(0.5) for _ in range(6)]
        large = mib(3.25)
        assert arena.stats().size <= 8 * MIB
        assert all(map(arena.owns, [*held, large]))
        assert "grows to 8 MiB" in arena.explain()
        assert not arena.owns(mib(6))
        assert arena.stats().size < 8 * MIB
        assert arena.owns(mib(1.5))
    assert arena.stats().limit == 8 * MIB
    large.fill_(1)


def test_a_tensor_outlives_context_and_arena() -> None:
    arena = Arena(4 * MIB)
    with arena.allocator():
        kept = torch.arange(100_000)
    view = kept[10:20]
    del arena, kept
    gc.collect()
    others = [Arena(4 * MIB) for _ in range(3)]
    for other in others:
        with other.allocator():
            torch.full((500_000,), 7)
    assert view.tolist() == list(range(10, 20))


def test_memory_goes_back_with_the_last_block() -> None:
    def mapped(address: int) -> bool:
        ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)

    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    arena = Arena(4 * MIB)
    with arena.allocator():
        kept = torch.empty(100)
    address = kept.data_ptr()
    del arena
    gc.collect()
    assert mapped(address)
    assert allocator.library().flashmla_arena_of(address)
    del kept
    assert not mapped(address)
    assert not allocator.library().flashmla_arena_of(address)


def test_zeros_write_only_what_was_handed_out_before() -> None:
    arena = Arena(64 * MIB, poison=True)
    first = arena.zeros(10 * MIB, dtype=torch.uint8)
    assert not first.any()
    first.fill_(1)
    del first
    second = arena.zeros(5, 4, MIB, dtype=torch.uint8)  # half of it over the first
    assert arena.owns(second)
    assert second.shape == (5, 4, MIB)
    assert not second.any()
    assert arena.zeros(0).numel() == 0
    small = arena.zeros(3)
    assert small.tolist() == [0, 0, 0]
    assert small.dtype == torch.get_default_dtype()
    with pytest.raises(ArenaFullError):
        arena.zeros(100 * MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_poison_is_nan(dtype: torch.dtype) -> None:
    arena = Arena(MIB, poison=True)
    with arena.allocator():
        block = torch.ones(1000, dtype=dtype)
        address = block.data_ptr()
        del block
        again = torch.empty(1000, dtype=dtype)
    assert again.data_ptr() == address
    assert again.float().isnan().all()


class TestEpochs:
    def test_nothing_freed_in_an_epoch_is_reused_in_it(self, arena: Arena) -> None:
        with arena.allocator():
            with arena.epoch():
                address = mib(1).data_ptr()
                assert mib(1).data_ptr() != address
                assert (arena.stats().deferred, arena.stats().deferred_blocks) == (2 * MIB, 2)
                assert "2 MiB wait for 1 open epochs" in arena.explain()
            assert arena.stats().deferred == 0
            assert mib(1).data_ptr() == address

    def test_older_epochs_hold_and_newer_ones_do_not(self, arena: Arena) -> None:
        first, second = arena.epoch(), arena.epoch()
        with arena.allocator():
            first.__enter__()
            block = mib(1)
            del block
            second.__enter__()
            later = mib(2)
            del later
            first.__exit__(None, None, None)
            assert arena.stats().deferred == 2 * MIB  # freed while the second was open
            second.__exit__(None, None, None)
        assert arena.stats().deferred == 0

    def test_an_exception_closes_it(self, arena: Arena) -> None:
        with pytest.raises(RuntimeError, match="cannot be multiplied"), arena.epoch(), arena.allocator():
            torch.ones(10, 10) @ torch.ones(3, 3)
        assert (arena.stats().epochs, arena.stats().deferred) == (0, 0)

    def test_an_arena_lives_as_long_as_its_epochs(self) -> None:
        arena = Arena(MIB)
        epoch = arena.epoch()
        epoch.__enter__()
        with arena.allocator():
            torch.empty(10)
        del arena
        gc.collect()
        epoch.__exit__(None, None, None)


ENDS = """
import threading, torch
from flashmla_ops.kv_cache import Arena
arena = Arena("16MiB")
context, epoch = arena.allocator(all_threads=True), arena.epoch()
context.__enter__(), epoch.__enter__()
kept, freed, packed = torch.randn(1000), torch.randn(1000), torch.randn(3, 3).to_mkldnn()
del freed
class Late:
    def __del__(self):
        torch.empty(10)
late, of_a_thread = Late(), []
# A daemon thread would not do: torch itself aborts where one allocates while Python ends.
thread = threading.Thread(target=lambda: of_a_thread.extend(torch.empty(100) for _ in range(1000)))
thread.start(), thread.join()
del of_a_thread[::2]
"""


def test_a_process_may_end_with_everything_alive() -> None:
    subprocess.run(
        [sys.executable, "-c", ENDS], check=True, timeout=300, env=os.environ | {"FLASHMLA_CPU": "reference"}
    )


@pytest.mark.parametrize("preallocate", [False, True])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_memory_however_it_comes(preallocate: bool, huge_pages: bool) -> None:
    arena = Arena(5_000_000, preallocate=preallocate, huge_pages=huge_pages)
    with arena.allocator(strict=True):
        tensor = torch.full((1_200_000,), 3, dtype=torch.int32)
    assert tensor.sum() == 3_600_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "argument 'size'"),
        ({"size": "many"}, "argument 'size': expected a number of bytes"),
        ({"size": -5}, "argument 'size'"),
        ({"size": 1.5}, "argument 'size'"),
        ({"size": True}, "argument 'size'"),
        ({"size": "1MiB", "limit": "1KiB"}, "argument 'limit': expected at least the size"),
        ({"size": "5TiB"}, "argument 'size': expected at most 4 TiB"),
    ],
)
def test_sizes_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Arena(**arguments)


@pytest.mark.parametrize(
    ("size", "n_bytes"), [("1MiB", MIB), (" 1.5 GiB ", 3 << 29), ("100MB", 100_007_936), (MIB, MIB), ("65536", 65536)]
)
def test_sizes_as_people_write_them(size: int | str, n_bytes: int) -> None:
    assert Arena(size).stats().size == n_bytes


def test_zeros_are_on_the_cpu_whatever_torchs_default_device_is(arena: Arena) -> None:
    with arena.allocator():
        torch.full((1000,), 7.0)
    with torch.device("meta"):
        zeros = arena.zeros(1000)
    assert arena.owns(zeros)
    assert not zeros.any()


def test_an_arena_is_no_value(arena: Arena) -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="memory of this process"):
            duplicate(arena)


def test_without_a_compiler_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))
    monkeypatch.setattr(allocator, "library", functools.cache(allocator.library.__wrapped__))
    with pytest.raises(ArenaUnavailableError, match="CXX=no-such-compiler names nothing that runs"):
        Arena(MIB)
    assert "arenas cannot serve torch's CPU tensors: CXX=no-such-compiler" in capability.explain()


def test_explain_says_that_arenas_serve(arena: Arena) -> None:
    assert "arenas serve torch's CPU tensors in this process" in capability.explain()
