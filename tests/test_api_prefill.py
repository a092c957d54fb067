"""The drop-in dense prefill: signatures, results, the official lse of a query that sees no key, typed errors."""

from __future__ import annotations

import inspect

import pytest
import torch

import flashmla_ops as flash_mla
from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from tests.ops.test_prefill import LSE, OFFICIAL_OUT, PrefillCase, build
from tests.support.compare import difference

CASE = PrefillCase(((40, 70), (9, 3), (0, 5)), h_q=6, h_kv=6, d_qk=48, d_v=32)
TAIL = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "deterministic": False, "is_varlen": True}
BOUNDS = ["cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv"]


def arguments(case: PrefillCase = CASE) -> list[torch.Tensor | int]:
    return [*build(case).values(), 40, 70]


@pytest.mark.parametrize(
    ("function", "required"),
    [
        (flash_mla.flash_attn_varlen_func, ["q", "k", "v", *BOUNDS]),
        (flash_mla.flash_attn_varlen_qkvpacked_func, ["qkv", "cu_seqlens", "max_seqlen", "head_dim_qk"]),
        (flash_mla.flash_attn_varlen_kvpacked_func, ["q", "kv", *BOUNDS, "head_dim_qk"]),
    ],
)
def test_signature(function: object, required: list[str]) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [*required, *TAIL]
    assert {name: parameters[name].default for name in TAIL} == TAIL


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax_scale", [None, 148**-0.5])
def test_result(causal: bool, softmax_scale: float | None) -> None:
    q, k, v, cu_q, cu_k, *_ = args = arguments()
    out, lse = flash_mla.flash_attn_varlen_func(*args, softmax_scale=softmax_scale, causal=causal)
    expected, expected_lse = reference.prefill(q, k, v, cu_q, cu_k, causal, softmax_scale)
    assert difference("out", out, expected.to(out.dtype), OFFICIAL_OUT) is None
    blind = expected_lse.T.isinf()
    assert blind.any() == causal  # 9 queries over 3 keys: six of them see nothing
    assert lse.shape == q.shape[:2]
    assert lse[blind].eq(-torch.inf).all()
    assert difference("lse", lse[~blind], expected_lse.T[~blind].float(), LSE) is None


def test_packed_tensors_give_the_same_bits() -> None:
    q, k, v, cu_q, _, *_ = arguments(PrefillCase(((40, 40), (9, 9)), h_q=6, h_kv=6, d_qk=48, d_v=32))
    expected = flash_mla.flash_attn_varlen_func(q, k, v, cu_q, cu_q, 40, 40, causal=True)
    qkv = torch.cat([q, k, v], dim=-1)
    packed = flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 40, 48, causal=True)
    half = flash_mla.flash_attn_varlen_kvpacked_func(q, qkv[..., 48:], cu_q, cu_q, 40, 40, 48, causal=True)
    for result in (packed, half):
        assert all(map(torch.equal, result, expected))


def test_gradients_are_those_of_the_operator() -> None:
    q, k, v, *bounds = arguments(PrefillCase(((9, 5), (4, 7)), dtype="float32"))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flash_mla.flash_attn_varlen_func(*leaves, *bounds, causal=True)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    results = torch.ops.flashmla.prefill(q, k, v, *bounds[:2], True)
    ones = (torch.ones_like(results[0]), torch.ones_like(results[1]))
    expected = torch.ops.flashmla.prefill_backward(q, k, v, *bounds[:2], *ones, *results, True)
    for leaf, gradient in zip(leaves, expected[:3], strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_misuse_is_named() -> None:
    args = arguments()
    for name, value in (("dropout_p", 0.1), ("deterministic", True)):
        with pytest.raises(ArgumentError) as raised:
            flash_mla.flash_attn_varlen_func(*args, **{name: value})
        assert raised.value.argument == name
    with pytest.raises(ArgumentError) as raised:
        flash_mla.flash_attn_varlen_func(*[args[0].float(), *args[1:]])
    assert (raised.value.argument, raised.value.expected) == ("k", "float32")


def test_compiles_without_a_break() -> None:
    args = arguments()
    compiled = torch.compile(flash_mla.flash_attn_varlen_func, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*args, causal=True), flash_mla.flash_attn_varlen_func(*args, causal=True)))
