"""FlashMLA: growing sequences attend to exactly the rows appended to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from flashmla import FlashMLA
from flashmla_ops.errors import ArgumentError, NotDifferentiableError, OutOfPagesError

D_C, D_R = 16, 4


def module(**options: Any) -> FlashMLA:
    return FlashMLA(**{"d_c": D_C, "d_r": D_R, "n_pages": 12, "page_size": 4, "softmax_scale": 0.3} | options)


def inputs(b: int, s_q: int, h_q: int = 3, h_kv: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(b, s_q, h_q, D_C + D_R, generator=generator)
    return q, torch.randn(b, s_q, h_kv, D_C + D_R, generator=generator)


def attention(q: Tensor, rows: Tensor) -> Tensor:
    """Causal attention of one sequence in plain torch: q [s_q, h_q, d], rows [t, h_kv, d] to [s_q, h_q, D_C]."""
    key = rows.repeat_interleave(q.shape[1] // rows.shape[1], dim=1)
    scores = torch.einsum("shd,thd->hst", q, key) * 0.3
    future = torch.arange(rows.shape[0]) > torch.arange(q.shape[0])[:, None] + rows.shape[0] - q.shape[0]
    return torch.einsum("hst,thd->shd", scores.masked_fill(future, -torch.inf).softmax(dim=-1), key[..., :D_C])


@pytest.mark.parametrize("h_kv", [1, 3])
def test_sequences_of_different_lengths(h_kv: int) -> None:
    mla = module(h_kv=h_kv)
    history: dict[str, Tensor] = {}
    for seed, (names, s_q) in enumerate([(["a"], 5), (["b"], 1), (["b", "a"], 2), (["c", "a", "b"], 1)]):
        q, rows = inputs(len(names), s_q, h_kv=h_kv, seed=seed)
        out, lse = mla(q, rows, names)
        assert lse.shape == (len(names), 3, s_q)
        for i, name in enumerate(names):
            history[name] = torch.cat([history.get(name, rows[i, :0]), rows[i]])
            torch.testing.assert_close(out[i], attention(q[i], history[name]))


def test_fork_shares_until_one_grows() -> None:
    mla = module()
    q, rows = inputs(1, 6)
    mla(q, rows, ["a"])
    mla.tables.fork("a", "b")
    assert mla.tables.allocator.n_free == 10
    q, more = inputs(2, 1, seed=1)
    out, _ = mla(q, more, ["a", "b"])
    for i in range(2):
        torch.testing.assert_close(out[i], attention(q[i], torch.cat([rows[0], more[i]])))


def test_one_graph_for_all_lengths() -> None:
    mla = module()
    q, rows = inputs(1, 5)
    mla(q, rows, ["a"])
    counters.clear()
    attend = torch.compile(mla.attend, fullgraph=True)
    for seed in range(1, 12):
        q, row = inputs(1, 1, seed=seed)
        step = mla.plan(["a"], 1)
        torch._dynamo.mark_dynamic(step.block_table, 1)
        out, _ = attend(q, row, step)
        rows = torch.cat([rows, row], dim=1)
        torch.testing.assert_close(out[0], attention(q[0], rows[0]))
    assert counters["stats"]["unique_graphs"] == 1


def test_the_cache_is_no_part_of_the_state() -> None:
    mla = module()
    assert not mla.state_dict()
    assert mla.to(torch.bfloat16).slab.dtype == torch.bfloat16
    assert "n_pages=12, page_size=4" in repr(mla)


def test_a_full_pool_changes_nothing() -> None:
    mla = module(n_pages=2)
    mla(*inputs(1, 6), ["a"])
    with pytest.raises(OutOfPagesError):
        mla(*inputs(2, 3), ["a", "b"])
    assert mla.tables.length("a") == 6
    assert "b" not in mla.tables


@pytest.mark.parametrize(
    ("argument", "q", "rows"),
    [
        ("q", torch.zeros(2, 1, 3, 20), torch.zeros(1, 1, 1, 20)),
        ("q", torch.zeros(1, 0, 3, 20), torch.zeros(1, 0, 1, 20)),
        ("q", torch.zeros(1, 1, 3, 19), torch.zeros(1, 1, 1, 20)),
        ("q", torch.zeros(1, 1, 20), torch.zeros(1, 1, 1, 20)),
        ("q", torch.zeros(1, 1, 3, 20, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 20)),
        ("rows", torch.zeros(1, 1, 3, 20), torch.zeros(1, 2, 1, 20)),
        ("rows", torch.zeros(1, 1, 3, 20), torch.zeros(1, 1, 2, 20)),
        ("rows", torch.zeros(1, 1, 3, 20), torch.zeros(1, 1, 1, 20, dtype=torch.float16)),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(argument: str, q: Tensor, rows: Tensor) -> None:
    mla = module()
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        mla(q, rows, ["a"])
    assert "a" not in mla.tables


def test_gradient() -> None:
    mla = module()
    q, rows = inputs(1, 1)
    with pytest.raises(NotDifferentiableError, match="'rows'"):
        mla(q, rows.requires_grad_(), ["a"])
    assert "a" not in mla.tables


def test_dtype_without_a_kernel() -> None:
    with pytest.raises(ArgumentError, match="argument 'dtype'"):
        module(dtype=torch.float64)


@pytest.mark.parametrize("size", ["d_c", "h_kv", "n_pages", "page_size"])
def test_sizes_below_one(size: str) -> None:
    with pytest.raises(ArgumentError, match=size):
        module(**{size: 0})
