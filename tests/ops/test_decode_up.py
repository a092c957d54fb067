"""`flashmla::decode_up` against its float64 definition, and against `decode` followed by `bmm`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_ops import cpu, reference
from flashmla_ops.errors import ArgumentError, from_message
from tests import strategies
from tests.ops.test_exact import integer_case, live_rows
from tests.ops.test_opcheck import check
from tests.strategies import DTYPES, SEEDS
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.compare import difference
from tests.support.oracle import tolerances

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
#: How a weight [h_q, d_v, d_up] lies: contiguous along d_up or d_v, and views of something larger.
LAYOUTS = ("along d_up", "along d_v", "slice", "kv_b_proj", "heads inside")


@dataclass(frozen=True)
class UpCase:
    decode: DecodeCase
    d_up: int
    layout: str = "kv_b_proj"


def weight_of(case: UpCase) -> Tensor:
    """A weight of the case, with NaN wherever the view has no element."""
    generator = torch.Generator().manual_seed(case.decode.seed)
    h_q, d_v, d_up = case.decode.h_q, case.decode.d_v, case.d_up
    values = torch.randn(h_q, d_v, d_up, generator=generator).mul_(d_v**-0.5).to(getattr(torch, case.decode.dtype))
    if case.layout == "along d_up":
        return values
    if case.layout == "along d_v":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    room, view = {
        "slice": ((h_q, d_v + 1, d_up + 3), lambda x: x[:, 1:, 2:-1]),
        "kv_b_proj": ((h_q, d_up + 5, d_v), lambda x: x[:, 5:].transpose(1, 2)),
        "heads inside": ((d_up, h_q, d_v + 2), lambda x: x[..., 1:-1].permute(1, 2, 0)),
    }[case.layout]
    weight = view(torch.full(room, torch.nan, dtype=values.dtype))
    return weight.copy_(values)


def run(inputs: DecodeInputs, weight: Tensor, **changes: object) -> tuple[Tensor, Tensor]:
    return torch.ops.flashmla.decode_up(**inputs.kwargs(weight=weight, **changes))


def composed(inputs: DecodeInputs, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`decode`, then `bmm`: the same products in the same order, as long as bmm itself takes them (32 rows)."""
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    b, s_q, h_q, d_v = out.shape
    up = torch.ops.flashmla.bmm(out.view(b * s_q, h_q, d_v).transpose(0, 1), weight)
    return up.transpose(0, 1).reshape(b, s_q, h_q, weight.size(2)), lse


def verify(case: UpCase) -> None:
    """Within what `decode` may err, carried through the weight, and one rounding of what was attended to and of out."""
    inputs, weight = build(case.decode), weight_of(case)
    actual, lse = run(inputs, weight)
    assert actual.dtype == inputs.q.dtype
    attended, _ = reference.decode(**inputs.reference_kwargs())
    expected, expected_lse = reference.decode_up(**inputs.reference_kwargs(weight=weight))
    tolerance, lse_tolerance = tolerances(case.decode, inputs)
    error = (attended.abs() * tolerance.relative).clamp(min=tolerance.absolute)
    error = error + UNIT[case.decode.dtype] * attended.abs()
    magnitude = weight.double().abs()
    bound = torch.einsum("bshv,hvu->bshu", error + 2.0**-21 * attended.abs(), magnitude)
    bound += 1.01 * UNIT[case.decode.dtype] * expected.abs() + 2.0**-24
    worst = ((actual.double() - expected).abs() / bound).max() if actual.numel() else torch.tensor(0.0)
    assert worst <= 1, f"{float(worst):.3g} of the bound: {case!r}"
    assert difference("lse", lse, expected_lse.to(torch.float32), lse_tolerance) is None, repr(case)


@st.composite
def up_cases(draw: st.DrawFn) -> UpCase:
    width = st.integers(1, 70) | st.sampled_from([64, 128])
    return UpCase(draw(strategies.decode_cases()), draw(width), draw(st.sampled_from(LAYOUTS)))


@st.composite
def mla_cases(draw: st.DrawFn) -> UpCase:
    return UpCase(draw(strategies.mla_cases()), draw(st.sampled_from([64, 128, 192])), draw(st.sampled_from(LAYOUTS)))


@settings(max_examples=80)
@given(up_cases())
def test_any_case(case: UpCase) -> None:
    verify(case)


@settings(max_examples=20)
@given(mla_cases())
def test_mla_case(case: UpCase) -> None:
    verify(case)


@pytest.mark.parametrize("isa", [name for name, supported in cpu.STATE.isas.items() if supported])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa: str, dtype: str) -> None:
    with cpu.using(isa):
        for layout in LAYOUTS:
            verify(UpCase(DecodeCase((70, 0, 33), s_q=2, h_q=9, dtype=dtype), 70, layout))


