"""`flashmla::decode_up_backward` against its definition, which is held against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import NotDifferentiableError
from flashmla_ops.ops.decode_up_backward import DECODE_UP_BACKWARD
from tests import strategies
from tests.ops.test_opcheck import check as opcheck
from tests.support.cases import DecodeCase, build
from tests.support.gradients import largest, problem, score_size
from tests.support.poison import strided

NAMES = DECODE_UP_BACKWARD.returns
SMALL = DecodeCase((9, 0, 16), s_q=2, h_q=6, h_kv=2, page_size=8, d=24, d_v=16, causal=True, sink=True, dtype="float32")


def call(case: DecodeCase, d_up: int = 12) -> dict[str, Any]:
    """The arguments of the backward of a case."""
    named, generator = build(case).reference_kwargs(), torch.Generator().manual_seed(case.seed)
    q = named["q"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(q.dtype)

    weight, dout = normal(case.h_q, d_up, case.d_v).transpose(1, 2), normal(*q.shape[:-1], d_up)
    dlse = torch.randn([*q.shape[:-3], q.size(-2), q.size(-3)], generator=generator) if case.seed % 2 else None
    if case.strided:
        dout = strided(dout, generator, contiguous_rows=False)
    return named | {"weight": weight, "dout": dout, "dlse": dlse}


def check(case: DecodeCase, d_up: int) -> None:
    arguments = call(case, d_up)
    found = torch.ops.flashmla.decode_up_backward(**arguments)
    expected = reference.decode_up_backward(**arguments)
    q, kv, k, weight = (arguments[name] for name in ("q", "kv_cache", "k_cache", "weight"))
    lse = torch.ops.flashmla.decode_up(**without_gradients(arguments))[1]
    dattended = largest(arguments["dout"]) * largest(weight) * d_up**0.5
    dscore = score_size(arguments | {"dout": torch.tensor(dattended)}, kv, case.d_v)
    keys = dscore * largest(q)
    sizes = (dscore * max(largest(kv), largest(k)), keys + dattended, keys, 100 * largest(kv) * dattended)
    of_weight = largest(kv) * largest(arguments["dout"]) * max(case.tokens, 1) ** 0.5
    for name, x, y, size in zip(NAMES, found, expected, (*sizes, of_weight), strict=True):
        # Twice rounded: what was attended to, and its gradient, are of q's type.
        assert (wrong := problem(name, x, y, 3 * size, lse)) is None, f"{wrong} | {case!r}"


def without_gradients(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in arguments.items() if name not in ("dout", "dlse")}


@settings(max_examples=40)
@given(strategies.option_cases(), st.sampled_from([1, 7, 32]))
def test_any_case(case: DecodeCase, d_up: int) -> None:
    check(case, d_up)


@pytest.mark.parametrize("s_qs", [None, (2, 0, 5)])
def test_every_gradient_is_that_of_the_definition_in_torch(s_qs: tuple[int, ...] | None) -> None:
    """Finite differences of the definition, for all that has a gradient."""
    named = build(replace(SMALL, s_qs=s_qs, d=5, d_v=3, d_k=2, strided=False)).reference_kwargs()
    names = ("q", "kv_cache", "k_cache", "attn_sink", "weight")
    named["weight"], named["attn_sink"] = torch.randn(6, 3, 4), torch.linspace(-1, 1, 6)
    tensors = [named.pop(name).nan_to_num(0).double().requires_grad_() for name in names]

    class Defined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(*tensors)
            return reference.decode_up(**dict(zip(names, tensors, strict=True)), **named)

        @staticmethod
        def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(names, ctx.saved_tensors, strict=True)) | named
            found = dict(zip(NAMES, reference.decode_up_backward(dout=dout, dlse=dlse, **given), strict=True))
            return tuple(found[f"d{name}"] for name in names)

    def results(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = Defined.apply(*tensors)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(results, tensors)


def test_it_is_that_of_decode_and_a_product() -> None:
    inputs = build(replace(SMALL, strided=False))
    names = ("q", "kv_cache", "attn_sink")
    leaves = [getattr(inputs, name).clone().requires_grad_() for name in names]
    weight = torch.randn(6, 16, 12, requires_grad=True)
    named = inputs.kwargs(**dict(zip(names, leaves, strict=True)))
    results = {
        "decode_up": torch.ops.flashmla.decode_up(weight=weight, **named),
        "decode": (lambda out, lse: (torch.einsum("bshv,hvu->bshu", out, weight), lse))(
            *torch.ops.flashmla.decode(**named)
        ),
    }
    found = []
    for out, lse in results.values():
        loss = out.square().sum() + lse[lse.isfinite()].sum()
        found.append(torch.autograd.grad(loss, [*leaves, weight]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("bit", range(5))
def test_what_is_not_wanted_is_empty(bit: int) -> None:
    arguments = call(replace(SMALL, d_k=8))
    everything = torch.ops.flashmla.decode_up_backward(**arguments)
    found = torch.ops.flashmla.decode_up_backward(**arguments, wanted=1 << bit)
    assert torch.equal(found[bit], everything[bit])
    assert all(x.shape == (0,) and x.dtype == everything[i].dtype for i, x in enumerate(found) if i != bit)


def test_a_gradient_of_the_lse_alone() -> None:
    arguments = call(replace(SMALL, seed=1, d_k=8)) | {"dout": None}
    found = torch.ops.flashmla.decode_up_backward(**arguments)
    zeros = torch.zeros(*arguments["q"].shape[:-1], 12)
    for x, y in zip(found, torch.ops.flashmla.decode_up_backward(**arguments | {"dout": zeros}), strict=True):
        assert torch.equal(x, y)
    assert found[0].ne(0).any()
    assert found[4].eq(0).all()


def test_bytes_have_no_gradient() -> None:
    q, weight = torch.randn(1, 1, 4, 576, requires_grad=True), torch.randn(4, 512, 8)
    cache = torch.zeros(2, 8, 1, 656, dtype=torch.uint8)
    tables = (torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    with pytest.raises(NotDifferentiableError, match="no gradient for it with row_format"):
        torch.ops.flashmla.decode_up(q, cache, None, *tables, weight, 512, row_format="fp8_v32")


@pytest.mark.parametrize("s_qs", [None, (2, 0, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opcheck(dtype: str, s_qs: tuple[int, ...] | None) -> None:
    case = replace(SMALL, dtype=dtype, s_qs=s_qs, d_k=8, seed=1)
    opcheck(torch.ops.flashmla.decode_up_backward.default, **call(case))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dout", lambda x: x[..., :-1], "argument 'dout': expected shape"),
        ("dlse", lambda x: x.double(), "argument 'dlse': expected float32, got float64"),
        ("weight", lambda x: x[:, :-1], "argument 'weight': expected d_v 16, got 15"),
        ("wanted", lambda _: -1, "argument 'wanted': expected a sum of 1, 2, 4, 8 and 16, got -1"),
        ("cache_seqlens", lambda x: x + 99, r"argument 'cache_seqlens': expected lengths in \[0, 24\]"),
    ],
)
def test_misuse(name: str, change: Any, message: str) -> None:
    arguments = call(replace(SMALL, seed=1)) | {"wanted": 31}
    with pytest.raises(RuntimeError, match=f"decode.*{message}"):
        torch.ops.flashmla.decode_up_backward(**arguments | {name: change(arguments[name])})
