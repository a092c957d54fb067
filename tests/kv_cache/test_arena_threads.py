"""Torch's threads and processes on memory of an arena: parallel regions, Python's threads, workers, forks."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flashmla_ops.cpu import allocator
from flashmla_ops.kv_cache import Arena
from tests.support.threads import threads

pytestmark = pytest.mark.usefixtures("cxx")


class TestThreads:
    def blocks(self, probe: ctypes.CDLL, n_bytes: int = 100) -> list[int]:
        blocks = (ctypes.c_void_p * 64)()
        return blocks[: probe.allocate_in_region(n_bytes, blocks)]

    def owned(self, arena: Arena, probe: ctypes.CDLL, blocks: list[int]) -> list[bool]:
        owned = [allocator.library().flashmla_arena_of(block) == arena._address for block in blocks]
        for block in blocks:
            probe.raw_deallocate(block)
        return owned

    @pytest.fixture(autouse=True)
    def _threads(self) -> Iterator[None]:
        with threads(4):
            yield

    def test_parallel_regions(self, arena: Arena, probe: ctypes.CDLL) -> None:
        for n_threads in (4, 2, 6, 1, 3):
            torch.set_num_threads(n_threads)
            with arena.allocator():
                inside = self.blocks(probe)
            outside = self.blocks(probe)
            assert self.owned(arena, probe, inside) == [True] * n_threads
            assert self.owned(arena, probe, outside) == [False] * n_threads

    def test_parallel_regions_of_several_threads_keep_apart(self, arena: Arena, probe: ctypes.CDLL) -> None:
        def work(served: bool) -> set[bool]:
            torch.set_num_threads(2)
            found = []
            for _ in range(20):
                if served:
                    with arena.allocator():
                        torch.empty(1 << 15)  # something large
                        blocks = self.blocks(probe)
                else:
                    blocks = self.blocks(probe)
                found += self.owned(arena, probe, blocks)
            return set(found)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, [True, False, True, False])) == [{True}, {False}, {True}, {False}]

    def test_more_threads_within_a_context(self, arena: Arena, probe: ctypes.CDLL) -> None:
        with arena.allocator():
            torch.set_num_threads(7)
            torch.empty(1 << 15)
            blocks = self.blocks(probe)
        assert self.owned(arena, probe, blocks) == [True] * 7

    @pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc")
    def test_a_thread_with_small_tensors_starts_no_others(self, arena: Arena) -> None:
        def work() -> int:
            torch.set_num_threads(4)
            before = len(os.listdir("/proc/self/task"))
            with arena.allocator():
                torch.empty(10)
            return len(os.listdir("/proc/self/task")) - before

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work).result() == 0

    def test_torchs_thread_pool(self, arena: Arena, probe: ctypes.CDLL) -> None:
        with arena.allocator():
            inside = probe.allocate_in_pool(100)
        outside = probe.allocate_in_pool(100)
        assert self.owned(arena, probe, [inside, outside]) == [True, False]

    @pytest.mark.parametrize("all_threads", [True, False])
    def test_a_thread_that_works_for_nobody(self, arena: Arena, probe: ctypes.CDLL, all_threads: bool) -> None:
        inner = Arena("1MiB")
        with arena.allocator(all_threads=all_threads), inner.allocator():
            inside, here = probe.allocate_in_thread(100), probe.raw_allocate(100)
        outside = probe.allocate_in_thread(100)
        assert self.owned(arena, probe, [inside, here, outside]) == [all_threads, False, False]

    def test_python_threads_enter_contexts_of_their_own(self, arena: Arena) -> None:
        def make(_: int) -> tuple[Tensor, Tensor]:
            outside = torch.empty(10)
            with arena.allocator():
                return outside, torch.empty(10)

        with arena.allocator(), ThreadPoolExecutor(4) as pool:
            made = list(pool.map(make, range(20)))
        assert not any(arena.owns(outside) for outside, _ in made)
        assert all(arena.owns(inside) for _, inside in made)

    def test_a_context_that_another_thread_leaves(self, arena: Arena) -> None:
        context = arena.allocator()
        context.__enter__()
        thread = threading.Thread(target=context.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        assert not arena.owns(torch.empty(10))

    def test_stress(self) -> None:
        arena = Arena("64MiB", poison=True)
        failures: list[str] = []

        def work(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            held: list[tuple[Tensor, int]] = []
            for round_ in range(50):
                with arena.allocator():
                    for _ in range(50):
                        n = int(torch.randint(1, 5000, (), generator=generator))
                        held.append((torch.full((n,), seed, dtype=torch.int16), n))
                with arena.epoch():
                    kept, held = held[::3], []
                for tensor, n in kept:
                    if not bool((tensor == seed).all()) or tensor.numel() != n:
                        failures.append(f"thread {seed}, round {round_}")
                held = kept[:20]

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(work, range(32)))
        gc.collect()
        stats = arena.stats()
        assert failures == []
        assert (stats.blocks, stats.in_use, stats.deferred, stats.epochs) == (0, 0, 0, 0)


class Squares(Dataset[Tensor]):
    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        x = torch.full((100,), float(index))
        assert self.arena.owns(x)
        return x.square()


class TestForks:
    def child(self, work: Callable[[], bool]) -> None:
        """Run ``work`` in the child of a fork: it must return true in time."""
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            good = False
            try:
                good = work()
            finally:
                os._exit(0 if good else 1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0

    def test_the_child_works_on_a_copy(self, arena: Arena) -> None:
        with arena.allocator():
            x = torch.arange(10)

            def work() -> bool:
                x.fill_(7)
                y = x + torch.ones(10)
                return arena.owns(y) and y.tolist() == [8.0] * 10 and arena.stats().blocks >= 2

            self.child(work)
            assert x.tolist() == list(range(10))

    def test_the_child_enters_contexts_though_the_parent_has_had_parallel_regions(self, arena: Arena) -> None:
        with threads(4):
            with arena.allocator():
                torch.ones(1 << 20).sum()

            def work() -> bool:
                with arena.allocator():
                    return arena.owns(torch.empty(10))

            self.child(work)

    def test_while_other_threads_allocate(self, arena: Arena) -> None:
        stop = threading.Event()

        def churn() -> None:
            with arena.allocator():
                while not stop.is_set():
                    torch.empty(1000)

        def work() -> bool:
            with arena.allocator():
                return all(arena.owns(torch.empty(n)) for n in range(1, 500))

        others = [threading.Thread(target=churn) for _ in range(3)]
        for thread in others:
            thread.start()
        try:
            for _ in range(20):
                self.child(work)
        finally:
            stop.set()
            for thread in others:
                thread.join()

    def test_epochs_of_threads_that_the_child_lacks(self, arena: Arena) -> None:
        opened, done = threading.Event(), threading.Event()

        def hold() -> None:
            with arena.epoch():
                opened.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        opened.wait()

        def work() -> bool:
            with arena.allocator():
                x = torch.empty(1000)
                del x
            return arena.stats().epochs == 0 and arena.stats().deferred == 0

        try:
            self.child(work)
            assert arena.stats().epochs == 1
        finally:
            done.set()
            thread.join()

    def test_dataloader_workers(self, arena: Arena) -> None:
        loader = DataLoader(Squares(arena), batch_size=5, num_workers=2, multiprocessing_context="fork")
        with arena.allocator():
            batches = list(loader)
        expected = (torch.arange(20.0) ** 2)[:, None].expand(20, 100)
        torch.testing.assert_close(torch.cat(batches), expected)
