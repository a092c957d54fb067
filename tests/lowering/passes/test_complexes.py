"""Products of complex numbers as real arithmetic: right wherever they stand, and left alone where they must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lowering.generated import generate
from tests.lowering.passes.graphs import Rewritten

B, H, S, D = 2, 3, 5, 8


def complex_of(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def real_of(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)


def rope(x: Tensor, turn: Tensor) -> Tensor:
    """As DeepSeek and Llama published it."""
    z = complex_of(x.transpose(1, 2).float())
    return real_of(z * turn.view(1, z.size(1), 1, z.size(-1))).transpose(1, 2).to(x.dtype)


def back(x: Tensor, turn: Tensor) -> Tensor:
    return rope(x, turn.conj())


def in_the_middle(x: Tensor, turn: Tensor) -> Tensor:
    """Moved between products, and read twice."""
    z = (complex_of(x) * turn).permute(0, 2, 1, 3)[:, 1:] * turn[1:, None]
    return real_of(z.flatten(1, 2).unsqueeze(1)) + real_of(z.conj().resolve_conj().reshape(z.size(0), 1, -1, D // 2))


def from_parts(x: Tensor, turn: Tensor) -> Tensor:
    z = torch.complex(x[..., ::2], x[:1, ..., 1::2]) * complex_of(x)
    return torch.view_as_real(z[0, 1]).sum(-1) + real_of(z).sum()


def transposed(x: Tensor, turn: Tensor) -> Tensor:
    """The result shows the strides that eager mode has."""
    return torch.view_as_real((complex_of(x) * turn).transpose(1, 3))


def written_twice(x: Tensor, turn: Tensor) -> Tensor:
    """The product is also read as it is."""
    z = complex_of(x) * turn
    return real_of(z) + z.abs().repeat_interleave(2, dim=-1)


FUNCTIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    rope,
    back,
    in_the_middle,
    from_parts,
    transposed,
    written_twice,
]


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, H, S, D, generator=generator).to(dtype)
    angles = torch.randn(S, D // 2, generator=generator, dtype=torch.float64 if dtype == torch.float64 else None)
    return x, torch.polar(torch.ones_like(angles), angles)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_no_product_is_left(function: Callable[..., Tensor], dynamic: bool) -> None:
    x, turn = drawn()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    rewritten = Rewritten(function)
    same(rewritten(x, turn), function(x, turn))
    assert rewritten.refusals == []
    products = [
        node
        for graph in rewritten.graphs
        for node in graph.graph.nodes
        if node.target == torch.ops.aten.mul.Tensor and node.meta["val"].is_complex()
    ]
    assert len(products) == (function is written_twice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_of_every_type(dtype: torch.dtype) -> None:
    x, turn = drawn(dtype)
    function = transposed if dtype == torch.float64 else rope
    rewritten = Rewritten(function)
    same(rewritten(x, turn), function(x, turn))
    assert any(decision.rewritten for record in rewritten.records for decision in record)


OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a real factor": lambda x, turn: real_of(complex_of(x) * x[..., ::2]),
    "a number": lambda x, turn: real_of(complex_of(x) * 2),
    "two types": lambda x, turn: torch.view_as_real(complex_of(x) * turn.to(torch.complex128)),
    "no product": lambda x, turn: real_of(complex_of(x) + turn),
    "nobody reads parts": lambda x, turn: (complex_of(x) * turn).abs(),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_what_is_no_product_of_two_stays(function: Callable[..., Tensor]) -> None:
    x, turn = drawn()
    rewritten = Rewritten(function)
    torch.testing.assert_close(rewritten(x, turn), function(x, turn))
    assert not any(decision.rewritten for record in rewritten.records for decision in record)


def test_numbers_that_are_not_finite_are_as_in_eager() -> None:
    x, turn = drawn()
    x[0, 0, 0, :4] = torch.tensor([torch.inf, 1.0, torch.nan, -torch.inf])
    torch.testing.assert_close(Rewritten(rope)(x, turn), rope(x, turn), equal_nan=True)


def test_a_conjugated_input_is_as_in_eager() -> None:
    x, turn = drawn()
    rewritten = Rewritten(rope)
    same(rewritten(x, turn.conj()), rope(x, turn.conj()))


def test_a_gradient_is_refused() -> None:
    x, turn = drawn()
    with torch.enable_grad():
        x.requires_grad_()
        rewritten = Rewritten(rope)
        rewritten(x, turn).sum().backward()
    assert x.grad is not None
    assert rewritten.refusals
    assert all("gradient" in refusal for refusal in rewritten.refusals)


def test_inductor_generates_code_in_place_of_calls() -> None:
    generated = generate(rope, *drawn())
    assert "aten.mul" in generated.stock[0]
    assert "aten.mul" not in generated.ours[0]
    assert [decision.pattern for decision in generated.fired] == ["complex product -> real arithmetic"]


def test_results_that_share_memory_go_on_doing_so() -> None:
    def both(x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        z = complex_of(x) * turn
        return torch.view_as_real(z), z.real

    compiled = Rewritten(both)
    one, other = compiled(*drawn())
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert any("share" in refusal for refusal in compiled.refusals)
