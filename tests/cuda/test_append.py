"""`flashmla::append_` on CUDA, executed by the emulator, against the definition bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlass_kernels import emulator
from cutlass_kernels.attention import libraries
from cutlass_kernels.attention.around_config import AppendConfig
from flashmla_ops import reference
from flashmla_ops.cuda import append as on_cuda
from flashmla_ops.cuda.served import ELEMENTS
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NATIVE, QUANTIZED
from tests.cuda.emulated import Emulated, bytes_of, device, no_hazards
from tests.ops.test_append import INT64_MIN, make
from tests.strategies import DTYPES, SEEDS
from tests.support.poison import strided
from tests.support.rows import empty_cache

pytestmark = pytest.mark.skipif(not libraries.can_build(), reason=f"{libraries.DSL} is not installed")
LANDINGS = st.sampled_from(["late", "early"])


def expect(cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str = NATIVE) -> Tensor:
    """A cache after the definition, in the same layout; a slot past the end counts as none."""
    expected = copy.deepcopy(cache)
    slots = slot_mapping.where(slot_mapping < cache.size(0) * cache.size(1), -1)
    reference.append(expected, rows, slots, row_format)
    return expected


def same_memory(cache: Tensor, expected: Tensor) -> bool:
    """Whether all of it is the same, what lies between rows included."""
    return bool((bytes_of(cache) == bytes_of(expected)).all())


def check(cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str = NATIVE, **options: object) -> Emulated:
    expected = expect(cache, rows, slot_mapping, row_format)
    emulated = Emulated(device(2), emulator.Options(**options))
    with no_hazards(emulated) as engine:
        on_cuda.append(engine, cache, rows, slot_mapping, row_format)
    assert same_memory(cache, expected)
    assert not any("definition" in served for served in engine.chosen.values())
    return emulated


def slots(n_pages: int, page_size: int) -> st.SearchStrategy[list[int]]:
    end = n_pages * page_size
    one = st.integers(0, end - 1) | st.sampled_from([0, -1, -7, INT64_MIN, end, end + 3, 2**31, 2**32, 2**63 - 1])
    return st.lists(one, max_size=70)


@st.composite
def native(draw: st.DrawFn) -> tuple[object, ...]:
    n_pages, page_size = draw(st.sampled_from([(1, 1), (1, 5), (3, 16), (5, 7), (40, 64)]))
    d = draw(st.integers(1, 40) | st.sampled_from([64, 128, 512, 576]))
    sizes = n_pages, page_size, draw(st.integers(1, 4)), d, draw(st.sampled_from([1, 8, 64]))
    return draw(slots(n_pages, page_size)), *sizes, draw(st.sampled_from(DTYPES)), draw(st.booleans()), draw(SEEDS)


@settings(max_examples=40)
@given(native(), LANDINGS)
def test_rows_are_copied(case: tuple[object, ...], landing: str) -> None:
    made = make(*case)
    check(made.kv_cache, made.rows, made.slot_mapping, landing=landing)


@settings(max_examples=15)
@given(native(), LANDINGS)
def test_two_tensors(case: tuple[object, ...], landing: str) -> None:
    made = make(*case)
    pairs = ((made.kv_cache, made.rows), (made.k_cache, made.k_rows))
    expected = [expect(*pair, made.slot_mapping) for pair in pairs]
    emulated = Emulated(device(2), emulator.Options(landing=landing))
    with no_hazards(emulated) as engine:
        on_cuda.append_two(engine, made.kv_cache, made.k_cache, made.rows, made.k_rows, made.slot_mapping)
    assert same_memory(made.kv_cache, expected[0])
    assert same_memory(made.k_cache, expected[1])


@pytest.mark.parametrize(("d", "offset", "width"), [(8, 0, 16), (4, 0, 8), (6, 0, 4), (5, 0, 2), (8, 1, 2), (8, 4, 8)])
def test_the_widest_access_that_addresses_allow(d: int, offset: int, width: int) -> None:
    memory = torch.zeros(6 * 3 * d + offset, dtype=torch.bfloat16)
    cache = memory[offset:].view(6, 1, 3, d)
    emulated = check(cache, torch.randn(4, 3, d).bfloat16(), torch.tensor([5, 0, 2, 2]))
    assert emulated.configs == [AppendConfig(width)]


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_of_many_rows_for_one_slot_the_last_stays(multiprocessors: int) -> None:
    """Neighbours in one block, rows of different blocks, and slots that differ by multiples of the table's size."""
    n, end = 3000, 1 << 14
    generator = torch.Generator().manual_seed(1)
    slot_mapping = torch.randint(0, end, (n,), generator=generator)
    slot_mapping[::3] = slot_mapping[::3] % 4 * 1024 + 5
    slot_mapping[1::50] = -1
    cache = torch.zeros(end, 1, 1, 2, dtype=torch.float32)
    rows = torch.arange(2.0 * n).view(n, 1, 2)
    expected = expect(cache, rows, slot_mapping)
    emulated = Emulated(device(multiprocessors), emulator.Options())
    with no_hazards(emulated) as engine:
        on_cuda.append(engine, cache, rows, slot_mapping)
    assert same_memory(cache, expected)


