"""Views that begin at a symbolic offset: a layer of a slab whose number of pages is not known when compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lowering.compiled import Compiled

flashmla = torch.ops.flashmla
LAYERS, D = 3, 16


def appended(slab: Tensor, other: Tensor, x: Tensor, slots: Tensor) -> None:
    flashmla.append_(slab[1], x * 2, slots)
    flashmla.append_(slab[2, 1:], x * 3, slots)


def appended_to_two(slab: Tensor, other: Tensor, x: Tensor, slots: Tensor) -> None:
    flashmla.append_.two(slab[1], other[2], x * 2, x * 3, slots)


def quantized(slab: Tensor, other: Tensor, x: Tensor, slots: Tensor) -> None:
    flashmla.append_(other.view(torch.uint8)[1], x.repeat(1, 1, 36), slots, "fp8_v32")


def products(slab: Tensor, other: Tensor, x: Tensor, slots: Tensor) -> None:
    """Results written into a layer, and read from it."""
    n = slab.size(1)
    flashmla.gemm.out(x.flatten(0, 1), other[1, 0, :, 0], out=slab[2, 0].flatten()[:16].view(4, 4))
    flashmla.bmm.out(other[1, :, :, 0], slab[0, :, :, 0].mT, out=slab[1].flatten()[: n * 16].view(n, 4, 4))


def read_back(slab: Tensor, other: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    """Attend to rows that were appended to a layer, and write the result into a layer of another slab."""
    n = slab.size(1)
    flashmla.append_(slab[1], x, slots)
    table = torch.arange(n, dtype=torch.int32).view(1, n)
    lengths = torch.full((1,), 4 * n, dtype=torch.int32)
    q = x.view(1, 4, 1, D)
    out, _ = flashmla.decode(q, slab[1], None, table, lengths, D)
    flashmla.append_(other[2], out.view(4, 1, D), slots)
    return out


STEPS: list[Callable[..., Any]] = [appended, appended_to_two, quantized, products, read_back]
CALLS = {"flashmla.fuse_append": False}


def inputs(step: Callable[..., Any], pages: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(pages)
    width = 164 if step is quantized else D
    slabs = [torch.randn(LAYERS, pages, 4, 1, n, generator=generator) for n in (D, width)]
    return *slabs, torch.randn(4, 1, D, generator=generator), torch.tensor([0, -1, 4 * pages - 5, 2])


@pytest.mark.parametrize(
    ("step", "options"),
    [
        *(pytest.param(step, {}, id=step.__name__) for step in STEPS),
        *(pytest.param(step, CALLS, id=f"{step.__name__} by a call") for step in (appended, appended_to_two)),
    ],
)
def test_each_layer_gets_what_is_written_to_it(step: Callable[..., Any], options: dict[str, Any]) -> None:
    compiled = Compiled(step, options, dynamic=True)
    for pages in (5, 9):
        actual, expected = inputs(step, pages), inputs(step, pages)
        torch.testing.assert_close(compiled(*actual), step(*expected))
        for ours, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, right, equal_nan=True)
    assert compiled.compilations == 1


def test_a_dimension_that_is_marked_dynamic_and_a_slab_that_begins_later() -> None:
    """The slab itself is a view, whose own offset comes on top."""
    compiled = Compiled(appended)
    for pages in (5, 9):
        actual, expected = (torch.zeros(LAYERS + 1, pages, 4, 1, D) for _ in range(2))
        _, _, x, slots = inputs(appended, pages)
        slab = actual[1:]
        torch._dynamo.mark_dynamic(slab, 1)
        compiled(slab, slab, x, slots)
        appended(expected[1:], expected, x, slots)
        torch.testing.assert_close(actual, expected)


def test_the_offset_itself() -> None:
    compiled = Compiled(lambda slab: slab.select(0, 2).storage_offset() + slab[1] * 1, dynamic=True)
    for pages in (5, 9):
        slab = torch.ones(LAYERS, pages, 4)
        assert (compiled(slab) == 8 * pages + 1).all()
