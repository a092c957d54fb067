"""The comparison itself: what is accepted where eager float16 overflows, and what is not."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.fuzz.compare import Expected, Observation
from tests.lowering.fuzz.program import Program, Step
from tests.lowering.fuzz.wide import widened

HALF = "dtype=torch.float16"


def attention(factor: float, *steps: str) -> Program:
    """Softmax of the scores ``s`` that ``steps`` change; ``q`` times 12000 overflows float16."""
    setup = (
        Step("q", f"torch.randn(1, 2, 3, 16, {HALF}) * {factor}"),
        Step("k", f"torch.randn(1, 2, 9, 16, {HALF})"),
        Step("v", f"torch.randn(1, 2, 9, 16, {HALF})"),
    )
    named = [Step(*code.split(" = ")) for code in steps]
    body = (Step("s", "q @ k.mT"), *named, Step("y", "torch.softmax(s, -1) @ v"))
    return Program("attention", setup, ("q", "k", "v"), body, ("y",), ({},))


def verdict(program: Program, output: torch.Tensor) -> list[str]:
    expected = Expected(program, 0)
    seen = expected.seen
    actual = Observation(outputs=[output], inputs=seen.inputs, bumped=seen.bumped, shared=seen.shared)
    return [difference.kind for difference in expected.differences(actual)]


def in_float32(program: Program) -> torch.Tensor:
    """The result of a kernel that keeps scores in float32, rounded to float16 at the end."""
    setup, function = program.build()
    (result,) = function(*(x.float() for x in setup(0)))
    return result.half()


def test_right_numbers_where_eager_overflows() -> None:
    program = attention(12000)
    result = in_float32(program)
    assert Expected(program, 0).seen.outputs[0].isnan().any()
    assert result.isfinite().all()
    assert not verdict(program, result)


@pytest.mark.parametrize("change", [lambda x: x + 0.5, lambda x: x.flip(2), torch.zeros_like])
def test_other_finite_numbers_are_wrong(change) -> None:
    program = attention(12000)
    assert verdict(program, change(in_float32(program))) == ["values of output 0"]


def test_selected_by_numbers_that_overflow() -> None:
    """Eager selects nothing among NaN; how many numbers there are is right, and so are the numbers."""
    program = attention(12000).but(outputs=("x",))
    program = program.but(steps=(*program.steps, Step("x", "torch.masked_select(y, y < 1e6)")))
    result = in_float32(program)
    assert len(Expected(program, 0).seen.outputs[0]) < len(result)
    assert not verdict(program, result)
    assert verdict(program, result + 0.5) == verdict(program, result[1:]) == ["shape of output 0"]


def test_large_scores_in_float32() -> None:
    """Two scores of tens of thousands, alike up to their rounding: whatever rounds otherwise shares them otherwise."""
    setup = (Step("q", "torch.randn(2, 2, 70, 24) * 12000"), Step("k", "torch.randn(2, 2, 130, 24)"))
    setup = (*setup, Step("v", "torch.randn(2, 2, 130, 24)"))
    steps = (Step("y", "F.scaled_dot_product_attention(q, k, v, torch.ones(70, 130, dtype=torch.bool).tril(60))"),)
    program = Program("attention", setup, ("q", "k", "v"), steps, ("y",), ({},))
    build, function = program.build()
    (exact,) = function(*(x.double() for x in build(0)))
    assert not verdict(program, exact.float())
    assert verdict(program, exact.float() + 0.1) == ["values of output 0"]


def test_finite_numbers_where_no_width_gives_any() -> None:
    """A row that sees nothing is NaN in float32 too."""
    program = attention(12000, "s = s.masked_fill(torch.ones(9, dtype=torch.bool), -math.inf)")
    assert in_float32(program).isnan().all()
    assert verdict(program, torch.zeros(1, 2, 3, 16, dtype=torch.float16)) == ["values of output 0"]


def test_no_width_excuses_what_eager_computes() -> None:
    program = attention(1)
    result = in_float32(program)
    assert not verdict(program, result)
    assert verdict(program, result.index_fill(2, torch.tensor(1), torch.nan)) == ["values of output 0"]


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("torch.arange(2052).to(torch.float16)[2049:2050]", 2048.0),  # positions round
        ("torch.zeros(1, dtype=torch.float16) + torch.finfo(torch.float16).min", -65504.0),
        ("torch.full((1,), -1e9).to(torch.float16)", -torch.inf),
        ("k.new_zeros(1) + torch.finfo(s.dtype).min", -65504.0),
    ],
)
def test_positions_and_masks_keep_their_values(code: str, value: float) -> None:
    program = attention(1, f"m = {code}").but(outputs=("m", "y"))
    wide = widened(program)
    assert wide is not None
    setup, function = wide.build()
    made, result = function(*setup(0))
    assert (made.dtype, made.item(), result.dtype) == (torch.float32, value, torch.float32)


def test_programs_without_float16_have_no_wider_one() -> None:
    program = attention(1)
    floats = tuple(Step(step.name, step.code.replace("float16", "bfloat16")) for step in program.setup)
    assert widened(program.but(setup=floats)) is None
