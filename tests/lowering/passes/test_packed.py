"""Positions of one sequence, from which models work out that nothing is packed: the mask is causal and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lowering.passes.attentions import B, inputs
from tests.lowering.passes.graphs import assert_equal_to, dynamic_lengths, operators, rewrite, traced

Positions = Callable[[int], Tensor]


def parts_by_jumps(positions: Tensor) -> Tensor:
    """As transformers does it: a new sequence begins where a position is not one more than the one before."""
    return (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def parts_by_place(positions: Tensor) -> Tensor:
    """The same, looked up with indices."""
    parts = parts_by_jumps(positions)
    rows, columns = torch.arange(positions.shape[0])[:, None], torch.arange(positions.shape[1])[None]
    return parts[rows, columns]


def packed(positions: Positions, parts: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        part = parts(positions(q.shape[2])[None].expand(B, -1))
        same = part[:, None, :, None] == part[:, None, None, :]
        causal = torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & same)

    return attend


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("parts", [parts_by_jumps, parts_by_place])
@pytest.mark.parametrize("start", [0, 7])
def test_one_sequence(start: int, parts: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    q, k, v = inputs(5, 5)
    if dynamic:
        dynamic_lengths(q, k, v)
    function = packed(lambda n: torch.arange(n) + start, parts)
    graph = traced(function, q, k, v, mode="symbolic" if dynamic else "fake")
    assert [decision.rewritten for decision in rewrite(graph)] == [True]
    assert operators(graph) == ["decode"]
    assert_equal_to(graph(q, k, v), function(q.double(), k.double(), v.double()))


SEVERAL: dict[str, Positions] = {
    "two": lambda n: torch.cat([torch.arange(2), torch.arange(n - 2)]),
    "one and the rest": lambda n: torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(n - 1)]),
    "every second": lambda n: 2 * torch.arange(n),
    "backwards": lambda n: torch.arange(n).flip(0),
    "the same": lambda n: torch.full((n,), 3),
    "none before the first": lambda n: F.pad(torch.arange(1, n), (1, 0), value=5),
}


@pytest.mark.parametrize("parts", [parts_by_jumps, parts_by_place])
@pytest.mark.parametrize("name", SEVERAL)
def test_several_sequences(name: str, parts: Callable[[Tensor], Tensor]) -> None:
    """Never a causal mask; what is rewritten reads the mask where it runs."""
    q, k, v = inputs(5, 5)
    function = packed(SEVERAL[name], parts)
    graph = traced(function, q, k, v)
    rewrite(graph)
    assert set(operators(graph)) <= {"attend_masked"}
    assert_equal_to(graph(q, k, v), function(q.double(), k.double(), v.double()))
