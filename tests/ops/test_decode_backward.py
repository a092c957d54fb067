"""`flashmla::decode_backward` against its definition, which is held against finite differences."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from flashmla_ops import cpu, reference
from flashmla_ops.errors import NotDifferentiableError
from tests import strategies
from tests.ops.test_opcheck import check as opcheck
from tests.support.cases import DecodeCase, build
from tests.support.gradients import defined, largest, problem, score_size
from tests.support.poison import strided

ISAS = [name for name, supported in cpu.STATE.isas.items() if supported]
NAMES = ("dq", "dkv_cache", "dk_cache", "dattn_sink")
LAYOUTS = {
    "mla": {"d": 40, "d_v": 32},
    "mla_two": {"d": 32, "d_v": 32, "d_k": 8},
    "gqa": {"d": 56, "d_v": 24, "qk_start": 24, "h_kv": 2},
    "gqa_two": {"d": 24, "d_v": 24, "qk_start": 24, "d_k": 32, "h_kv": 2},
    "overlapping": {"d": 19, "d_v": 13, "qk_start": 5, "d_k": 3, "h_kv": 3},
}
SMALL = {
    "mla": {"d": 5, "d_v": 3},
    "mla_two": {"d": 4, "d_v": 4, "d_k": 2},
    "gqa": {"d": 6, "d_v": 3, "qk_start": 3, "h_kv": 2},
    "gqa_two": {"d": 3, "d_v": 3, "qk_start": 3, "d_k": 4, "h_kv": 2},
    "overlapping": {"d": 5, "d_v": 4, "qk_start": 2, "d_k": 2, "h_kv": 3},
}


def call(case: DecodeCase, *, dlse: bool = True) -> dict[str, Any]:
    """The arguments of the backward of a case."""
    inputs = build(case)
    generator = torch.Generator().manual_seed(case.seed)
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    gradient = torch.randn(lse.shape, generator=generator) if dlse else None
    if case.strided:
        dout, out, lse = (strided(x, generator, contiguous_rows=False) for x in (dout, out, lse))
    return inputs.reference_kwargs() | {"dout": dout, "dlse": gradient, "out": out, "lse": lse}


def check(case: DecodeCase, *, dlse: bool = True) -> None:
    arguments = call(case, dlse=dlse)
    found = torch.ops.flashmla.decode_backward(**arguments)
    expected = reference.decode_backward(**arguments)
    q, kv, k, dout, lse = (arguments[name] for name in ("q", "kv_cache", "k_cache", "dout", "lse"))
    dscore = score_size(arguments, kv, case.d_v)
    keys, values = dscore * largest(q), largest(dout)
    sizes = (dscore * max(largest(kv), largest(k)), keys + values, keys, 100 * largest(kv) * values)
    for name, x, y, size in zip(NAMES, found, expected, sizes, strict=True):
        assert (wrong := problem(name, x, y, size, lse)) is None, f"{wrong} | {case!r}"


@settings(max_examples=200)
@given(strategies.decode_cases() | strategies.option_cases())
def test_any_case(case: DecodeCase) -> None:
    check(case, dlse=case.seed % 2 == 0)


@settings(max_examples=10)
@given(strategies.mla_cases())
def test_mla_case(case: DecodeCase) -> None:
    check(case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(isa: str, dtype: str, layout: str) -> None:
    with cpu.using(isa):
        for h_q in (6, 144):  # more than one item of query rows
            for options in ({}, {"window": 40, "softcap": 2.0, "sink": True}):
                sizes = {"s_q": 2, "h_q": h_q, "page_size": 8, "dtype": dtype, "causal": True} | LAYOUTS[layout]
                check(DecodeCase((9, 0, 130), **sizes, **options))


@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize(
    ("sink", "window", "softcap", "s_qs"), [(True, 2, 0.0, None), (False, 0, 0.5, None), (True, 2, 0.5, (4, 0, 1))]
)
def test_the_definition_is_the_derivative(
    layout: str, sink: bool, window: int, softcap: float, s_qs: tuple[int, ...] | None
) -> None:
    options = {"s_q": 3, "h_q": 6, "page_size": 4, "dtype": "float32", "causal": True, "strided": False}
    case = DecodeCase((5, 0, 2), window=window, softcap=softcap, **options, **SMALL[layout])
    options = build(replace(case, s_qs=s_qs)).reference_kwargs()
    tensors = {"q": options.pop("q").double() * 10, "kv_cache": options.pop("kv_cache").nan_to_num(0).double()}
    k_cache, _ = options.pop("k_cache"), options.pop("attn_sink")
    if k_cache is None:
        options["k_cache"] = None
    else:
        tensors["k_cache"] = k_cache.nan_to_num(0).double()
    if sink:
        tensors["attn_sink"] = torch.linspace(-1, 1, case.h_q, dtype=torch.float64)
    options["block_table"][2, 0] = options["block_table"][0, 1]  # a page that two sequences hold
    results = defined(reference.decode, reference.decode_backward, tuple(tensors), options)
    assert torch.autograd.gradcheck(results, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sequences_that_share_pages_add_up(dtype: str) -> None:
    case = DecodeCase((21, 14, 8), h_q=4, page_size=8, d=24, d_v=16, dtype=dtype, strided=False)
    arguments = call(case)
    arguments["block_table"][1, 0] = arguments["block_table"][0, 0]
    arguments["block_table"][2, 0] = arguments["block_table"][0, 1]
    named = {name: x for name, x in arguments.items() if name not in ("dout", "dlse", "out", "lse")}
    arguments["out"], arguments["lse"] = torch.ops.flashmla.decode(**named)
    _, whole, *_ = torch.ops.flashmla.decode_backward(**arguments)
    parts = [reference.decode_backward(**arguments | of_one(arguments, i))[1] for i in range(3)]
    torch.testing.assert_close(whole.double(), sum(parts), rtol=1e-2, atol=1e-2 if dtype == "bfloat16" else 1e-6)


def of_one(arguments: dict[str, Any], i: int) -> dict[str, Any]:
    """Sequence i alone."""
    batched = ("q", "block_table", "cache_seqlens", "dout", "dlse", "out", "lse")
    return {name: arguments[name][i : i + 1] for name in batched}


def test_rows_that_nobody_reads_have_no_gradient_and_give_none() -> None:
    case = DecodeCase((9, 0, 16), h_q=4, page_size=8, d=24, d_v=16)
    inputs = build(case)
    cache = inputs.kv_cache.clone().requires_grad_()
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs(kv_cache=cache))
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert cache.grad.isfinite().all()
    assert cache.grad[cache.isnan()].eq(0).all()


def test_results_do_not_depend_on_threads() -> None:
    arguments = call(DecodeCase((400, 90, 33), s_q=2, h_q=8, h_kv=2, page_size=16, d=48, d_v=32))
    first, threads = torch.ops.flashmla.decode_backward(**arguments), torch.get_num_threads()
    try:
        for n in (2, 4):
            torch.set_num_threads(n)
            assert all(map(torch.equal, first, torch.ops.flashmla.decode_backward(**arguments)))
    finally:
        torch.set_num_threads(threads)


RAGGED = DecodeCase((9, 0, 16, 7), s_qs=(2, 3, 0, 11), h_q=6, page_size=8, d=24, d_v=16, causal=True, sink=True)


def test_ragged_sequences_are_as_alone() -> None:
    arguments = call(replace(RAGGED, strided=False, dtype="float32", window=5))
    dq, dkv, _, dsink = torch.ops.flashmla.decode_backward(**arguments)
    bounds, alone = arguments.pop("cu_seqlens_q").tolist(), []
    for i, (s, e) in enumerate(pairwise(bounds)):
        own = {name: arguments[name][None, s:e] for name in ("q", "dout", "out")}
        own |= {name: arguments[name][None, :, s:e] for name in ("dlse", "lse")}
        own |= {name: arguments[name][i : i + 1] for name in ("block_table", "cache_seqlens")}
        if e > s:
            alone.append(torch.ops.flashmla.decode_backward(**arguments | own))
    assert torch.equal(dq, torch.cat([each[0][0] for each in alone]))
    assert torch.equal(dkv, sum(each[1] for each in alone))  # they share no page
    torch.testing.assert_close(dsink, sum(each[3] for each in alone))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ragged_queries_through_a_compiled_step(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    inputs = build(replace(RAGGED, strided=False, dtype="float32"))
    named = inputs.kwargs(cu_seqlens_q=inputs.cu_seqlens_q.to(dtype), kv_cache=inputs.kv_cache.nan_to_num(0))

    def loss(q: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
        out, lse = torch.ops.flashmla.decode(**named | {"q": q, "kv_cache": kv_cache})
        return out.square().sum() + lse.where(lse.isfinite(), 0.0).sum()

    found = []
    for step in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)):
        leaves = [named[name].clone().requires_grad_() for name in ("q", "kv_cache")]
        found.append(torch.autograd.grad(step(*leaves), leaves))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(named["q"], named["kv_cache"]), found[0])


def test_bytes_have_no_gradient() -> None:
    q = torch.randn(1, 1, 4, 576, requires_grad=True)
    cache = torch.zeros(2, 8, 1, 656, dtype=torch.uint8)
    tables = (torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    with pytest.raises(NotDifferentiableError, match="no gradient for it with row_format"):
        torch.ops.flashmla.decode(q, cache, None, *tables, 512, row_format="fp8_v32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["mla_two", "gqa"])
@pytest.mark.parametrize("s_qs", [None, (2, 0, 5)])
def test_opcheck(dtype: str, layout: str, s_qs: tuple[int, ...] | None) -> None:
    options = {"s_q": 2, "s_qs": s_qs, "causal": True, "sink": True}
    case = DecodeCase((9, 0, 16), h_q=6, page_size=8, dtype=dtype, **options, **LAYOUTS[layout])
    opcheck(torch.ops.flashmla.decode_backward.default, **call(case))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dout", lambda x: x[:, :, :-1], "argument 'dout': expected shape"),
        ("lse", lambda x: x.double(), "argument 'lse': expected float32, got float64"),
        ("wanted", lambda _: -1, "argument 'wanted': expected a sum of 1, 2, 4 and 8, got -1"),
        (
            "cache_seqlens",
            lambda x: x + 99,
            r"decode_backward: argument 'cache_seqlens': expected lengths in \[0, 24\]",
        ),
        ("block_table", lambda x: x + 99, r"argument 'block_table': expected pages in \[0, 6\)"),
    ],
)
def test_misuse(name: str, change: Any, message: str) -> None:
    arguments = call(DecodeCase((9, 0, 16), h_q=6, page_size=8, d=24, d_v=16, strided=False)) | {"wanted": 15}
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flashmla.decode_backward(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cu_seqlens_q", lambda x: x + 1, r"argument 'cu_seqlens_q': expected 0 at \[0\], got 1"),
        ("cu_seqlens_q", lambda x: x.clamp(max=9), r"expected 16 at \[4\], the number of tokens, got 9"),
        ("cu_seqlens_q", lambda x: x[:-1], "expected 3 sequences, as q"),
        ("dout", lambda x: x[None], "argument 'dout': expected shape"),
        ("dlse", lambda x: x.T, "argument 'dlse': expected shape"),
    ],
)
def test_ragged_misuse(name: str, change: Any, message: str) -> None:
    arguments = call(RAGGED)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flashmla.decode_backward(**arguments | {name: change(arguments[name])})
