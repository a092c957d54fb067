"""Torch's own machinery on memory of an arena: autograd, compiled code, storages, threads, forks, oneDNN."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from flashmla_ops.cpu import allocator
from flashmla_ops.errors import ArenaFullError
from flashmla_ops.kv_cache import Arena
from tests.support.threads import threads

pytestmark = pytest.mark.usefixtures("cxx")


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena from which everything comes back."""
    arena = Arena("64MiB")
    yield arena
    torch._dynamo.reset()
    gc.collect()
    assert (arena.stats().blocks, arena.stats().deferred_blocks) == (0, 0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))


class TestAutograd:
    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("checkpointed", [True, False])
    def test_gradients_are_those_of_torch(self, arena: Arena, backward_inside: bool, checkpointed: bool) -> None:
        net, x = model(), torch.randn(16, 32)

        def loss() -> Tensor:
            y = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
            return y.square().sum()

        loss().backward()
        expected = [parameter.grad.clone() for parameter in net.parameters()]
        net.zero_grad(set_to_none=True)
        with arena.allocator():
            value = loss()
            if backward_inside:
                value.backward()
        if not backward_inside:
            value.backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        assert arena.owns(value)
        assert all(arena.owns(gradient) == backward_inside for gradient in gradients)
        torch.testing.assert_close(gradients, expected)

    def test_autograds_own_threads_are_served(self, arena: Arena) -> None:
        served, seen = [], set()

        class Nested(torch.autograd.Function):
            """Its backward runs another backward, which autograd gives a thread of its own from some depth on."""

            @staticmethod
            def forward(ctx: object, x: Tensor, depth: int) -> Tensor:
                ctx.depth = depth
                return x * 1

            @staticmethod
            def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
                if ctx.depth:
                    with torch.enable_grad():
                        y = torch.ones(5, requires_grad=True)
                        Nested.apply(y, ctx.depth - 1).sum().backward()
                    served.append(arena.owns(y.grad))
                    seen.add(threading.get_ident())
                return gradient * 2, None

        x = torch.ones(5, requires_grad=True)
        with arena.allocator():
            Nested.apply(x, 70).sum().backward()
        assert len(seen) > 1
        assert served == [True] * 70


class TestCompiled:
    def test_inference_and_training(self, arena: Arena) -> None:
        net, x = model(), torch.randn(16, 32)
        compiled = torch.compile(net, fullgraph=True)
        expected = net(x)
        expected.sum().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        net.zero_grad(set_to_none=True)
        with arena.allocator():  # compiled here too
            got = compiled(x)
            got.sum().backward()
        with torch.no_grad():
            with arena.allocator():
                inferred = compiled(x)
            outside = compiled(x)
        assert arena.owns(got)
        assert arena.owns(inferred)
        assert not arena.owns(outside)
        for result in (got, inferred, outside):
            torch.testing.assert_close(result, expected)
        torch.testing.assert_close([parameter.grad for parameter in net.parameters()], gradients)

    def test_many_calls_reuse_the_memory(self, arena: Arena) -> None:
        net, x = torch.compile(model(), dynamic=True), torch.randn(64, 32)
        with torch.no_grad(), arena.allocator(strict=True):
            for step in range(200):
                y = net(x[: step % 60 + 2])
        assert arena.owns(y)
        assert arena.stats().peak < 1 << 20

    def test_a_full_arena_in_compiled_code(self, arena: Arena) -> None:
        net = torch.compile(lambda x: (x @ x.mT).softmax(-1) @ x)
        small, large = torch.randn(64, 16), torch.randn(8192, 16)  # 256 MiB of scores
        with torch.no_grad():
            expected = net(small)
            with pytest.raises(ArenaFullError), arena.allocator(strict=True):
                net(large)
            with arena.allocator(strict=True):
                again = net(small)
        torch.testing.assert_close(again, expected)

    def test_a_context_inside_compiled_code(self, arena: Arena) -> None:
        @torch.compile
        def f(x: Tensor) -> Tensor:
            y = x + 1
            with arena.allocator():
                z = y * 2
            return z - 1

        x = torch.randn(100)
        torch.testing.assert_close(f(x), (x + 1) * 2 - 1)


