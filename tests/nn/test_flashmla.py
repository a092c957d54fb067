"""FlashMLA: growing sequences attend to exactly the rows appended to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flashmla import FlashMLA
from flashmla_ops.errors import ArgumentError, NotDifferentiableError, OutOfPagesError
from flashmla_ops.kv_cache import KVPool

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
    opened = {name: mla.pool.open() for name in "abc"}
    history: dict[str, Tensor] = {}
    for seed, (names, s_q) in enumerate([(["a"], 5), (["b"], 1), (["b", "a"], 2), (["c", "a", "b"], 1)]):
        q, rows = inputs(len(names), s_q, h_kv=h_kv, seed=seed)
        out, lse = mla(q, rows, [opened[name] for name in names])
        assert lse.shape == (len(names), 3, s_q)
        for i, name in enumerate(names):
            history[name] = torch.cat([history.get(name, rows[i, :0]), rows[i]])
            torch.testing.assert_close(out[i], attention(q[i], history[name]))


def test_fork_shares_until_one_grows() -> None:
    mla = module()
    a = mla.pool.open()
    q, rows = inputs(1, 6)
    mla(q, rows, [a])
    b = mla.pool.fork(a)
    assert mla.pool.stats().free == 10
    q, more = inputs(2, 1, seed=1)
    out, _ = mla(q, more, [a, b])
    for i in range(2):
        torch.testing.assert_close(out[i], attention(q[i], torch.cat([rows[0], more[i]])))


@pytest.mark.parametrize("format", ["native", "fp8_v32"])
def test_the_layers_of_a_model_share_a_pool_and_a_step(format: str) -> None:
    """Layers of different pages, too: their block tables differ, their slots do not."""
    widths = {"d_c": 512, "d_r": 64} if format != "native" else {"d_c": D_C, "d_r": D_R}
    d = sum(widths.values())
    pool = KVPool(3, n_pages=6, d=d, page_size=[4, 8, 2], format=format)
    layers = [FlashMLA(**widths, pool=pool, layer=i, softmax_scale=0.3) for i in range(3)]
    alone = FlashMLA(**widths, pool=KVPool(n_pages=6, d=d, page_size=8, format=format), softmax_scale=0.3)
    one, two = [pool.open(), pool.open()], [alone.pool.open(), alone.pool.open()]
    for seed, s_q in enumerate((5, 1, 2, 9)):
        q, rows = torch.randn(2, s_q, 3, d), torch.randn(2, s_q, 1, d, generator=torch.Generator().manual_seed(seed))
        expected, _ = alone(q, rows, two)
        with pool.step(one, s_q) as step:
            for layer in layers:
                torch.testing.assert_close(layer.attend(q, rows, step)[0], expected)


def test_one_graph_for_all_lengths() -> None:
    """A thousand steps of a growing batch; and a sequence that leaves, another that comes, change nothing."""
    mla = module(n_pages=520, page_size=4)
    sequences = [mla.pool.open(), mla.pool.open()]
    counters.clear()
    attend = torch.compile(mla.attend, fullgraph=True)
    history = [torch.empty(0, 1, D_C + D_R), torch.empty(0, 1, D_C + D_R)]
    for seed in range(1000):
        if seed == 600:
            mla.pool.release(sequences[0])
            sequences[0], history[0] = mla.pool.open(), history[0][:0]
        q, row = inputs(2, 1, seed=seed)
        with mla.pool.step(sequences) as step:
            out, _ = attend(q, row, step)
        history = [torch.cat(each) for each in zip(history, row, strict=True)]
        if seed % 50 == 0:
            for i in range(2):
                torch.testing.assert_close(out[i], attention(q[i], history[i]))
    assert counters["stats"]["unique_graphs"] == 1


def test_the_cache_is_no_part_of_the_state() -> None:
    mla = module()
    assert not mla.state_dict()
    assert mla.to(torch.bfloat16).slab.dtype == torch.bfloat16
    assert mla.pool.cache().data_ptr() == mla.slab.data_ptr()
    assert "n_pages=12, page_size=4" in repr(mla)


def test_a_pool_moves_once_with_all_of_its_layers() -> None:
    pool = KVPool(2, n_pages=4, d=D_C + D_R)
    model = nn.Sequential(*(FlashMLA(d_c=D_C, d_r=D_R, pool=pool, layer=i) for i in range(2)))
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        for i, layer in enumerate(model):
            assert layer.slab is pool.storage.slabs[i][0]
            assert layer.slab.dtype == pool.storage.layers[i].dtype == dtype


def test_a_copy_has_rows_of_its_own() -> None:
    mla = module()
    sequence = mla.pool.open()
    q, rows = inputs(1, 6)
    mla(q, rows, [sequence])
    other, same = copy.deepcopy((mla, sequence))
    assert other.slab is other.pool.storage.slabs[0][0]
    for seed, (layer, each) in enumerate([(mla, sequence), (other, same)]):
        q, more = inputs(1, 3, seed=seed)
        out, _ = layer(q, more, [each])
        torch.testing.assert_close(out[0], attention(q[0], torch.cat([rows[0], more[0]])))


def test_a_full_pool_changes_nothing() -> None:
    mla = module(n_pages=2)
    a, b = mla.pool.open(), mla.pool.open()
    mla(*inputs(1, 6), [a])
    with pytest.raises(OutOfPagesError):
        mla(*inputs(2, 3), [a, b])
    assert (a.length, b.length) == (6, 0)


def test_a_failing_layer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mla = module()
    a = mla.pool.open()
    mla(*inputs(1, 6), [a])
    monkeypatch.setattr(mla, "attend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mla(*inputs(1, 3), [a])
    assert (a.length, mla.pool.stats().used, mla.pool.stats().open_steps) == (6, 2, 0)


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
    a = mla.pool.open()
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        mla(q, rows, [a])
    assert a.length == 0


def test_gradient() -> None:
    mla = module()
    q, rows = inputs(1, 1)
    a = mla.pool.open()
    with pytest.raises(NotDifferentiableError, match="'rows'"):
        mla(q, rows.requires_grad_(), [a])
    assert a.length == 0


def test_dtype_without_a_kernel() -> None:
    with pytest.raises(ArgumentError, match="argument 'dtype'"):
        module(dtype=torch.float64)


@pytest.mark.parametrize("size", ["d_c", "h_kv", "n_pages", "page_size"])
def test_sizes_below_one(size: str) -> None:
    with pytest.raises(ArgumentError, match=size):
        module(**{size: 0})


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"layer": 1}, "layer"),
        ({"d_r": 5}, "pool"),
        ({"h_kv": 2}, "pool"),
        ({"n_pages": 3}, "pool"),
        ({"dtype": torch.bfloat16}, "pool"),
    ],
)
def test_a_pool_that_does_not_fit(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        FlashMLA(**{"d_c": D_C, "d_r": D_R, "pool": KVPool(n_pages=2, d=D_C + D_R)} | options)
