"""`flashmla::prefill_backward` against its definition, which is held against finite differences, and against SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmla_ops import cpu, reference
from tests.ops.test_opcheck import check as opcheck
from tests.ops.test_prefill import PrefillCase, build, options_of, prefill_cases
from tests.support.gradients import defined, largest, problem, score_size
from tests.support.poison import strided

NAMES = ("dq", "dk", "dv", "dattn_sink")
ISAS = [name for name, supported in cpu.STATE.isas.items() if supported]


def call(case: PrefillCase, *, dlse: bool = True) -> dict[str, Any]:
    """The arguments of the backward of a case."""
    inputs, options = build(case), options_of(case)
    generator = torch.Generator().manual_seed(case.seed)
    out, lse = torch.ops.flashmla.prefill(**inputs, **options)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    gradient = torch.randn(lse.shape, generator=generator) if dlse else None
    if case.strided:
        dout, out = (strided(x, generator, contiguous_rows=False) for x in (dout, out))
        lse = strided(lse, generator, contiguous_rows=False)
    return {"dout": dout, "dlse": gradient, "out": out, "lse": lse, **inputs, **options}


def check(case: PrefillCase, *, dlse: bool = True) -> None:
    arguments = call(case, dlse=dlse)
    found = torch.ops.flashmla.prefill_backward(**arguments)
    expected = reference.prefill_backward(**arguments)
    q, k, v, dout, lse = (arguments[name] for name in ("q", "k", "v", "dout", "lse"))
    dscore = score_size(arguments, v, case.d_v)
    sizes = (dscore * largest(k), dscore * largest(q), largest(dout), 100 * largest(v) * largest(dout))
    for name, x, y, size in zip(NAMES, found, expected, sizes, strict=True):
        assert (wrong := problem(name, x, y, size, lse)) is None, f"{wrong} | {case!r}"


@settings(max_examples=300)
@given(prefill_cases())
def test_any_case(case: PrefillCase) -> None:
    check(case, dlse=case.seed % 2 == 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("h_q", "h_kv", "d_qk", "d_v"), [(2, 2, 192, 128), (4, 1, 128, 128), (3, 3, 64, 48)])
def test_model_geometries(isa: str, dtype: str, h_q: int, h_kv: int, d_qk: int, d_v: int) -> None:
    lengths = ((300, 300), (1, 200), (130, 257), (0, 9), (5, 0))
    with cpu.using(isa):
        for options in ({"causal": False}, {}, {"window": 70, "softcap": 2.0, "sink": True}):
            check(PrefillCase(lengths, h_q, h_kv, d_qk, d_v, dtype, **options))


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "scaled": {"softmax_scale": -0.5, "causal": True},
    "window": {"causal": True, "window": 2},
    "softcap": {"softcap": 0.7},
    "sink": {"causal": True, "attn_sink": torch.linspace(-1, 1, 4, dtype=torch.float64)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("h_kv", [1, 2, 4])
def test_the_definition_is_the_derivative(option: str, h_kv: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (7, 4, 5), "k": (9, h_kv, 5), "v": (9, h_kv, 3)}
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    options = {"cu_seqlens_q": torch.tensor([0, 3, 3, 7]), "cu_seqlens_k": torch.tensor([0, 2, 4, 9])}
    options |= OPTIONS[option]
    if "attn_sink" in options:
        tensors["attn_sink"] = options.pop("attn_sink").clone()
    results = defined(reference.prefill, reference.prefill_backward, tuple(tensors), options)
    assert torch.autograd.gradcheck(results, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s", "d"), [(70, 64), (300, 128)])
def test_bf16_is_as_near_as_sdpa(causal: bool, s: int, d: int) -> None:
    generator = torch.Generator().manual_seed(s)
    q, k, v, dout = (torch.randn(s, 3, d, generator=generator).bfloat16() for _ in range(4))
    bounds = torch.tensor([0, s], dtype=torch.int32)

    def gradients(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).clone().requires_grad_() for x in (q, k, v)]
        attend(*leaves).backward(dout.to(dtype))
        return [x.grad.double() for x in leaves]

    def sdpa(*tensors: Tensor) -> Tensor:
        heads = [x.transpose(0, 1)[None] for x in tensors]
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal)[0].transpose(0, 1)

    ours = gradients(lambda *x: torch.ops.flashmla.prefill(*x, bounds, bounds, causal)[0], torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = gradients(sdpa, torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        exact = gradients(sdpa, torch.float64)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm()


def test_a_query_that_sees_no_key_has_no_gradient_whatever_it_holds() -> None:
    case = PrefillCase(((5, 2), (3, 0)), dtype="bfloat16")
    inputs = build(case)
    for name, fill in (("q", torch.nan), ("dout", torch.inf)):
        arguments = call(case)
        arguments[name][[0, 1, 2, 5, 6, 7]] = fill
        dq, dk, dv, _ = torch.ops.flashmla.prefill_backward(**arguments)
        assert dq[[0, 1, 2, 5, 6, 7]].eq(0).all()
        for x in (dq, dk, dv):
            assert x.isfinite().all()
    assert inputs["q"].isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repeats_bit_for_bit_on_several_threads(dtype: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for h_kv in (1, 2):
            arguments = call(PrefillCase(((400, 400), (3, 90)), h_q=4, h_kv=h_kv, dtype=dtype))
            first = torch.ops.flashmla.prefill_backward(**arguments)
            for _ in range(4):
                assert all(map(torch.equal, first, torch.ops.flashmla.prefill_backward(**arguments)))
    finally:
        torch.set_num_threads(threads)


def test_only_what_is_wanted_is_computed() -> None:
    arguments = call(PrefillCase(((40, 50),), dtype="bfloat16", sink=True))
    whole = torch.ops.flashmla.prefill_backward(**arguments)
    for wanted in range(16):
        found = torch.ops.flashmla.prefill_backward(**arguments, wanted=wanted)
        for i in range(4):
            assert torch.equal(found[i], whole[i]) if wanted >> i & 1 else found[i].shape == (0,)


def test_what_needs_no_gradient_gets_none() -> None:
    inputs = build(PrefillCase(((9, 9),), dtype="float32"))
    q = inputs["q"].requires_grad_()
    out, lse = torch.ops.flashmla.prefill(**inputs)
    assert out.requires_grad
    assert lse.requires_grad
    lse.sum().backward()
    assert q.grad is not None
    assert inputs["k"].grad is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lay_out", [False, True])
def test_opcheck(dtype: str, lay_out: bool) -> None:
    options = {"window": 3, "softcap": 2.0, "sink": True} if lay_out else {}
    arguments = call(PrefillCase(((9, 7), (0, 3), (4, 0)), dtype=dtype, strided=lay_out, **options))
    opcheck(torch.ops.flashmla.prefill_backward.default, **arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dout", lambda x: x[:-1], "argument 'dout': expected shape"),
        ("out", lambda x: x.float(), "argument 'out': expected bfloat16, got float32"),
        ("lse", lambda x: x.T, "argument 'lse': expected shape"),
        ("dlse", lambda x: x.bfloat16(), "argument 'dlse': expected float32, got bfloat16"),
        ("wanted", lambda _: 16, "argument 'wanted': expected a sum of 1, 2, 4 and 8, got 16"),
        ("cu_seqlens_k", lambda x: x + 1, r"prefill_backward: argument 'cu_seqlens_k': expected 0 at \[0\]"),
    ],
)
def test_misuse(name: str, change: Any, message: str) -> None:
    arguments = call(PrefillCase(((9, 7),), dtype="bfloat16")) | {"wanted": 7}
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flashmla.prefill_backward(**arguments)