@settings(max_examples=50)
@given(up_cases())
def test_it_is_decode_and_bmm_bit_for_bit(case: UpCase) -> None:
    inputs, weight = build(case.decode), weight_of(case)
    actual, expected = run(inputs, weight), composed(inputs, weight)
    assert torch.equal(actual[1].nan_to_num(), expected[1].nan_to_num())
    if cpu.STATE.active != cpu.REFERENCE and cpu.STATE.binding != "ctypes":
        assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_more_threads_than_heads(threads: int) -> None:
    """Columns are divided then; the numbers are those of one thread."""
    before = torch.get_num_threads()
    case = UpCase(DecodeCase((300, 20, 0), h_q=2, h_kv=2, dtype="float32", num_parts=3), 200)
    for layout in LAYOUTS:
        inputs, weight = build(case.decode), weight_of(replace(case, layout=layout))
        try:
            torch.set_num_threads(1)
            expected = run(inputs, weight)[0]
            torch.set_num_threads(threads)
            assert torch.equal(run(inputs, weight)[0], expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("levels", [1, 2])
def test_lower_levels(levels: int) -> None:
    case = UpCase(DecodeCase((300, 0, 7), h_q=9, dtype="float32"), 24)
    inputs, weight = build(case.decode), weight_of(case)
    torch.testing.assert_close(run(inputs, weight, levels=levels)[0], run(inputs, weight)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(dtype: str, layout: str) -> None:
    """With equal weights of a power of two of tokens, means and their products with small integers are exact."""
    case, inputs = integer_case("odd", dtype, 3)
    inputs.q.zero_()
    weight = weight_of(UpCase(case, 21, layout))
    weight.copy_((weight * 8).round().clamp(-2, 2))
    for cache in (inputs.kv_cache, inputs.k_cache):
        cache.copy_((cache / 8).round())  # of [-1, 1]: sums of 19 products of 2 fit into every type
    out, _ = run(inputs, weight)
    for i, length in enumerate(case.lengths):
        rows = live_rows(inputs, inputs.kv_cache, i)[..., : case.d_v].double()
        mean = rows.sum(0).div(max(length, 1)).to(out.dtype).double().repeat_interleave(6, dim=0)
        expected = torch.einsum("hv,hvu->hu", mean, weight.double())
        assert torch.equal(out[i, 0], expected.to(out.dtype))


def test_a_sequence_of_nothing_has_zeros() -> None:
    case = UpCase(DecodeCase((0, 5, 0), h_q=3), 16)
    out, lse = run(build(case.decode), weight_of(case))
    assert (out[::2] == 0).all()
    assert (lse[::2] == torch.inf).all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("lengths", [(), (3,)])
def test_no_sequences_and_no_heads(lengths: tuple[int, ...]) -> None:
    heads = 0 if lengths else 4
    inputs = build(DecodeCase(lengths, h_q=heads, d=24, d_v=16, strided=False))
    out, lse = run(inputs, torch.zeros(heads, 16, 8, dtype=torch.bfloat16))
    assert out.shape == (len(lengths), 1, heads, 8)
    assert lse.shape == (len(lengths), heads, 1)


@settings(max_examples=30)
@given(case=up_cases(), seed=SEEDS)
def test_a_call_leaves_its_inputs_alone_and_is_deterministic(case: UpCase, seed: int) -> None:
    del seed
    inputs, weight = build(case.decode), weight_of(case)
    before = [x.clone() for x in (inputs.q, inputs.kv_cache, weight)]
    first, second = run(inputs, weight), run(inputs, weight)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, second, strict=True))
    after = (inputs.q, inputs.kv_cache, weight)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(before, after, strict=True))


# Preconditions: those of decode under this operator's name, and those of weight.


def arguments() -> dict[str, object]:
    case = DecodeCase((9, 3), s_q=2, h_q=6, d=40, d_v=32, page_size=8, dtype="float32", strided=False)
    return build(case).kwargs(weight=torch.zeros(6, 32, 8))


