"""`flashmla::merge_states` and `decode_schedule` on CUDA, executed by the emulator, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlass_kernels import emulator
from cutlass_kernels.attention import libraries
from cutlass_kernels.attention.around_config import ELEMENT_BYTES, MergeConfig, ScheduleConfig
from cutlass_kernels.gemm.problem import Device
from flashmla_ops import reference
from flashmla_ops.cuda import states
from flashmla_ops.errors import ArgumentError
from flashmla_ops.reference.schedule import HEADER, MAX_PARTS, MIN_UNITS, UNIT
from tests.cuda.emulated import Emulated, device, no_hazards
from tests.ops.test_merge import TOLERANCES, make_parts
from tests.strategies import DTYPES, SEEDS
from tests.support.compare import difference
from tests.support.poison import strided

pytestmark = pytest.mark.skipif(not libraries.can_build(), reason=f"{libraries.DSL} is not installed")
LANDINGS = st.sampled_from(["late", "early"])


def merged(outs: list[Tensor], lses: list[Tensor], **options: object) -> tuple[Tensor, Tensor, Emulated]:
    emulated = Emulated(device(2), emulator.Options(**options))
    with no_hazards(emulated) as engine:
        out, lse = states.merge_states(engine, outs, lses)
    assert not any("definition" in served for served in engine.chosen.values())
    return out, lse, emulated


def check(outs: list[Tensor], lses: list[Tensor], **options: object) -> Emulated:
    out, lse, emulated = merged(outs, lses, **options)
    assert out.dtype == outs[0].dtype
    assert out.is_contiguous()
    assert lse.is_contiguous()
    expected, expected_lse = reference.merge_states(outs, lses)
    problem = difference("out", out, expected.to(out.dtype), TOLERANCES[str(out.dtype)[6:]])
    assert problem is None, problem
    problem = difference("lse", lse, expected_lse, TOLERANCES["float32"])
    assert problem is None, problem
    return emulated


SHAPES = st.tuples(
    st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 40) | st.sampled_from([64, 512])
)


@settings(max_examples=60)
@given(
    st.integers(1, 5) | st.sampled_from([8, 9, 20]),
    SHAPES,
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.3, 1.0]),
    SEEDS,
    LANDINGS,
)
def test_parts_in_any_layout(
    parts: int, shape: tuple[int, ...], batched: bool, dtype: str, empty: float, seed: int, landing: str
) -> None:
    check(*make_parts(parts, shape if batched else shape[1:], dtype, empty, seed), landing=landing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_vectors(dtype: str) -> None:
    outs, lses = make_parts(10, (2, 2, 4, 512), dtype, 0.3, seed=1)
    emulated = check([out.contiguous() for out in outs], lses)
    name = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    assert emulated.configs == [MergeConfig(name, 16 // ELEMENT_BYTES[name])] * 2


def test_as_many_parts_as_there_may_be() -> None:
    outs, lses = make_parts(MAX_PARTS, (1, 2, 8), "float32", 0.2, seed=3)
    emulated = check(outs, lses)
    assert len(emulated.configs) == MAX_PARTS // MergeConfig.parts


@pytest.mark.parametrize("parts", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_part_is_returned_as_it_is(dtype: str, parts: int) -> None:
    """Also where all others, of an earlier launch or of a later one, saw nothing."""
    for at in {0, parts - 1}:
        outs, lses = make_parts(parts, (2, 3, 5, 64), dtype, 1.0, seed=1)
        (outs[at],), (lses[at],) = make_parts(1, (2, 3, 5, 64), dtype, 0.0, seed=2)
        out, lse, _ = merged(outs, lses)
        assert torch.equal(out, outs[at])
        assert torch.equal(lse, lses[at])


def rows_of(*numbers: float) -> Tensor:
    """A part of rows [s_q, h_q 1, d_v 4], each of one number."""
    return torch.tensor(numbers)[:, None, None].repeat(1, 1, 4)


def test_numbers_that_are_none() -> None:
    """NaN as an LSE makes a row NaN; a part that has a weight, however small, gives its NaN and infinities."""
    nan, inf = torch.nan, torch.inf
    outs = [rows_of(1, 1, nan, 1, 1, nan, 1, 1), rows_of(2, inf, 2, nan, inf, 2, nan, 3e38)]
    lses = [torch.tensor([[0, 0, inf, 0, 0, -inf, 0, 0.0]]), torch.tensor([[nan, 0, 0, -200, -300, 0, -800, -92.0]])]
    for extra in (0, 8):  # in one launch, and over two
        nothing = [rows_of(*[nan] * 8)] * extra, [torch.full((1, 8), -inf)] * extra
        check([outs[0], *nothing[0], outs[1]], [lses[0], *nothing[1], lses[1]])
        check([outs[1], *nothing[0], outs[0]], [lses[1], *nothing[1], lses[0]])


def test_what_the_contract_refuses_raises_before_a_launch() -> None:
    outs, lses = make_parts(2, (1, 2, 8), "float32", 0.0, seed=3)
    emulated = Emulated(device(2), emulator.Options())
    with pytest.raises(ArgumentError, match="lses"):
        states.merge_states(emulated.engine, outs, [lses[0], lses[1].double()])
    assert not emulated.configs


def test_an_older_device_gets_the_definition_and_explain_says_so() -> None:
    outs, lses = make_parts(2, (1, 2, 8), "float32", 0.3, seed=3)
    emulated = Emulated(Device((7, 5), 2, 65_536), emulator.Options())
    engine = emulated.engine
    out, lse = states.merge_states(engine, outs, lses)
    expected = reference.merge_states(outs, lses)
    assert torch.equal(out, expected[0].float())
    assert torch.equal(lse, expected[1].float())
    assert not emulated.configs
    assert list(engine.chosen) == ["merge_states float32 2 parts"]
    assert "capability 8.0" in engine.chosen["merge_states float32 2 parts"]


def scheduled(lengths: Tensor, *sizes: int, **options: object) -> None:
    emulated = Emulated(device(2), emulator.Options(**options))
    with no_hazards(emulated) as engine:
        found = states.decode_schedule(engine, lengths, *sizes)
    assert not any("definition" in served for served in engine.chosen.values())
    assert found.tolist() == reference.decode_schedule(lengths, *sizes).tolist()


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 300) | st.sampled_from([0, 32, 33, 1 << 20, 2**31 - 1]), max_size=40),
    st.integers(1, 4),
    st.sampled_from([(0, 1), (1, 1), (128, 1), (6, 3), (16, 2)]),
    st.integers(1, 40) | st.sampled_from([128, MAX_PARTS]),
    st.booleans(),
    SEEDS,
    LANDINGS,
)
def test_schedule(
    lengths: list[int], s_q: int, heads: tuple[int, int], parts: int, lay_out: bool, seed: int, landing: str
) -> None:
    tensor = torch.tensor(lengths, dtype=torch.int32)
    if lay_out:
        tensor = strided(tensor, torch.Generator().manual_seed(seed), contiguous_rows=False)
    scheduled(tensor, s_q, *heads, parts, landing=landing)


@pytest.mark.parametrize("parts", [7, MAX_PARTS])
@pytest.mark.parametrize("longest", [1, 5000, 2**31 - 1])
def test_schedule_of_thousands_of_sequences(longest: int, parts: int) -> None:
    lengths = torch.randint(0, longest, (3000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    scheduled(lengths, 1, 16, 1, parts)


def test_no_local_memory() -> None:
    merges = [MergeConfig(dtype, width) for dtype, size in ELEMENT_BYTES.items() for width in (1, 16 // size)]
    for config in (*merges, ScheduleConfig(UNIT, MIN_UNITS, HEADER)):
        built = libraries.build(config, "sm_80")
        assert built.stack_bytes == 0
        assert built.registers <= 64
