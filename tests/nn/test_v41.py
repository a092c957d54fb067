"""`v41_attention` in eager mode: what it casts against float64, how it casts against the row format, and its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import FP8_V41
from flashmla_ops.nn import rotated, v41_attention
from flashmla_ops.nn.v41 import cast
from tests.support.v41 import BlockCase, fault, inputs_of

CASES = [
    BlockCase(),
    BlockCase(s_q=2, h_q=63, norm_eps=1e-6),
    BlockCase(b=1, h_q=5, extra_format=None, dtype="float16"),
    BlockCase(b=3, h_q=9, extra_format="fp8_v41", norm_eps=0.1, dtype="float32"),
    BlockCase(topk=0, h_q=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_what_float64_says_but_for_one_rounding(case: BlockCase) -> None:
    inputs = inputs_of(case)
    codes, scales = inputs.run()
    assert codes.shape == (case.b, case.s_q, case.h_q, 512)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (case.b, case.s_q, case.h_q, 16)
    assert fault(codes, scales, inputs.expected()) is None


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e4, 1e30])
def test_codes_and_scales_are_a_row_of_the_format(size: float) -> None:
    x = torch.randn(3, 2, 512, generator=torch.Generator().manual_seed(0)) * size
    x[0, 0, :32] = 0
    codes, scales = cast(x.split([448, 64], dim=-1))
    assert torch.equal(torch.cat([codes.view(torch.uint8), scales], dim=-1), FP8_V41.quantize(x))


def test_turning_back_undoes_a_turn_and_touches_nothing_else() -> None:
    x, angles = torch.randn(2, 3, 4, 512), torch.randn(2, 3, 1, 32)
    turned = rotated(x, angles.cos(), angles.sin())
    assert torch.equal(turned[..., :448], x[..., :448])
    assert not torch.allclose(turned[..., 448:], x[..., 448:])
    torch.testing.assert_close(rotated(turned, angles.cos(), -angles.sin()), x)


@pytest.mark.parametrize(
    ("name", "shape"), [("cos", (2, 32)), ("cos", (2, 2, 32)), ("cos", (2, 1, 20)), ("sin", (2, 1, 16))]
)
def test_angles_that_do_not_fit_raise(name: str, shape: tuple[int, ...]) -> None:
    inputs = inputs_of(BlockCase(h_q=3))
    q, cos, sin, *rest = inputs.arguments
    given = {"cos": cos, "sin": sin} | {name: torch.zeros(shape)}
    with pytest.raises(ArgumentError, match=rf"v41_attention: argument '{name}': expected .*, got \["):
        v41_attention(q, given["cos"], given["sin"], *rest)


def test_attention_itself_is_checked_by_the_operator() -> None:
    inputs = inputs_of(BlockCase(h_q=3))
    with pytest.raises(RuntimeError, match="row_format"):
        replace(inputs, window=inputs.window._replace(row_format="fp8")).run()
    with pytest.raises(RuntimeError, match="512"):
        replace(inputs, q=inputs.q[..., :500]).run()
