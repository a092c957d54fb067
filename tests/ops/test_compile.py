"""The operators inside torch.compile(fullgraph=True) and torch.export: one graph, no recompilation, no cache copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import ReinplaceCounters

from tests.strategies import DTYPES
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.poison import same_bits

CASE = DecodeCase(lengths=(20, 0, 33), s_q=1, h_q=6, page_size=16, d=40, d_v=32)

Step = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    ReinplaceCounters.clear()
    yield
    torch._dynamo.reset()


def decode_step(q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """One layer of a model, with pointwise work around it."""
    s_q, h_q = q.shape[1:3]
    schedule = torch.ops.flashmla.decode_schedule(cache_seqlens, s_q, h_q, kv_cache.size(2), 2)
    return torch.ops.flashmla.decode(
        q * 2, kv_cache, None, block_table, cache_seqlens, 32, causal=True, schedule=schedule
    )


def append_step(
    q: Tensor, rows: Tensor, slots: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    torch.ops.flashmla.append_(kv_cache, rows * 0.5, slots)
    out, lse = torch.ops.flashmla.decode(q * 2, kv_cache, None, block_table, cache_seqlens, 32, causal=True)
    return out + 1, lse


def append_two_step(
    q: Tensor,
    rows: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    latent, rotary = (rows * 0.5).split([32, 8], dim=-1)
    torch.ops.flashmla.append_.two(kv_cache, k_cache, latent, rotary, slots)
    out, lse = torch.ops.flashmla.decode(q * 2, kv_cache, k_cache, block_table, cache_seqlens, 32, causal=True)
    return out + 1, lse


def append_arguments(case: DecodeCase) -> tuple[DecodeInputs, Tensor, Tensor]:
    """The inputs of ``case``, and for each sequence the row of its last token (rows [b, 1, d], slots [b])."""
    inputs = build(replace(case, strided=False))
    rows = torch.randn(len(case.lengths), 1, 40, generator=torch.Generator().manual_seed(1)).to(inputs.q.dtype)
    slots = []
    for i, length in enumerate(case.lengths):
        page = int(inputs.block_table[i, (length - 1) // case.page_size]) if length else 0
        slots.append(page * case.page_size + (length - 1) % case.page_size if length else -1)
    return inputs, rows, torch.tensor(slots)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(map(same_bits, actual, expected))


def test_ten_lengths_compile_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    inputs = build(replace(CASE, lengths=(48, 48, 48)))
    for length in (1, 0, 2, 7, 15, 16, 17, 31, 40, 48):
        lengths = torch.tensor([length, 48 - length, length // 2], dtype=torch.int32)
        arguments = (inputs.q, inputs.kv_cache, inputs.block_table, lengths)
        assert_same(compiled(*arguments), decode_step(*arguments))
    assert counter.frame_count == 1


def test_ten_batch_and_table_sizes_compile_at_most_twice() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    for b in range(2, 12):
        inputs = build(replace(CASE, lengths=(20 * b,) * b, strided=False))
        arguments = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
        assert_same(compiled(*arguments), decode_step(*arguments))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inductor_agrees_with_eager(dtype: str, dynamic: bool) -> None:
    inputs = build(replace(CASE, dtype=dtype))
    arguments = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    compiled = torch.compile(decode_step, fullgraph=True, dynamic=dynamic)
    assert_same(compiled(*arguments), decode_step(*arguments))


def run_appends(step: Step, case: DecodeCase, two: bool) -> tuple[Tensor, ...]:
    """Out, lse and the caches after the step."""
    inputs, rows, slots = append_arguments(case)
    caches = [inputs.kv_cache]
    if two:
        caches = [inputs.kv_cache[..., :32].contiguous(), inputs.kv_cache[..., 32:].contiguous()]
    return *step(inputs.q, rows, slots, *caches, inputs.block_table, inputs.cache_seqlens), *caches


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_append_then_decode_copies_no_cache(backend: str, two: bool) -> None:
    step = append_two_step if two else append_step
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for lengths in ((20, 0, 33), (21, 1, 34), (47, 16, 2)):
        case = replace(CASE, lengths=(*lengths, 48))
        assert_same(run_appends(compiled, case, two), run_appends(step, case, two))
    # The block table and the cache grow with the lengths: once static, once dynamic.
    assert counter.frame_count <= 2
    assert ReinplaceCounters.get_total_missed() == 0
    assert ReinplaceCounters.get_total_missed_bytes() == 0


def test_appends_of_several_layers_copy_no_cache() -> None:
    """One cache tensor a layer, as graph inputs."""

    def layers(q: Tensor, rows: Tensor, slots: Tensor, caches: list[Tensor], table: Tensor, lengths: Tensor) -> Tensor:
        for cache in caches:
            torch.ops.flashmla.append_(cache, rows, slots)
            out, _ = torch.ops.flashmla.decode(q, cache, None, table, lengths, 32)
            q = q + torch.nn.functional.pad(out, (0, 8))
        return q

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs, rows, slots = append_arguments(CASE)
        caches = [inputs.kv_cache.clone() for _ in range(3)]
        return function(inputs.q, rows, slots, caches, inputs.block_table, inputs.cache_seqlens), *caches

    assert_same(run(torch.compile(layers, fullgraph=True)), run(layers))
    assert ReinplaceCounters.get_total_missed() == 0


def test_skipped_and_repeated_slots_when_compiled() -> None:
    def append(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(cache, rows, slots)

    rows = torch.arange(5.0).view(5, 1, 1).expand(5, 1, 8).contiguous()
    slots = torch.tensor([3, -1, 5, 3, -(2**63)])
    expected, actual = (torch.full((2, 4, 1, 8), torch.nan) for _ in range(2))
    append(expected, rows, slots)
    torch.compile(append, fullgraph=True)(actual, rows, slots)
    assert same_bits(actual, expected)
    assert (actual[0, 3] == 3).all()
    assert (actual[1, 1] == 2).all()
    assert int(actual.isnan().sum()) == 6 * 8


def test_a_bad_slot_raises_when_compiled_and_writes_nothing() -> None:
    compiled = torch.compile(lambda *tensors: torch.ops.flashmla.append_(*tensors), fullgraph=True)
    cache = torch.full((2, 4, 1, 8), torch.nan)
    with pytest.raises(RuntimeError, match=r"argument 'slot_mapping': expected slots below 8, got 8 at \[1\]"):
        compiled(cache, torch.zeros(2, 1, 8), torch.tensor([0, 8]))
    assert cache.isnan().all()


def test_a_stale_schedule_raises_when_compiled() -> None:
    inputs = build(replace(CASE, num_parts=2))
    compiled = torch.compile(lambda **kwargs: torch.ops.flashmla.decode(**kwargs), fullgraph=True)
    compiled(**inputs.kwargs())
    with pytest.raises(
        RuntimeError, match=r"expected a schedule made for length 19 at \[0\], got one made for length 20"
    ):
        compiled(**inputs.kwargs(cache_seqlens=torch.tensor([19, 0, 33], dtype=torch.int32)))


def test_a_bad_shape_raises_when_compiled() -> None:
    inputs = build(CASE)
    compiled = torch.compile(lambda **kwargs: torch.ops.flashmla.decode(**kwargs), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"argument 'd_v': expected a value in \[1, 40\], got 41"):
        compiled(**inputs.kwargs(d_v=41))


def test_merge_states_compiled() -> None:
    def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.ops.flashmla.merge_states([out + 1 for out in outs], lses)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(merge, fullgraph=True, backend=counter)
    for b in range(2, 8):
        outs, lses = [torch.randn(b, 2, 4, 8) for _ in range(2)], [torch.randn(b, 4, 2) for _ in range(2)]
        assert_same(compiled(outs, lses), merge(outs, lses))
    assert counter.frame_count <= 2


class AppendModule(torch.nn.Module):
    def forward(
        self, q: Tensor, rows: Tensor, slots: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        return append_step(q, rows, slots, kv_cache, block_table, cache_seqlens)


def test_exported_for_any_batch() -> None:
    inputs, rows, slots = append_arguments(CASE)
    b, pages, width = (torch.export.Dim(name, min=1, max=4096) for name in ("b", "pages", "width"))
    shapes = {
        "q": {0: b},
        "rows": {0: b},
        "slots": {0: b},
        "kv_cache": {0: pages},
        "block_table": {0: b, 1: width},
        "cache_seqlens": {0: b},
    }
    example = (inputs.q, rows, slots, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    program = torch.export.export(AppendModule(), example, dynamic_shapes=shapes)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in names if name.startswith("flashmla")] == [
        "flashmla.append_.default",
        "flashmla.decode.default",
    ]
    for case in (CASE, replace(CASE, lengths=(1,)), replace(CASE, lengths=(5, 0, 90, 16, 17))):
        for module in (program.module(), program.run_decompositions().module()):
            assert_same(run_appends(module, case, False), run_appends(append_step, case, False))


def test_exported_append_skips_and_raises_as_in_eager() -> None:
    inputs, rows, slots = append_arguments(CASE)
    arguments = (inputs.q, rows, slots, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    module = torch.export.export(AppendModule(), arguments).module()
    assert -1 in slots.tolist()
    before = inputs.kv_cache.clone()
    bad = torch.tensor([0, 1, inputs.kv_cache.size(0) * CASE.page_size])
    with pytest.raises(RuntimeError, match="flashmla::append_: argument 'slot_mapping'"):
        module(inputs.q, rows, bad, *arguments[3:])
    assert same_bits(inputs.kv_cache, before)
