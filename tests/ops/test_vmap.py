"""vmap over the operators is the same as a Python loop over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._library import DEFINED, operator
from tests.support.calls import CALLS, run
from tests.support.cases import DecodeCase, build

CASE = DecodeCase((5, 0, 40), s_q=2, h_q=9, d=24, d_v=16, page_size=8, causal=True, dtype="float32", strided=False)


def attend(q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.flashmla.decode(q, kv_cache, None, block_table, cache_seqlens, CASE.d_v, causal=CASE.causal)


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (2, 0, None, None), (0, 1, 0, 0), (None, 0, None, 0)])
def test_decode(in_dims: tuple[int | None, ...]) -> None:
    inputs = build(CASE)
    plain = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    mapped = [
        x if dim is None else torch.stack([x, x.flip(0) if i == 3 else x * 1, x], dim)
        for i, (x, dim) in enumerate(zip(plain, in_dims, strict=True))
    ]
    if in_dims[3] is not None:  # other lengths need other pages
        mapped[3] = torch.stack([inputs.cache_seqlens, inputs.cache_seqlens // 2, inputs.cache_seqlens])
    out, lse = torch.vmap(attend, in_dims)(*mapped)
    for i in range(3):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(mapped, in_dims, strict=True)]
        expected = attend(*one)
        assert torch.equal(out[i], expected[0])
        assert torch.equal(lse[i], expected[1])


def test_decode_does_not_reach_into_another_cache() -> None:
    inputs = build(CASE)
    caches = torch.stack([inputs.kv_cache, inputs.kv_cache])
    table = inputs.block_table.clone()
    table[2, 0] = inputs.kv_cache.size(0)  # one past the end: the first page of the next cache, were it only added to
    with pytest.raises(RuntimeError, match="block_table"):
        torch.vmap(attend, (None, 0, None, None))(inputs.q, caches, table, inputs.cache_seqlens)


def test_decode_refuses_a_schedule() -> None:
    inputs = build(CASE)
    plan = torch.ops.flashmla.decode_schedule(inputs.cache_seqlens, 2, 9, 1, 2)

    def planned(q: Tensor) -> Tensor:
        table, lengths = inputs.block_table, inputs.cache_seqlens
        return torch.ops.flashmla.decode(q, inputs.kv_cache, None, table, lengths, CASE.d_v, schedule=plan)[0]

    with pytest.raises(RuntimeError, match="argument 'schedule': expected None under vmap"):
        torch.vmap(planned)(torch.stack([inputs.q, inputs.q]))


@pytest.mark.parametrize("batched", [True, False])
def test_merge_states(batched: bool) -> None:
    shape = (2, 3, 4) if batched else (3, 4)
    outs = torch.randn(5, 2, *shape, 8)
    lses = torch.randn(5, 2, *shape).transpose(-1, -2)

    def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.flashmla.merge_states(list(out), list(lse))

    out, lse = torch.vmap(merge)(outs, lses)
    for i in range(5):
        expected = merge(outs[i], lses[i])
        assert torch.equal(out[i], expected[0])
        assert torch.equal(lse[i], expected[1])


B = 3
#: The arguments of each operator that may be mapped, alone and together.
MAPPED = {
    "attend_masked": ("q", "mask"),
    "prefill": ("q", "k", "v"),
    "gemm": ("a", "weight", "bias", "residual", "weight_scale"),
    "bmm": ("a", "weight"),
    "grouped_gemm": ("a", "weight", "offsets"),
    "decode_up": ("q", "weight", "attn_sink"),
    "decode": ("q", "attn_sink"),
    "quantize_rows": ("rows",),
    "dequantize_rows": ("rows",),
    "decode_schedule": ("cache_seqlens",),
}
CASES = [
    (name, chosen)
    for name, names in MAPPED.items()
    for flags in product([False, True], repeat=len(names))
    if (chosen := tuple(x for x, flag in zip(names, flags, strict=True) if flag))
]


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Torch warns where it has to fall back to a loop of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def stacked(x: Tensor, dim: int) -> Tensor:
    """B entries like ``x``; integers are the same in all, so that they stay valid."""
    return torch.stack([x + i if x.is_floating_point() else x for i in range(B)], dim)


def over(name: str, arguments: dict[str, Any], names: tuple[str, ...], dims: dict[str, int]) -> Callable[..., Any]:
    """The operator, vmapped over the arguments of these names."""

    def call(*mapped: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(name, arguments | dict(zip(names, mapped, strict=True))))

    return torch.vmap(call, tuple(dims[x] for x in names))


def entry(mapped: dict[str, Tensor], dims: dict[str, int], i: int) -> dict[str, Tensor]:
    return {name: x.select(dims[name], i) for name, x in mapped.items()}


@pytest.mark.parametrize(("name", "names"), CASES)
@pytest.mark.parametrize("last", [False, True])
def test_every_operator(name: str, names: tuple[str, ...], last: bool) -> None:
    arguments = CALLS[name].arguments()
    dims = {x: arguments[x].dim() if last else 0 for x in names}
    if last:  # rows must stay contiguous
        dims = {x: max(0, dim - 1) for x, dim in dims.items()}
    mapped = {x: stacked(arguments[x], dims[x]) for x in names}
    actual = over(name, arguments, names, dims)(*mapped.values())
    for i in range(B):
        expected = run(name, arguments | entry(mapped, dims, i))
        torch.testing.assert_close([x[i] for x in actual], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemm", "bmm", "prefill", "decode", "quantize_rows"])
def test_maps_of_maps(name: str) -> None:
    first, arguments = next(iter(CALLS[name].arguments())), CALLS[name].arguments()
    x = torch.stack([stacked(arguments[first], 0), stacked(arguments[first], 0) * 2])
    actual = torch.vmap(over(name, arguments, (first,), {first: 0}))(x)
    for i, j in product(range(2), range(B)):
        expected = run(name, arguments | {first: x[i, j]})
        torch.testing.assert_close([y[i, j] for y in actual], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [("cu_seqlens_q",), ("cu_seqlens_q", "cu_seqlens_k"), ("q", "k", "cu_seqlens_k")])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prefill_of_other_boundaries(names: tuple[str, ...], dtype: torch.dtype) -> None:
    arguments, dims = CALLS["prefill"].arguments(), dict.fromkeys(names, 0)
    bounds = torch.tensor([[0, 3, 7], [0, 0, 7], [0, 5, 7]], dtype=dtype)
    mapped = {x: bounds if x.startswith("cu") else stacked(arguments[x], 0) for x in names}
    actual = over("prefill", arguments, names, dims)(*mapped.values())
    for i in range(B):
        expected = run("prefill", arguments | entry(mapped, dims, i))
        torch.testing.assert_close([x[i] for x in actual], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [[0, 3, 6], [1, 3, 7], [0, 8, 7]])
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_prefill_refuses_what_one_entry_would_be_refused_for(name: str, bad: list[int]) -> None:
    bounds = torch.tensor([[0, 3, 7], bad, [0, 5, 7]])
    with pytest.raises(RuntimeError, match=f"argument '{name}'"):
        over("prefill", CALLS["prefill"].arguments(), (name,), {name: 0})(bounds)


@pytest.mark.parametrize("name", ["append_", "append_.two"])
@pytest.mark.parametrize("dim", [0, 1])
def test_append(name: str, dim: int) -> None:
    arguments = CALLS[name].arguments()
    names = (*CALLS[name].mutated, "rows", "slot_mapping")
    dims = dict.fromkeys(names, dim) | {"slot_mapping": 0}
    mapped = {x: stacked(arguments[x], dims[x]) for x in names}
    mapped["slot_mapping"] = torch.tensor([[0, -1, 11], [3, 4, 5], [1, 1, 0]])
    separate = [{x: y.clone() for x, y in entry(mapped, dims, i).items()} for i in range(B)]
    torch.vmap(lambda *x: run(name, arguments | dict(zip(names, x, strict=True)))[0], tuple(dims.values()))(
        *mapped.values()
    )
    for i, one in enumerate(separate):
        run(name, arguments | one)
        assert all(torch.equal(mapped[x].select(dims[x], i), one[x]) for x in CALLS[name].mutated)


@pytest.mark.parametrize("name", ["append_", "append_.two"])
def test_append_refuses_one_cache_for_all(name: str) -> None:
    arguments = CALLS[name].arguments()
    with pytest.raises(ArgumentError, match="argument 'kv_cache': expected a cache for each entry"):
        over(name, arguments, ("rows",), {"rows": 0})(stacked(arguments["rows"], 0))


def test_every_functional_operator_has_a_rule() -> None:
    for name in DEFINED:
        has_rule = torch._C._dispatch_has_kernel_for_dispatch_key(operator(name).name(), "FuncTorchBatched")
        assert has_rule != name.endswith(".out")  # torch has no rules for tensors that only keywords name
