"""Loops that append and do other work too: tiles in two dimensions, their scalar tails, buffers updated in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lowering.compiled import Compiled
from tests.support.poison import same_bits

N, D, SLOTS = 17, 51, 40  # tiles end in narrower vectors, and in scalar loops


def transposed(cache: Tensor, x: Tensor, state: Tensor, slots: Tensor) -> None:
    """Rows are read across, and another tensor is updated in place with them."""
    rows = torch.where(state > -9, x.t(), 0.0)
    torch.ops.flashmla.append_(cache, rows.unsqueeze(1), slots)
    state.add_(rows)


def updated_first(cache: Tensor, x: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """The updated tensor is what is appended, so that one loop writes both."""
    state.add_(torch.where(x.t() > 0, x.t(), 0.0))
    torch.ops.flashmla.append_(cache, state.unsqueeze(1) * 3, slots)
    return state * 2


def normed(cache: Tensor, x: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """A reduction over a tile, whose result is appended."""
    rows = F.layer_norm(x.t() + state, state.shape[1:])
    torch.ops.flashmla.append_(cache, rows.unsqueeze(1), slots)
    return state.mul_(0.5)


def reduced_across(cache: Tensor, x: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """Each row is the sum of something read along another dimension than it is written along."""
    rows = (x.unsqueeze(0) + state.unsqueeze(1)[..., :1]).sum(0)
    torch.ops.flashmla.append_(cache, rows.t().unsqueeze(1), slots)
    return state.add_(rows.t().amax(1, keepdim=True))


def two_dtypes(cache: Tensor, x: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    rows = (x.t().double() * 2).to(cache.dtype)
    torch.ops.flashmla.append_(cache, rows.unsqueeze(1), slots)
    return state.copy_(rows + x.t().double())


STEPS: list[Callable[..., Tensor | None]] = [transposed, updated_first, normed, reduced_across, two_dtypes]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(SLOTS, generator=generator)[:N]
    slots[1], slots[5] = -1, slots[6]
    cache = torch.full((SLOTS // 4, 4, 1, D), torch.nan, dtype=dtype)
    return cache, torch.randn(D, N, generator=generator), torch.randn(N, D, generator=generator), slots


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_an_append_beside_transposed_reads_and_updates_in_place(step: Callable[..., Any]) -> None:
    actual, expected = inputs(), inputs()
    out = Compiled(step)(*actual)
    torch.testing.assert_close(out, step(*expected), atol=1e-5, rtol=1e-5)
    for ours, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert torch.equal(actual[0].isnan(), expected[0].isnan())


def test_rows_of_a_narrow_type_read_across() -> None:
    def step(cache: Tensor, x: Tensor, state: Tensor, slots: Tensor) -> None:
        torch.ops.flashmla.append_(cache, x.t().to(cache.dtype).unsqueeze(1), slots)

    actual, expected = inputs(torch.bfloat16), inputs(torch.bfloat16)
    Compiled(step)(*actual)
    step(*expected)
    assert same_bits(actual[0], expected[0])
