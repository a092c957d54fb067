"""Sequences whose pages lie on several ranks are attended to as in one process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashmla_ops.errors import ArgumentError, NotDifferentiableError
from flashmla_ops.parallel import context_parallel_decode, local_lengths, local_slots, local_table
from flashmla_ops.parallel.local import LocalRanks


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (0, 1, 8, 9, 37)  # some leave ranks without a row
    s_q: int = 1
    h_q: int = 8
    h_kv: int = 1
    causal: bool = False
    sink: float | None = None  # how far sinks lie apart, or infinite
    softcap: float = 0.0


PAGE, D, D_V = 8, 40, 32
CASES = [
    Case(),
    Case(s_q=3, causal=True),
    Case(s_q=3, causal=True, sink=1.0, softcap=20.0),
    Case(s_q=12, causal=True, h_kv=2),
    Case(s_q=2, sink=1.0, h_kv=4),
    Case(sink=torch.inf),
    Case(sink=-torch.inf),
]


def appended_everywhere(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows written by `append_` into a cache of all pages, and into this rank's own, with the tables of both."""
    b, most = len(case.lengths), 8
    generator = torch.Generator().manual_seed(3)
    pages = torch.randperm(b * most, generator=generator).to(torch.int32).view(b, most)
    whole = torch.full((b * most, PAGE, case.h_kv, D), torch.nan)
    own = whole.clone()
    # A rank numbers its pages as it likes: in a pool of its own, in another order.
    columns = local_table(pages, dist.get_world_size(), dist.get_rank()).size(1)
    table = torch.arange(b * columns, dtype=torch.int32).view(b, columns).flip(1).contiguous()
    for i, length in enumerate(case.lengths):
        rows = torch.randn(length, case.h_kv, D, generator=generator)
        at = torch.arange(length)
        torch.ops.flashmla.append_(whole, rows, pages[i, at // PAGE].long() * PAGE + at % PAGE)
        torch.ops.flashmla.append_(own, rows, local_slots(table, torch.full_like(at, i), at, PAGE))
    q = torch.randn(b, case.s_q, case.h_q, D, generator=generator)
    return q, whole, pages, own, table, torch.tensor(case.lengths, dtype=torch.int32)


def attend(case: Case) -> tuple[Tensor, Tensor]:
    """The largest differences between the whole in one process and its parts on all ranks."""
    q, whole, pages, own, table, lengths = appended_everywhere(case)
    sink = None
    if case.sink is not None:
        sink = torch.randn(case.h_q, generator=torch.Generator().manual_seed(4)).abs() * case.sink
    options = {"causal": case.causal, "attn_sink": sink, "softcap": case.softcap}
    expected = torch.ops.flashmla.decode(q, whole, None, pages, lengths, D_V, **options)
    out, lse = context_parallel_decode(q, own, None, table, lengths, D_V, **options)
    torch.testing.assert_close(out, expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, expected[1], atol=1e-6, rtol=1e-6)
    return out, lse


def refuse() -> None:
    q, _, _, own, table, lengths = appended_everywhere(Case())
    with pytest.raises(NotDifferentiableError):
        context_parallel_decode(q.requires_grad_(), own, None, table, lengths, D_V)
    q = q.detach()
    with pytest.raises(ArgumentError, match=r"'cache_seqlens': expected lengths in \[0, \d+\], got 999 at \[0\]"):
        context_parallel_decode(q, own, None, table, lengths + 999, D_V)
    with pytest.raises(ArgumentError, match="'window': expected 0: it is not served over ranks, got 4"):
        context_parallel_decode(q, own, None, table, lengths, D_V, window=4)
    with pytest.raises(ArgumentError, match="'positions'"):
        local_slots(table, torch.tensor([0]), torch.tensor([999 * PAGE * dist.get_world_size()]), PAGE)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_on_one_rank(ranks: int) -> None:
    lengths = torch.arange(70)
    parts = torch.stack([local_lengths(lengths, PAGE, ranks, rank) for rank in range(ranks)])
    owners = torch.stack([(lengths // PAGE % ranks == rank).cumsum(0) for rank in range(ranks)])
    assert torch.equal(parts.sum(0), lengths)
    assert torch.equal(parts[:, 1:], owners[:, :-1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_in_one_process(two: LocalRanks, case: Case) -> None:
    (out, lse), *others = two.run(attend, case)
    for other in others:
        assert torch.equal(out, other[0])
        assert torch.equal(lse, other[1])


def test_refusals(two: LocalRanks) -> None:
    two.run(refuse)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_four_ranks(four: LocalRanks, case: Case) -> None:
    four.run(attend, case)
