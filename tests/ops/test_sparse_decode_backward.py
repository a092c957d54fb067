"""`flashmla::sparse_decode_backward` against its definition, which is held against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from flashmla_ops import cpu
from flashmla_ops.formats import QUANTIZED
from flashmla_ops.ops.sparse import SparseDecode, decode_reference
from flashmla_ops.ops.sparse_decode_backward import SPARSE_DECODE_BACKWARD, SparseDecodeBackward, gradients
from tests import strategies
from tests.ops.test_opcheck import check as opcheck
from tests.support.gradients import answered, defined, largest, problem, score_size
from tests.support.sparse import Rows, SparseCase, build

ISAS = [name for name, supported in cpu.STATE.isas.items() if supported]
NAMES = SPARSE_DECODE_BACKWARD.returns
EXTRA = Rows(5, n_pages=3, page_size=4, lengths=True)
TWO = SparseCase(Rows(7, page_size=3), EXTRA, s_q=2, h_q=6, h_kv=2, d=24, d_v=16)


def call(case: SparseCase) -> dict[str, Any]:
    """The arguments of the backward of a case."""
    named = build(case)
    out, lse = torch.ops.flashmla.sparse_decode(**named)
    del named["batch_invariant"]
    return answered(named, out, lse, case.seed, case.strided)


def check(case: SparseCase) -> None:
    arguments = call(case)
    found = torch.ops.flashmla.sparse_decode_backward(**arguments)
    a = SparseDecodeBackward(**arguments)
    expected = gradients(a)
    rows = torch.tensor([largest(x) if x is not None else 0.0 for x in elements_of(a)])
    dscore, values = score_size(arguments, rows, case.d_v), largest(a.dout)
    of_rows = dscore * largest(a.q) + values
    sizes = (dscore * largest(rows), of_rows, of_rows, 100 * largest(rows) * values, of_rows)
    for name, x, y, size in zip(NAMES, found, expected, sizes, strict=True):
        assert (wrong := problem(name, x, y, size, a.lse)) is None, f"{wrong} | {case!r}"


def elements_of(a: SparseDecodeBackward) -> list[Tensor | None]:
    """The rows of both sources as numbers; those of bytes are as large as the tests make them."""
    sources = [(a.kv_cache, a.row_format), (a.k_cache, "native"), (a.extra_kv_cache, a.extra_row_format)]
    return [torch.tensor(2.0) if row_format in QUANTIZED else x for x, row_format in sources]


@settings(max_examples=120)
@given(strategies.sparse_cases())
def test_any_case(case: SparseCase) -> None:
    check(case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_instruction_set(isa: str, dtype: str) -> None:
    extra = Rows(50, n_pages=2, page_size=70)
    with cpu.using(isa):
        for h_q in (5, 144):
            check(SparseCase(Rows(140), extra, s_q=3, h_q=h_q, d=40, d_v=32, d_k=8, dtype=dtype, sink=True, seed=1))
        check(SparseCase(Rows(90, row_format="fp8_v32"), Rows(70, row_format="int8_g128"), dtype=dtype))


@pytest.mark.parametrize("row_format", QUANTIZED)
def test_queries_over_rows_of_bytes_have_a_gradient(row_format: str) -> None:
    elements = QUANTIZED[row_format].elements
    case = SparseCase(Rows(9, row_format=row_format), d=elements, h_q=3, dtype="float32", sink=True, seed=1)
    named = build(replace(case, strided=False)) | {"q": build(case)["q"].clone().requires_grad_()}
    out, lse = torch.ops.flashmla.sparse_decode(**named)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert named["q"].grad.isfinite().all()
    check(case)


@pytest.mark.parametrize(("h_kv", "sink", "two"), [(1, False, True), (2, True, False), (2, True, True)])
def test_the_definition_is_the_derivative(h_kv: int, sink: bool, two: bool) -> None:
    indices = torch.tensor([0, 3, 3, -1, 9, 4, 5, -1, 1, 2] * 2, dtype=torch.int32).view(2, 2, 5)
    indices[0, 1] = -1
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (2, 2, 4, 5), "kv_cache": (3, 2, h_kv, 4), "k_cache": (3, 2, h_kv, 2)}
    sizes |= {"attn_sink": (4,)} if sink else {}
    sizes |= {"extra_kv_cache": (2, 3, h_kv, 6)} if two else {}
    tensors = {name: torch.randn(size, generator=generator).double().requires_grad_() for name, size in sizes.items()}
    options = {"indices": indices, "d_v": 3, "qk_start": 1, "topk_length": torch.tensor([5, 3], dtype=torch.int32)}
    options |= {"extra_indices": indices[..., :3].flip(0)} if two else {}

    def backward(**named: Any) -> tuple[Tensor | None, ...]:
        a = SparseDecodeBackward(**named)
        empty = {name for name, x in zip(NAMES, gradients(a), strict=True) if x.shape == (0,)}
        return tuple(None if name in empty else x for name, x in zip(NAMES, gradients(a), strict=True))

    results = defined(lambda **named: decode_reference(SparseDecode(**named)), backward, tuple(tensors), options)
    assert torch.autograd.gradcheck(results, list(tensors.values()))


def test_both_sources_share_one_softmax() -> None:
    """Two sources are as one cache that holds the pages of both."""
    case = replace(TWO, dtype="float32", strided=False, sink=True, seed=1)
    case = replace(case, extra=replace(TWO.rows, topk=4))
    arguments = call(case)
    kv, extra, i, j = (arguments[name] for name in ("kv_cache", "extra_kv_cache", "indices", "extra_indices"))
    n = kv.size(0) * kv.size(1)
    i, j = (x.where((x >= 0) & (x < n), -1) for x in (i, j))
    joined = {"kv_cache": torch.cat([kv, extra]), "indices": torch.cat([i, j.where(j < 0, j + n)], dim=2)}
    one = arguments | joined | dict.fromkeys(("topk_length", "extra_kv_cache", "extra_indices", "extra_topk_length"))
    dq, dkv, _, dsink, dextra = torch.ops.flashmla.sparse_decode_backward(**arguments)
    found = torch.ops.flashmla.sparse_decode_backward(**one)
    torch.testing.assert_close((found[0], found[1], found[3]), (dq, torch.cat([dkv, dextra]), dsink))


def test_what_is_not_wanted_is_empty() -> None:
    arguments = call(replace(TWO, d_k=8, sink=True))
    everything = torch.ops.flashmla.sparse_decode_backward(**arguments)
    for i in range(5):
        found = torch.ops.flashmla.sparse_decode_backward(**arguments, wanted=1 << i)
        assert torch.equal(found[i], everything[i])
        assert all(x.shape == (0,) for j, x in enumerate(found) if j != i)


def test_rows_that_no_index_names_give_nothing_and_get_nothing() -> None:
    cache = torch.full((3, 1, 1, 16), torch.nan)
    cache[1] = 1.0
    cache.requires_grad_()
    indices = torch.tensor([1, -1, 1, 3, 99], dtype=torch.int32).expand(2, 3, 5)
    out, lse = torch.ops.flashmla.sparse_decode(torch.randn(2, 3, 4, 16), cache, None, indices, 8)
    (out.sum() + lse.sum()).backward()
    assert cache.grad.isfinite().all()
    assert cache.grad[[0, 2]].eq(0).all()
    assert cache.grad[1].ne(0).any()


def test_queries_without_rows_have_the_gradient_zero() -> None:
    q = torch.randn(2, 1, 3, 16, requires_grad=True)
    sink = torch.tensor([torch.inf, -torch.inf, 0.0], requires_grad=True)
    indices = torch.tensor([[[-1, 4]], [[0, 1]]], dtype=torch.int32)
    out, _ = torch.ops.flashmla.sparse_decode(q, torch.randn(2, 1, 1, 16), None, indices, 8, attn_sink=sink)
    out.sum().backward()
    assert q.grad[0].eq(0).all()
    assert q.grad[1, 0, 1].ne(0).any()
    assert sink.grad.isfinite().all()


def test_results_are_the_same_bits_every_time() -> None:
    case = replace(TWO, rows=Rows(200, n_pages=40), extra=Rows(90, n_pages=30), b=5)
    arguments, threads = call(case), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        first = torch.ops.flashmla.sparse_decode_backward(**arguments)
        for _ in range(4):
            assert all(map(torch.equal, first, torch.ops.flashmla.sparse_decode_backward(**arguments)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [TWO, replace(TWO, extra=None, d_k=8, sink=True, seed=1)])
def test_opcheck(dtype: str, case: SparseCase) -> None:
    opcheck(torch.ops.flashmla.sparse_decode_backward.default, **call(replace(case, dtype=dtype)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dout", lambda x: x[:, :, :-1], "argument 'dout': expected shape"),
        ("lse", lambda x: x.double(), "argument 'lse': expected float32, got float64"),
        ("extra_topk_length", lambda x: x + 99, r"argument 'extra_topk_length': expected lengths in \[0, 5\]"),
        ("extra_indices", lambda _: None, "argument 'extra_indices': expected a tensor with extra_kv_cache"),
        ("wanted", lambda _: 32, "argument 'wanted': expected a sum of 1, 2, 4, 8 and 16, got 32"),
    ],
)
def test_misuse(name: str, change: Any, message: str) -> None:
    arguments = call(TWO) | {"wanted": 31}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flashmla.sparse_decode_backward(**arguments | {name: change(arguments[name])})
