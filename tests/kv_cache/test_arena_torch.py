"""Torch's own machinery on memory of an arena: autograd, compiled code, storages, oneDNN."""

from __future__ import annotations

import ctypes
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashmla_ops.cpu import allocator
from flashmla_ops.errors import ArenaFullError
from flashmla_ops.kv_cache import Arena

pytestmark = pytest.mark.usefixtures("cxx")


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