class TestStorages:
    def test_resize(self, arena: Arena) -> None:
        with arena.allocator():
            grows, moves = torch.arange(10), torch.arange(10)
            grows.resize_(1000)
        moves.resize_(1000)
        assert arena.owns(grows)
        assert not arena.owns(moves)
        assert grows[:10].tolist() == moves[:10].tolist() == list(range(10))

    def test_set(self, arena: Arena) -> None:
        with arena.allocator():
            x = torch.arange(12)
        y = torch.empty(0, dtype=torch.int64).set_(x)
        del x
        assert arena.owns(y)
        y.set_()
        assert arena.stats().blocks == 0

    def test_share_memory(self, arena: Arena) -> None:
        with arena.allocator():
            x = torch.arange(12)
        x.share_memory_()
        assert x.is_shared()
        assert not arena.owns(x)
        assert x.tolist() == list(range(12))

    def test_pin_memory_is_as_without_an_arena(self, arena: Arena) -> None:
        def outcome(x: Tensor) -> bool | str:
            try:
                return x.pin_memory().is_pinned()
            except RuntimeError as error:
                return str(error)

        with arena.allocator():
            x = torch.arange(12)
            inside = outcome(x)
        assert inside == outcome(x) == outcome(torch.arange(12))

    def test_numpy_and_dlpack_keep_the_memory(self, arena: Arena) -> None:
        with arena.allocator():
            array = torch.arange(12).numpy()
            capsule = torch.from_dlpack(torch.arange(12))
        with arena.allocator():
            torch.zeros(12, dtype=torch.int64)
        assert array.tolist() == capsule.tolist() == list(range(12))

    @pytest.mark.parametrize("way", [pickle.dumps, torch.save])
    def test_serialised(self, arena: Arena, way: Callable[..., bytes]) -> None:
        with arena.allocator():
            x = torch.arange(12)
            file = io.BytesIO()
            if way is torch.save:
                torch.save(x, file)
                y = torch.load(io.BytesIO(file.getvalue()))
            else:
                y = pickle.loads(pickle.dumps(x))
        assert torch.equal(x, y)

    def test_copy_on_write(self, arena: Arena) -> None:
        with arena.allocator():
            x = torch.arange(12)
            lazy = torch._lazy_clone(x)
            assert arena.stats().blocks == 1
            lazy += 1
        x -= 1
        assert arena.owns(lazy)
        assert (lazy - x).tolist() == [2] * 12

    def test_views_and_swaps(self, arena: Arena) -> None:
        with arena.allocator():
            x = torch.arange(12)
        plain = torch.zeros(12, dtype=torch.int64)
        x.data, view = plain, x[3:5]
        assert view.tolist() == [3, 4]
        assert x.tolist() == [0] * 12
        assert arena.owns(view)

    def test_sparse_and_quantised_tensors(self, arena: Arena) -> None:
        with arena.allocator():
            sparse = torch.eye(5).to_sparse_csr()
            quantised = torch.quantize_per_tensor(torch.eye(5), 0.5, 0, torch.qint8)
        torch.testing.assert_close(sparse @ torch.ones(5), torch.ones(5))
        assert arena.owns(quantised)
        torch.testing.assert_close(quantised.dequantize(), torch.eye(5))

    def test_the_memory_profiler_sees_the_blocks(self, arena: Arena) -> None:
        with arena.allocator(), torch.profiler.profile(profile_memory=True) as profile:
            x = torch.empty(1 << 20, dtype=torch.uint8)
            del x
        amounts = [event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
        assert (1 << 20) in amounts or any(event.self_cpu_memory_usage >= 1 << 20 for event in profile.events())

    def test_a_profiler_may_start_and_stop_across_the_context(self, arena: Arena) -> None:
        profile = torch.profiler.profile()
        profile.start()
        with arena.allocator():
            torch.empty(10)
            profile.stop()
        other = torch.profiler.profile()
        with arena.allocator():
            other.start()
        other.stop()


class TestRawInterface:
    """``raw_deleter`` is one function for all: it must free what an arena gave, and what torch's own allocator did."""

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("n_bytes", [0, 1, 10_000, 1 << 30])
    def test_contract(self, arena: Arena, probe: ctypes.CDLL, inside: bool, n_bytes: int) -> None:
        if inside:
            with arena.allocator():
                assert probe.keeps_contract(n_bytes)
        assert probe.keeps_contract(n_bytes)

    def test_freed_elsewhere_than_allocated(self, arena: Arena, probe: ctypes.CDLL) -> None:
        plain = probe.raw_allocate(1000)
        with arena.allocator():
            ours = probe.raw_allocate(1000)
            probe.raw_deallocate(plain)
        library = allocator.library()
        assert library.flashmla_arena_of(ours)
        assert not library.flashmla_arena_of(plain)
        probe.raw_deallocate(ours)

    @pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
    def test_onednn_tensors(self, arena: Arena) -> None:
        x = torch.randn(8, 3, 16, 16)
        outside = x.to_mkldnn()
        with arena.allocator():
            inside = x.to_mkldnn()
            assert arena.stats().blocks > 0
            del outside
            summed = (inside + inside).to_dense()
        del inside
        torch.testing.assert_close(summed, 2 * x)


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