def hard_rows(name: str, n: int, h_kv: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of all sizes; among them zeros, numbers halfway between codes, subnormal ones, infinities and NaN."""
    row = QUANTIZED[name]
    groups = row.elements // 16
    x = torch.randn(n, h_kv, groups, 16, generator=generator)
    x *= torch.exp2(torch.randint(-30, 15, (n, h_kv, groups, 1), generator=generator).float())
    kind = torch.randint(0, 12, (n, h_kv, groups, 1), generator=generator)
    x = torch.where(kind == 0, 0.0, x)
    x = torch.where(kind == 1, (x.sign() * torch.randint(0, 17, x.shape, generator=generator)) / 8, x)
    x = torch.where(kind == 2, x * 2.0**-100, x)
    special = torch.randint(0, 3, x.shape, generator=generator)
    specials = torch.tensor([torch.inf, -torch.inf, torch.nan])[special]
    # In a third of the rows: others would hold nothing else.
    odd = (torch.rand(x.shape, generator=generator) < 0.002) & (torch.arange(n) % 3 == 0)[:, None, None, None]
    x = torch.where(odd, specials, x).flatten(-2).to(dtype)
    nan = x.isnan() & (torch.rand(x.shape, generator=generator) < 0.5)
    return torch.where(nan, torch.copysign(torch.tensor(torch.nan), torch.tensor(-1.0)).to(dtype), x)


@st.composite
def quantised(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, str]:
    names = sorted(QUANTIZED)
    name = draw(st.sampled_from(names))
    row, dtype = QUANTIZED[name], getattr(torch, DTYPES[names.index(name) % 3])  # every kernel takes a second to build
    n_pages, page_size = draw(st.sampled_from([(1, 1), (3, 2), (2, 64), (5, 7)]))
    h_kv = 1 if row.tail else draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kind = draw(st.sampled_from([torch.uint8, torch.float8_e4m3fn]))
    cache = empty_cache(row, n_pages, page_size, gaps=draw(st.booleans()), h_kv=h_kv, dtype=kind)
    slot_mapping = torch.tensor(draw(slots(n_pages, page_size))[:20], dtype=torch.int64)
    rows = hard_rows(name, len(slot_mapping), h_kv, dtype, generator)
    if draw(st.booleans()):
        rows = strided(rows, generator, contiguous_rows=draw(st.booleans()))
    return cache, rows, slot_mapping, name


@settings(max_examples=40)
@given(quantised(), LANDINGS)
def test_rows_are_quantised(case: tuple[Tensor, Tensor, Tensor, str], landing: str) -> None:
    check(*case, landing=landing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_every_format(name: str, dtype: str) -> None:
    row, n = QUANTIZED[name], 64
    cache = empty_cache(row, 4, 16, gaps=False)
    rows = hard_rows(name, n, 1, getattr(torch, dtype), torch.Generator().manual_seed(5))
    emulated = check(cache, rows, torch.randperm(n, generator=torch.Generator().manual_seed(1)), name)
    (config,) = emulated.configs
    assert isinstance(config, AppendConfig)
    assert config.width == 16


@pytest.mark.parametrize(("name", "most"), [("int8_g128", 127), ("int4_g32", 7), ("fp4_v41", 6)])
def test_next_to_a_tie(name: str, most: int) -> None:
    """Numbers halfway between two codes of their group's scale, and the float32 before and after, at all magnitudes."""
    row, n = QUANTIZED[name], 256
    generator = torch.Generator().manual_seed(7)
    scales = torch.rand(n, 1, row.elements // 16, 1, generator=generator) + 1
    low, high = (-11, 7) if name == "fp4_v41" else (-140, 120)
    scales = scales * torch.exp2(torch.randint(low, high, (n, 1, 1, 1), generator=generator).float())
    scales = scales.repeat_interleave(row.group // 16, dim=2)[:, :, : row.elements // 16]  # groups have one each
    if name == "fp4_v41":
        scales = scales.to(torch.float8_e4m3fn).float()
    steps = torch.randint(-4 * most, 4 * most + 1, (*scales.shape[:-1], 16), generator=generator) / 4
    x = scales * steps
    x = torch.nextafter(x, x + torch.randint(-1, 2, x.shape, generator=generator) * x.abs())
    x[..., 0] = scales[..., 0] * most  # the largest
    cache = empty_cache(row, 16, 16, gaps=False)
    check(cache, x.flatten(-2), torch.arange(n), name)


def test_no_rows_no_pages_and_only_skipped_rows_write_nothing() -> None:
    for n_pages, given_slots in ((2, []), (2, [-1, INT64_MIN]), (0, [0, 3])):
        made = make(given_slots, n_pages, 4, h_kv=1, d=8, d_k=4, dtype="float16", lay_out=False)
        check(made.kv_cache, made.rows, made.slot_mapping)
        assert made.kv_cache.isnan().all()


def test_what_the_contract_refuses_raises_before_a_launch() -> None:
    made = make([1], 2, 4, h_kv=1, d=8, d_k=4, dtype="float16", lay_out=False)
    emulated = Emulated(device(2), emulator.Options())
    with pytest.raises(ArgumentError, match="slot_mapping"):
        on_cuda.append(emulated.engine, made.kv_cache, made.rows, made.slot_mapping.int())
    assert not emulated.configs


@pytest.mark.parametrize("name", [NATIVE, *sorted(QUANTIZED)])
def test_no_local_memory(name: str) -> None:
    made = [AppendConfig(16)]
    if name != NATIVE:
        made = [on_cuda.quantising(name, dtype, 16) for dtype in ELEMENTS]
    for config in made:
        built = libraries.build(config, "sm_80")
        assert built.stack_bytes == 0
        assert built.registers <= 64
