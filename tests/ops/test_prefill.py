"""`flashmla::prefill` against its float64 definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from flashmla_ops import cpu, reference
from flashmla_ops.errors import from_message
from flashmla_ops.ops.prefill import PREFILL
from tests.support.compare import Tolerance, difference
from tests.support.oracle import of_columns

#: The bounds of the official package's dense prefill tests, and a tighter one for float32.
OUT = {"float32": Tolerance(2e-6, 2e-5, 1e-9)}
OFFICIAL_OUT, LSE = Tolerance(1e-3, 8.01 / 128, 7e-6), Tolerance(1e-6, 2.01 / 65536, 1e-7)


@dataclass(frozen=True)
class PrefillCase:
    lengths: tuple[tuple[int, int], ...]  # (query tokens, key tokens) of each sequence
    h_q: int = 4
    h_kv: int = 2
    d_qk: int = 24
    d_v: int = 16
    dtype: str = "bfloat16"
    causal: bool = True
    softmax_scale: float | None = None
    sink: bool = False
    window: int = 0
    softcap: float = 0.0
    strided: bool = False
    seed: int = 0


@st.composite
def prefill_cases(draw: st.DrawFn) -> PrefillCase:
    h_kv = draw(st.integers(1, 4))
    return PrefillCase(
        lengths=tuple(draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 200)), max_size=4))),
        h_q=h_kv * draw(st.sampled_from([1, 2, 3, 7, 8, 16])),
        h_kv=h_kv,
        d_qk=draw(st.integers(1, 80) | st.sampled_from([64, 128, 192])),
        d_v=draw(st.integers(1, 80) | st.sampled_from([64, 128])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        causal=draw(st.booleans()),
        softmax_scale=draw(st.none() | st.sampled_from([0.0, -0.25, 1.0])),
        sink=draw(st.booleans()),
        window=draw(st.just(0) | st.integers(1, 5) | st.integers(1, 150)),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.3, 30.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def build(case: PrefillCase) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    bounds = [list(accumulate((pair[i] for pair in case.lengths), initial=0)) for i in range(2)]

    def rows(tokens: int, heads: int, d: int) -> Tensor:
        values = torch.randn(tokens, heads, d, generator=generator).div_(10).to(getattr(torch, case.dtype))
        return (
            torch.stack([values, values.new_full((), torch.nan).expand_as(values)], 1)[:, 0] if case.strided else values
        )

    return {
        "q": rows(bounds[0][-1], case.h_q, case.d_qk),
        "k": rows(bounds[1][-1], case.h_kv, case.d_qk),
        "v": rows(bounds[1][-1], case.h_kv, case.d_v),
        "cu_seqlens_q": torch.tensor(bounds[0], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(bounds[1], dtype=torch.int32),
    }


def options_of(case: PrefillCase) -> dict[str, object]:
    sink = torch.randn(case.h_q, generator=torch.Generator().manual_seed(case.seed)) if case.sink else None
    if sink is not None and len(sink) > 2:
        sink[0], sink[1] = torch.inf, -torch.inf
    options = {name: getattr(case, name) for name in ("causal", "softmax_scale", "window", "softcap")}
    return options | {"attn_sink": sink}


def check(case: PrefillCase) -> None:
    inputs, options = build(case), options_of(case)
    out, lse = torch.ops.flashmla.prefill(**inputs, **options)
    expected = reference.prefill(**inputs, **options)
    dtype = getattr(torch, case.dtype)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    columns = sum(min(pair) > 0 for pair in case.lengths) * case.h_kv * case.d_v
    tolerance = of_columns(OUT.get(case.dtype, OFFICIAL_OUT), case.dtype, columns)
    problem = difference("out", out, expected[0].to(dtype), tolerance)
    problem = problem or difference("lse", lse, expected[1].float(), LSE)
    assert problem is None, f"{problem} | {case!r}"


@settings(max_examples=400)
@given(prefill_cases())
def test_any_case(case: PrefillCase) -> None:
    check(case)


@pytest.mark.parametrize("isa", [name for name, supported in cpu.STATE.isas.items() if supported])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("h_q", "h_kv", "d_qk", "d_v"), [(2, 2, 192, 128), (4, 1, 128, 128), (3, 3, 64, 64)])
def test_model_geometries(isa: str, dtype: str, h_q: int, h_kv: int, d_qk: int, d_v: int) -> None:
    with cpu.using(isa):
        for causal in (False, True):
            case = PrefillCase(((300, 300), (1, 200), (130, 500), (0, 9), (5, 0)), h_q, h_kv, d_qk, d_v, dtype, causal)
            check(case)
            check(replace(case, sink=True, window=100, softcap=20.0))


def test_a_query_before_the_first_key_sees_nothing() -> None:
    inputs = build(PrefillCase(((5, 2),), dtype="float32"))
    out, lse = torch.ops.flashmla.prefill(**inputs, causal=True)
    assert out[:3].eq(0).all()
    assert lse[:, :3].eq(torch.inf).all()
    assert lse[:, 3:].isfinite().all()


def test_merged_halves_are_the_whole() -> None:
    inputs = build(PrefillCase(((40, 90),), dtype="float32"))
    whole = torch.ops.flashmla.prefill(**inputs)
    parts = []
    for keys in (slice(0, 37), slice(37, 90)):
        bounds = torch.tensor([0, keys.stop - keys.start], dtype=torch.int32)
        half = inputs | {"k": inputs["k"][keys], "v": inputs["v"][keys], "cu_seqlens_k": bounds}
        parts.append(torch.ops.flashmla.prefill(**half))
    merged = torch.ops.flashmla.merge_states([out for out, _ in parts], [lse for _, lse in parts])
    torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("names", [("cu_seqlens_q",), ("cu_seqlens_k",), ("cu_seqlens_q", "cu_seqlens_k")])
@pytest.mark.parametrize("implementation", ["eager", "reference", "compiled"])
def test_bounds_in_int64(implementation: str, names: tuple[str, ...]) -> None:
    inputs = build(PrefillCase(((5, 7), (0, 3)), dtype="float32"))
    long = inputs | {name: torch.stack([inputs[name].long()] * 2, -1)[:, 0] for name in names}
    eager = torch.ops.flashmla.prefill.default
    calls = {"reference": PREFILL.reference, "compiled": torch.compile(lambda **named: eager(**named))}
    call = calls.get(implementation, eager)
    assert all(map(torch.equal, call(**long), call(**inputs)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(dtype: str, strided: bool) -> None:
    inputs = build(PrefillCase(((5, 7), (0, 3)), dtype=dtype, strided=strided))
    opcheck(torch.ops.flashmla.prefill.default, tuple(inputs.values()), {"causal": True})
    options = {"attn_sink": torch.randn(4), "window": 3, "softcap": 20.0}
    opcheck(torch.ops.flashmla.prefill.default, tuple(inputs.values()), options)


def test_repeats_bit_for_bit() -> None:
    inputs = build(PrefillCase(((200, 300), (70, 70)), dtype="bfloat16"))
    first = torch.ops.flashmla.prefill(**inputs, causal=True)
    assert all(map(torch.equal, first, torch.ops.flashmla.prefill(**inputs, causal=True)))


GOOD = build(PrefillCase(((4, 6), (3, 5)), dtype="float32"))
BAD = [
    ({"q": GOOD["q"][0]}, "q", "shape [t_q, h_q, d_qk]"),
    ({"q": GOOD["q"][:, :3]}, "q", "query heads in multiples of the 2 KV heads"),
    ({"k": GOOD["k"].bfloat16()}, "k", "float32"),
    ({"k": GOOD["k"][..., :23]}, "k", "d_qk 24, as q"),
    ({"v": GOOD["v"][:10]}, "v", "11 tokens, as k"),
    ({"v": GOOD["v"].transpose(1, 2).contiguous().transpose(1, 2)}, "v", "a contiguous last dimension"),
    ({"cu_seqlens_q": GOOD["cu_seqlens_q"].short()}, "cu_seqlens_q", "int32 or int64"),
    ({"cu_seqlens_k": GOOD["cu_seqlens_k"][:2]}, "cu_seqlens_k", "3 elements, as cu_seqlens_q"),
    ({"attn_sink": torch.zeros(3)}, "attn_sink", "4 heads, as q"),
    ({"attn_sink": torch.zeros(4).double()}, "attn_sink", "float32"),
    ({"window": -1}, "window", "at least 1, or 0 for none"),
    ({"softcap": -1.0}, "softcap", "a positive number, or 0 for none"),
    ({"softcap": torch.inf}, "softcap", "a positive number, or 0 for none"),
    ({"softcap": torch.nan}, "softcap", "a positive number, or 0 for none"),
]
BAD_VALUES = [
    ("cu_seqlens_q", [1, 4, 7], "0 at [0]", "1"),
    ("cu_seqlens_q", [0, 8, 7], "at least 8 at [2]", "7"),
    ("cu_seqlens_k", [0, 6, 10], "11 at [2], the number of tokens", "10"),
    ("cu_seqlens_k", [0, 6, 2**32 + 11], "values that int32 holds", f"{2**32 + 11} at [2]"),
]


@pytest.mark.parametrize(("changed", "argument", "expected"), BAD)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bad_argument_is_named(changed: dict[str, Any], argument: str, expected: str, device: str) -> None:
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in (GOOD | changed).items()}
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashmla.prefill(**inputs)
    error = from_message(str(raised.value))
    assert (error.argument, error.expected) == (argument, expected)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize(("argument", "bounds", "expected", "actual"), BAD_VALUES)
def test_bad_bounds_are_named(
    implementation: str, argument: str, bounds: list[int], expected: str, actual: str
) -> None:
    call = torch.ops.flashmla.prefill if implementation == "kernel" else PREFILL.reference
    with pytest.raises(RuntimeError) as raised:
        call(**GOOD | {argument: torch.tensor(bounds)})
    error = from_message(str(raised.value))
    assert (error.argument, error.expected, error.actual) == (argument, expected, actual)