W = torch.zeros
MISUSES = {
    "weight-dims": (lambda: {"weight": W(6, 32)}, "weight", "shape [h_q, d_v, d_up]", "2 dimensions"),
    "weight-dtype": (lambda: {"weight": W(6, 32, 8).bfloat16()}, "weight", "float32", "bfloat16"),
    "weight-heads": (lambda: {"weight": W(5, 32, 8)}, "weight", "6 heads, as q", "5"),
    "weight-d_v": (lambda: {"weight": W(6, 31, 8)}, "weight", "d_v 32", "31"),
    "weight-d_up": (lambda: {"weight": W(6, 32, 0)}, "weight", "d_up of at least 1", "0"),
    "weight-strides": (
        lambda: {"weight": W(6, 64, 16)[:, ::2, ::2]},
        "weight",
        "one of the last two dimensions contiguous",
        "strides 32 and 2",
    ),
    "q": (lambda: {"q": W(2, 2, 6, 39)}, "q", "d_qk 40, the length of a key", "39"),
    "d_v": (lambda: {"d_v": 41, "weight": W(6, 41, 8)}, "d_v", "a value in [1, 40]", "41"),
    "levels": (lambda: {"levels": 4}, "levels", "1, 2 or 3", "4"),
    "row_format": (lambda: {"row_format": "fp8"}, "row_format", None, "fp8"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse(name: str) -> None:
    changes, argument, expected, actual = MISUSES[name]
    with pytest.raises(RuntimeError, match=r"^flashmla::decode_up: argument") as caught:
        torch.ops.flashmla.decode_up(**arguments() | changes())
    error = from_message(str(caught.value))
    assert isinstance(error, ArgumentError)
    assert (error.argument, error.actual) == (argument, actual)
    assert expected in (None, error.expected)
    with FakeTensorMode(), pytest.raises(RuntimeError) as faked:
        torch.ops.flashmla.decode_up(**arguments() | changes())
    assert str(faked.value) == str(caught.value)


def test_bad_lengths_and_pages_and_schedules_are_named_by_this_operator() -> None:
    lengths = torch.tensor([9, 999], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"flashmla::decode_up: argument 'cache_seqlens'.* got 999 at \[1\]"):
        torch.ops.flashmla.decode_up(**arguments() | {"cache_seqlens": lengths})
    table = arguments()["block_table"].clone()  # type: ignore[attr-defined]
    table[1, 0] = 77
    with pytest.raises(RuntimeError, match=r"flashmla::decode_up: argument 'block_table'.* got 77 at \[1, 0\]"):
        torch.ops.flashmla.decode_up(**arguments() | {"block_table": table})
    plan = torch.ops.flashmla.decode_schedule(lengths[:1], 2, 6, 1, 2)
    with pytest.raises(RuntimeError, match=r"flashmla::decode_up: argument 'schedule'"):
        torch.ops.flashmla.decode_up(**arguments() | {"schedule": plan})


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, dtype: str, strided: bool) -> None:
    case = DecodeCase((9, 0, 16), s_q=2, h_q=6, page_size=8, d=32, d_v=32, d_k=8, dtype=dtype, strided=strided)
    case = replace(case, causal=True, num_parts=2, sink=True, softmax_scale=0.2)
    check(torch.ops.flashmla.decode_up.default, **build(case).kwargs(weight=weight_of(UpCase(case, 12, layout))))


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (2, 0, None, None), (None, 0, None, 0)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    case = DecodeCase((5, 0, 40), s_q=2, h_q=9, d=24, d_v=16, page_size=8, dtype="float32", strided=False)
    inputs, weight = build(case), weight_of(UpCase(case, 8))

    def attend(q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.flashmla.decode_up(q, kv_cache, None, block_table, cache_seqlens, weight, 16, causal=True)

    plain = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    mapped = [x if dim is None else torch.stack([x, x * 1], dim) for x, dim in zip(plain, in_dims, strict=True)]
    out, lse = torch.vmap(attend, in_dims)(*mapped)
    expected = attend(*plain)
    assert all(torch.equal(out[i], expected[0]) and torch.equal(lse[i], expected[1]) for i in range(2))
    weights = torch.stack([weight, 2 * weight])
    by_weight = torch.vmap(lambda w: torch.ops.flashmla.decode_up(*plain[:2], None, *plain[2:], w, 16, causal=True))
    torch.testing.assert_close(by_weight(weights)[0], torch.stack([expected[0], 2 * expected[0]]))


def test_one_compilation_for_all_batches_and_lengths() -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal compilations
        compilations += 1
        return graph.forward

    compiled = torch.compile(
        lambda inputs, weight: run(inputs, weight)[0] * 2, backend=backend, fullgraph=True, dynamic=True
    )
    for lengths in ((3, 4), (70, 80, 90), (5, 6, 7, 8)):
        case = UpCase(DecodeCase(lengths, h_q=4, d=24, d_v=16, page_size=8, strided=False), 8)
        inputs, weight = build(case.decode), weight_of(case)
        assert torch.equal(compiled(inputs, weight), run(inputs, weight)[0] * 2)
    assert compilations <= 2
