"""`append_` generated into the kernel that computes its rows: one kernel, and every rule of the operator kept."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters

from tests.lowering.compiled import Compiled
from tests.support.poison import same_bits

NOWHERE = -(2**63)
BAD_SLOT = r"flashmla::append_: argument 'slot_mapping': expected slots below 8, got {} at \[{}\]"


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def one_cache(cache: Tensor, latent: Tensor, rope: Tensor, weight: Tensor, *rest: Tensor) -> None:
    """An MLA layer's way to its cache: norm, rotary embedding, cast, append."""
    cos, sin, slots = rest
    rows = torch.cat([rms_norm(latent, weight), rotated(rope, cos, sin)], dim=-1)
    torch.ops.flashmla.append_(cache, rows.to(cache.dtype).unsqueeze(1), slots)


def two_caches(
    cache: Tensor,
    k_cache: Tensor,
    latent: Tensor,
    rope: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
) -> None:
    rows, k_rows = (x.to(cache.dtype).unsqueeze(1) for x in (rms_norm(latent, weight), rotated(rope, cos, sin)))
    torch.ops.flashmla.append_.two(cache, k_cache, rows, k_rows, slots)


def layer_inputs(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    sizes = ((n, 512), (n, 64), (512,), (n, 32), (n, 32))
    return tuple(torch.randn(size, generator=generator) for size in sizes)


def poisoned(*widths: int) -> list[Tensor]:
    return [torch.full((8, 16, 1, width), torch.nan, dtype=torch.bfloat16) for width in widths]


@pytest.mark.parametrize(("layer", "widths"), [(one_cache, (576,)), (two_caches, (512, 64))])
def test_norm_rope_cast_and_append_are_one_kernel(layer: object, widths: tuple[int, ...]) -> None:
    compiled = Compiled(layer)  # type: ignore[arg-type]
    inputs = layer_inputs(5)
    slots = torch.tensor([7, -1, 100, 7, 127])
    caches, expected = poisoned(*widths), poisoned(*widths)
    compiled(*caches, *inputs, slots)
    layer(*expected, *inputs, slots)  # type: ignore[operator]
    assert all(map(same_bits, caches, expected))
    assert [step.kind for step in compiled.program.steps] == ["kernel"]
    largest = max(torch.Size(map(int, each.shape.split(","))).numel() for each in compiled.program.buffers)
    assert largest < caches[-1].numel()
    assert ReinplaceCounters.get_total_missed() == 0


def quantized_cache(cache: Tensor, latent: Tensor, rope: Tensor, weight: Tensor, *rest: Tensor) -> None:
    cos, sin, slots = rest
    rows = torch.cat([rms_norm(latent, weight), rotated(rope, cos, sin)], dim=-1)
    torch.ops.flashmla.append_(cache, rows.to(torch.bfloat16).unsqueeze(1), slots, "fp8_v32")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("n", [5, 100])
def test_norm_rope_cast_and_quantising_append_are_one_kernel(dtype: torch.dtype, n: int) -> None:
    """Scales and all, with no temporary as large as the cache; 100 rows are shared among threads."""
    compiled = Compiled(quantized_cache)
    inputs = layer_inputs(n)
    slots = torch.randperm(128)[:n]
    slots[1], slots[3] = -1, slots[0]
    cache, expected = (torch.full((8, 16, 1, 656), 7, dtype=torch.uint8).view(dtype) for _ in range(2))
    compiled(cache, *inputs, slots)
    quantized_cache(expected, *inputs, slots)
    assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
    assert [step.kind for step in compiled.program.steps] == ["kernel"]
    assert "append_quantized<" in compiled.sources[0]
    largest = max(torch.Size(map(int, each.shape.split(","))).numel() for each in compiled.program.buffers)
    assert largest <= n * 576
    assert ReinplaceCounters.get_total_missed() == 0


def write(cache: Tensor, x: Tensor, slots: Tensor) -> None:
    torch.ops.flashmla.append_(cache, (x * 2).to(cache.dtype), slots)


@pytest.mark.parametrize("pages", [1, 2])
def test_skipped_rows_are_written_nowhere_in_a_layer_of_a_slab(pages: int) -> None:
    """Pages that do not follow one another, and one alone, whose number is in no offset."""

    def append(slab: Tensor, rows: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(slab[:, 1], rows + 1, slots)

    slabs = [torch.zeros(pages, 2, 4, 1, 8) for _ in range(2)]
    rows, slots = torch.randn(4, 1, 8), torch.tensor([-1, 3, 3, NOWHERE])
    Compiled(append)(slabs[0], rows, slots)
    append(slabs[1], rows, slots)
    assert same_bits(*slabs)


#: One compilation for each layout of the cache serves all sizes.
WRITERS = {name: Compiled(write, dynamic=True) for name in ("contiguous", "heads first", "gaps")}


def memory_of(cache: Tensor) -> Tensor:
    return cache if cache._base is None else cache._base


def cache_of(layout: str, pages: int, page_size: int, h_kv: int, d: int) -> Tensor:
    """Poisoned memory [pages, page_size, h_kv, d]; ``gaps``: a slice of wider pages, tokens, heads and rows."""
    if layout == "heads first":
        return torch.full((pages, h_kv, page_size, d), torch.nan).transpose(1, 2)
    if layout == "gaps":
        memory = torch.full((pages + 1, page_size + 2, h_kv + 1, d + 3), torch.nan)
        return memory[1:, 1:-1, 1:, 2:-1]
    return torch.full((pages, page_size, h_kv, d), torch.nan)


@given(
    layout=st.sampled_from(list(WRITERS)),
    sizes=st.tuples(*[st.integers(2, 5)] * 3, st.integers(2, 40)),
    draws=st.lists(st.integers(0, 999) | st.sampled_from([-1, -2, NOWHERE]), min_size=2, max_size=9),
)
@settings(max_examples=40)
@example("contiguous", (2, 2, 2, 33), [0, 0, -1, 3, 3, 3])
@example("heads first", (2, 3, 2, 16), [5, NOWHERE, 5])
@example("gaps", (3, 3, 3, 17), [8, 8])
def test_rows_lie_where_eager_puts_them(layout: str, sizes: tuple[int, int, int, int], draws: list[int]) -> None:
    pages, page_size, h_kv, d = sizes
    slots = torch.tensor([s if s < 0 else s % (pages * page_size) for s in draws])
    x = torch.arange(len(draws) * h_kv * d, dtype=torch.float32).view(len(draws), h_kv, d)
    actual, expected = (cache_of(layout, *sizes) for _ in range(2))
    WRITERS[layout](actual, x, slots)
    write(expected, x, slots)
    assert same_bits(memory_of(actual), memory_of(expected))


def quantise(cache: Tensor, x: Tensor, slots: Tensor) -> None:
    torch.ops.flashmla.append_(cache, x * 2, slots, "fp8_v32")


@given(
    sizes=st.tuples(*[st.integers(2, 5)] * 3),
    draws=st.lists(st.integers(0, 999) | st.sampled_from([-1, NOWHERE]), min_size=2, max_size=9),
    gaps=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
@example((2, 2, 2), [0, 0, -1, 3, 3, 3], True, 0)
def test_quantised_rows_lie_where_eager_puts_them(
    sizes: tuple[int, int, int], draws: list[int], gaps: bool, seed: int
) -> None:
    """Caches with gaps between pages, tokens and heads; rows of every size, with infinities and NaN among them."""
    pages, page_size, h_kv = sizes
    slots = torch.tensor([s if s < 0 else s % (pages * page_size) for s in draws])
    x = torch.randn(len(draws), h_kv, 576, generator=torch.Generator().manual_seed(seed))
    x *= torch.tensor([1e-9, 1.0, 1e9]).repeat(192)
    x[0, 0, 5], x[1, 0, 570], x[-1, -1, 200] = torch.inf, torch.nan, -torch.inf
    caches = [torch.full((pages + 1, page_size + 2, h_kv + 1, 660), 7, dtype=torch.uint8) for _ in range(2)]
    actual, expected = (
        memory[1:, 1:-1, 1:, 2:658] if gaps else memory[:pages, :page_size, :h_kv, :656].contiguous()
        for memory in caches
    )
    QUANTISERS[gaps](actual, x, slots)
    quantise(expected, x, slots)
    assert torch.equal(*caches)
    assert torch.equal(actual, expected)


#: One compilation each for caches with gaps and without.
QUANTISERS = {gaps: Compiled(quantise, dynamic=True) for gaps in (True, False)}


def test_quantised_rows_of_every_type_and_order() -> None:
    def step(cache: Tensor, x: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(cache, x.permute(2, 0, 1), slots, "fp8_v32")

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, slots = torch.randn(2, 576, 5).to(dtype), torch.tensor([3, -1, 0, 3, 7])
        actual, expected = (torch.full((2, 4, 2, 656), 7, dtype=torch.uint8) for _ in range(2))
        Compiled(step)(actual, x, slots)
        step(expected, x, slots)
        assert torch.equal(actual, expected)


def test_a_bad_slot_of_a_quantised_row_raises_and_nothing_is_written() -> None:
    cache, compiled = torch.full((2, 4, 1, 656), 7, dtype=torch.uint8), Compiled(quantise)
    with pytest.raises(RuntimeError, match=BAD_SLOT.format(8, 1)):
        compiled(cache, torch.zeros(2, 1, 576), torch.tensor([0, 8]))
    assert (cache == 7).all()
    compiled(cache, torch.zeros(2, 1, 576), torch.tensor([0, 7]))
    assert (cache[0, 0, 0, :512] == 0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(n: int) -> None:
    actual, expected = (torch.full((2, 4, 1, 8), torch.nan) for _ in range(2))
    x, slots = torch.ones(n, 1, 8), torch.full((n,), 7)
    Compiled(write)(actual, x, slots)
    write(expected, x, slots)
    assert same_bits(actual, expected)


@pytest.mark.parametrize(
    ("slots", "named"), [([0, 8], (8, 1)), ([2**62, 8], (2**62, 0)), ([-1, 2**63 - 1], (2**63 - 1, 1))]
)
def test_a_bad_slot_raises_as_in_eager_and_nothing_is_written(slots: list[int], named: tuple[int, int]) -> None:
    cache = torch.full((2, 4, 1, 8), torch.nan)
    arguments = (cache, torch.zeros(2, 1, 8), torch.tensor(slots))
    compiled = Compiled(write)
    for function in (write, compiled):
        with pytest.raises(RuntimeError, match=BAD_SLOT.format(*named)):
            function(*arguments)
        assert cache.isnan().all()
    compiled(cache, torch.ones(2, 1, 8), torch.tensor([0, 7]))  # and the kernel goes on working
    assert (cache[0, 0] == 2).all()
    assert (cache[1, 3] == 2).all()


def test_slots_computed_in_the_graph_are_checked_too() -> None:
    def step(cache: Tensor, x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        slots = torch.where(positions >= 0, table[positions // 4] * 4 + positions % 4, -1)
        torch.ops.flashmla.append_(cache, x * 2, slots)
        return slots + 1

    compiled = Compiled(step)
    table, x = torch.tensor([1, 0, 2]), torch.arange(24.0).view(3, 1, 8)
    for positions in ([0, -1, 5], [3, 3, 4]):
        actual, expected = (torch.full((2, 4, 1, 8), torch.nan) for _ in range(2))
        arguments = (x, table, torch.tensor(positions))
        assert torch.equal(compiled(actual, *arguments), step(expected, *arguments))
        assert same_bits(actual, expected)
    cache = torch.full((2, 4, 1, 8), torch.nan)
    with pytest.raises(RuntimeError, match=BAD_SLOT.format(9, 2)):
        compiled(cache, x, table, torch.tensor([0, 1, 9]))
    assert cache.isnan().all()


def test_views_of_one_slot_tensor_and_caches_of_different_sizes() -> None:
    """Strided and offset slots; the same slots for two caches, of which only one has the last of them."""

    def step(small: Tensor, large: Tensor, x: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(small, x, slots[1, ::2])
        torch.ops.flashmla.append_(large, x * 2, slots[1, ::2])
        torch.ops.flashmla.append_(large, x * 3, slots[0, 1::2])

    def caches() -> list[Tensor]:
        return [torch.full((pages, 4, 1, 8), torch.nan) for pages in (2, 4)]

    compiled, x = Compiled(step), torch.arange(24.0).view(3, 1, 8)
    slots = torch.tensor([[99, 15, 99, -1, 99, 15], [7, 99, -1, 99, 2, 99]])
    actual, expected = caches(), caches()
    compiled(*actual, x, slots)
    step(*expected, x, slots)
    assert all(map(same_bits, actual, expected))
    assert [each.kind for each in compiled.program.steps] == ["kernel"]
    untouched = caches()
    with pytest.raises(RuntimeError, match=BAD_SLOT.format(15, 2)):
        compiled(*untouched, x, torch.tensor([[0] * 6, [7, 0, -1, 0, 15, 0]]))
    assert all(cache.isnan().all() for cache in untouched)


def test_rows_made_of_rows_of_the_cache_are_read_before_they_are_overwritten() -> None:
    def move(cache: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(cache, cache.flatten(0, 1)[:3] + 1, slots)

    actual, expected = (torch.arange(64.0).view(2, 4, 1, 8) for _ in range(2))
    slots = torch.tensor([1, 2, 3])
    Compiled(move)(actual, slots)
    move(expected, slots)
    assert same_bits(actual, expected)


def test_values_that_use_the_slots_of_other_rows() -> None:
    """A skipped row's slot is seen as it is by everyone but the write itself."""

    def step(cache: Tensor, x: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(cache, x + slots.flip(0)[:, None, None], slots)

    actual, expected = (torch.full((2, 4, 1, 8), torch.nan) for _ in range(2))
    x, slots = torch.ones(4, 1, 8), torch.tensor([5, 5, -1, 2])
    Compiled(step)(actual, x, slots)
    step(expected, x, slots)
    assert same_bits(actual, expected)


def test_rows_that_lie_across() -> None:
    """Rows read with another innermost dimension than they are written with: the loop is tiled in two dimensions."""

    def step(cache: Tensor, x: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(cache, (x * 2).permute(2, 0, 1), slots)

    actual, expected = (torch.full((8, 8, 32, 48), torch.nan) for _ in range(2))
    slots = torch.randperm(64)[:40]
    slots[3], slots[7] = -1, slots[8]
    x = torch.arange(32.0 * 48 * 40).view(32, 48, 40)
    Compiled(step)(actual, x, slots)
    step(expected, x, slots)
    assert same_bits(actual, expected)


def test_elements_of_one_are_written_one_by_one() -> None:
    """Rows of a single element leave only the rows to put into a vector, each with a slot of its own."""
    actual, expected = (torch.full((16, 8, 1, 1), torch.nan) for _ in range(2))
    slots = torch.randperm(128)[:100]
    slots[5], slots[6] = -3, slots[90]
    x = torch.arange(100.0).view(100, 1, 1)
    Compiled(write)(actual, x, slots)
    write(expected, x, slots)
    assert same_bits(actual, expected)


def test_threads_compile_and_append_at_once() -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.no_grad():
                actual, expected = (torch.full((4, 4, 1, 8), torch.nan) for _ in range(2))
                x, slots = torch.full((3, 1, 8), float(seed)), torch.tensor([seed, -1, 15])
                torch.compile(write, backend="flashmla", fullgraph=True)(actual, x, slots)
                write(expected, x, slots)
                assert same_bits(actual, expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
