"""`flashmla::sparse_prefill_backward` against its definition, which is held against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import cpu, reference
from flashmla_ops.errors import NotDifferentiableError
from flashmla_ops.ops.sparse import SparsePrefill, prefill_reference
from tests import strategies
from tests.ops.test_opcheck import check as opcheck
from tests.ops.test_sparse import prefill_arguments
from tests.support.gradients import answered, defined, largest, problem, score_size
from tests.support.sparse import Rows, SparseCase

ISAS = [name for name, supported in cpu.STATE.isas.items() if supported]
NAMES = ("dq", "dkv", "dattn_sink")


def call(case: SparseCase) -> dict[str, Any]:
    """The arguments of the backward of a case, over native rows."""
    # With lengths, the indices that count are other ones for each KV head, and may name rows of NaN.
    rows = replace(case.rows, row_format="native", lengths=case.rows.lengths and case.h_kv == 1)
    named = prefill_arguments(replace(case, rows=rows))
    del named["row_format"]
    out, _, lse = torch.ops.flashmla.sparse_prefill(**named)
    return answered(named, out, lse, case.seed, case.strided)


def check(case: SparseCase) -> None:
    arguments = call(case)
    found = torch.ops.flashmla.sparse_prefill_backward(**arguments)
    expected = reference.sparse_prefill_backward(**arguments)
    q, kv, dout, lse = (arguments[name] for name in ("q", "kv", "dout", "lse"))
    dscore, values = score_size(arguments, kv, case.d_v), largest(dout)
    sizes = (dscore * largest(kv), dscore * largest(q) + values, 100 * largest(kv) * values)
    for name, x, y, size in zip(NAMES, found, expected, sizes, strict=True):
        assert (wrong := problem(name, x, y, size, lse)) is None, f"{wrong} | {case!r}"


@settings(max_examples=150)
@given(strategies.sparse_cases(), st.integers(1, 90))
def test_any_case(case: SparseCase, tokens: int) -> None:
    check(replace(case, rows=replace(case.rows, page_size=tokens), qk_start=0, d_k=None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_instruction_set(isa: str, dtype: str) -> None:
    with cpu.using(isa):
        for h_q in (5, 144):
            check(SparseCase(Rows(140, page_size=300), s_q=3, h_q=h_q, d=40, d_v=32, dtype=dtype, sink=True, seed=1))


@pytest.mark.parametrize("h_kv", [1, 2])
@pytest.mark.parametrize("sink", [False, True])
def test_the_definition_is_the_derivative(h_kv: int, sink: bool) -> None:
    indices = torch.tensor([0, 3, 3, -1, 9, 4, 5, -1, 1, 2] * 6, dtype=torch.int32)[: 15 * h_kv].view(3, h_kv, 5)
    indices[1] = -1
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (3, 4, 5), "kv": (6, h_kv, 5)} | ({"attn_sink": (4,)} if sink else {})
    tensors = {name: torch.randn(size, generator=generator).double().requires_grad_() for name, size in sizes.items()}
    options = {"indices": indices, "d_v": 3, "topk_length": torch.tensor([5, 5, 4], dtype=torch.int32)}

    def forward(**named: Any) -> tuple[Tensor, Tensor]:
        out, _, lse = prefill_reference(SparsePrefill(**named))
        return out, lse

    results = defined(forward, reference.sparse_prefill_backward, tuple(tensors), options)
    assert torch.autograd.gradcheck(results, list(tensors.values()))


def test_results_are_the_same_bits_every_time() -> None:
    arguments, threads = call(SparseCase(Rows(200, page_size=700), s_q=9, h_q=8)), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        first = torch.ops.flashmla.sparse_prefill_backward(**arguments)
        for _ in range(4):
            assert all(map(torch.equal, first, torch.ops.flashmla.sparse_prefill_backward(**arguments)))
    finally:
        torch.set_num_threads(threads)


def test_rows_that_no_index_names_give_nothing_and_get_nothing() -> None:
    kv = torch.full((9, 1, 16), torch.nan)
    kv[2] = 1.0
    kv.requires_grad_()
    indices = torch.tensor([2, -1, 2, 9, 99], dtype=torch.int32).expand(3, 1, 5)
    out, max_logits, lse = torch.ops.flashmla.sparse_prefill(torch.randn(3, 4, 16), kv, indices, 8)
    assert not max_logits.requires_grad
    (out.sum() + lse.sum()).backward()
    assert kv.grad.isfinite().all()
    assert kv.grad[[0, 1, *range(3, 9)]].eq(0).all()


def test_bytes_have_no_gradient() -> None:
    arguments = (torch.zeros(9, 1, 656, dtype=torch.uint8), torch.zeros(2, 1, 3, dtype=torch.int32), 512)
    with pytest.raises(NotDifferentiableError, match="no gradient for it with row_format"):
        torch.ops.flashmla.sparse_prefill(torch.randn(2, 4, 576).requires_grad_(), *arguments, row_format="fp8_v32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("h_kv", [1, 2])
def test_opcheck(dtype: str, h_kv: int) -> None:
    case = SparseCase(Rows(7, page_size=20), s_q=3, h_q=4, h_kv=h_kv, d=24, d_v=16, dtype=dtype, sink=True, seed=1)
    opcheck(torch.ops.flashmla.sparse_prefill_backward.default, **call(case))
