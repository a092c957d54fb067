"""Every instruction set this processor runs gives the reference's results, not only the one that is active."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from flashmla_ops import cpu
from flashmla_ops.errors import ArgumentError
from tests import strategies
from tests.support.cases import DecodeCase, build
from tests.support.oracle import check_decode

RUNNABLE = [name for name, supported in cpu.STATE.isas.items() if supported]
pytestmark = pytest.mark.skipif(not RUNNABLE, reason=f"no C++ kernels: {cpu.STATE.reason}")
same_isa_for_all_examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=RUNNABLE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.using(request.param):
        yield request.param


@settings(same_isa_for_all_examples, max_examples=200)
@given(case=strategies.decode_cases())
def test_any_case(isa: str, case: DecodeCase) -> None:
    check_decode(case)


@settings(same_isa_for_all_examples, max_examples=100)
@given(case=strategies.option_cases())
def test_any_options(isa: str, case: DecodeCase) -> None:
    check_decode(case)


@settings(same_isa_for_all_examples, max_examples=25)
@given(case=strategies.mla_cases())
def test_mla_case(isa: str, case: DecodeCase) -> None:
    check_decode(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_and_written_exactly(isa: str, dtype: torch.dtype) -> None:
    """Attention to one token returns its row: all 65,536 bit patterns, NaN as NaN.

    But for subnormal bf16 (below 2**-126), which the AVX512_BF16 instructions take and return as zero.
    """
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = torch.cat(
        [values.view(-1, 1, 1, 256), values.new_zeros(256, 1, 1, 1)], dim=-1
    )  # the key is the last element
    block_table = torch.arange(256, dtype=torch.int32)[:, None]
    lengths = torch.ones(256, dtype=torch.int32)
    for heads in (1, 16):  # both mappings of rows to lanes
        out, lse = torch.ops.flashmla.decode(
            values.new_zeros(256, 1, heads, 1), rows, None, block_table, lengths, 256, qk_start=256
        )
        expected = rows[:, 0, 0, None, None, :256].expand_as(out)
        if isa == "avx512_bf16" and dtype == torch.bfloat16:
            smallest = torch.finfo(dtype).tiny
            expected = torch.where((expected.abs() < smallest) & (out == 0), 0, expected)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert lse.eq(0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("h_q", [1, 16])
def test_repeats_bit_for_bit(isa: str, dtype: str, h_q: int) -> None:
    inputs = build(DecodeCase((700, 0, 33), h_q=h_q, dtype=dtype, num_parts=5))
    first = torch.ops.flashmla.decode(**inputs.kwargs())
    for _ in range(5):
        assert all(map(torch.equal, first, torch.ops.flashmla.decode(**inputs.kwargs())))


def test_an_unknown_instruction_set_is_refused() -> None:
    active = cpu.STATE.active
    with pytest.raises(ArgumentError, match="avx1024"), cpu.using("avx1024"):
        pass
    assert cpu.STATE.active == active
