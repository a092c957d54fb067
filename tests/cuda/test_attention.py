"""`flashmla::decode` on CUDA, executed by the emulator, against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_kernels import emulator
from cutlass_kernels.attention import libraries
from flashmla_ops import reference
from flashmla_ops.cuda import attention
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NATIVE, QUANTIZED
from tests import strategies
from tests.cuda.emulated import Emulated, device, no_hazards
from tests.ops.test_row_formats import ROUNDED, cache_of, queries
from tests.support.cases import DecodeCase, build
from tests.support.compare import OFFICIAL_LSE, OFFICIAL_OUT, difference
from tests.support.oracle import check_decode
from tests.support.poison import same_bits
from tests.support.rows import empty_cache, write
from tests.support.sparse import Rows, SparseCase
from tests.support.sparse import build as build_sparse
from tests.support.sparse import check as check_sparse

pytestmark = pytest.mark.skipif(not libraries.can_build(), reason=f"{libraries.DSL} is not installed")


ARCHS = ("sm_80", "sm_90a")


def launched(emulated: Emulated, served: bool = True) -> None:
    """The kernel ran, and what merges its pieces where there can be any; nothing did if there is no result."""
    kinds = tuple(config.kind.removesuffix("_sm90") for config in emulated.configs)
    assert kinds in ((("decode",), ("decode", "combine")) if served else ((),))


def emulated_device(arch: str, multiprocessors: int = 5, landing: emulator.Landing = "late") -> Emulated:
    return Emulated(device(multiprocessors, arch), emulator.Options(landing=landing), arch)


def check(case: DecodeCase, arch: str = "sm_80", **options: Any) -> Emulated:
    emulated = emulated_device(arch, **options)
    with no_hazards(emulated) as engine:
        check_decode(case, lambda **kwargs: attention.decode(engine, **kwargs))
    launched(emulated, bool(case.lengths))
    return emulated


@st.composite
def cases(draw: st.DrawFn) -> DecodeCase:
    """The geometry of DeepSeek's models, in a cache of one tensor or of two."""
    page_size = draw(strategies.PAGE_SIZES)
    two = draw(st.booleans())
    return DecodeCase(
        lengths=draw(strategies.lengths(page_size, 200)),
        s_q=draw(st.integers(1, 3)),
        h_q=draw(st.sampled_from([1, 3, 16, 17, 40, 128])),
        page_size=page_size,
        d=512 if two else 576,
        d_k=64 if two else None,
        dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        causal=draw(st.booleans()),
        softmax_scale=draw(strategies.SCALES),
        sink=draw(st.booleans()),
        strided=False,
        q_spread=draw(st.sampled_from([0.1, 1.0, 10.0])),
        seed=draw(strategies.SEEDS),
    )


@settings(max_examples=24)
@given(cases(), st.sampled_from(ARCHS), st.integers(1, 9), st.sampled_from(["late", "early"]))
def test_drawn(case: DecodeCase, arch: str, multiprocessors: int, landing: emulator.Landing) -> None:
    check(case, arch, multiprocessors=multiprocessors, landing=landing)


@pytest.mark.slow
@settings(max_examples=300)
@given(cases(), st.sampled_from(ARCHS), st.integers(1, 9), st.sampled_from(["late", "early"]))
def test_many(case: DecodeCase, arch: str, multiprocessors: int, landing: emulator.Landing) -> None:
    check(case, arch, multiprocessors=multiprocessors, landing=landing)


ROWS: list[dict[str, Any]] = [
    {"d": 96, "d_v": 64},
    {"d": 64, "d_v": 64, "d_k": 32},
    {"d": 256, "d_v": 128, "qk_start": 128},
    {"d": 128, "d_v": 128, "qk_start": 128, "d_k": 128},
    {"d": 512, "d_v": 512},
    {"d": 80, "d_v": 48, "qk_start": 16},
    {"d": 64, "d_v": 64, "d_k": 32, "dtype": "float16"},
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows(rows: dict[str, Any]) -> None:
    check(DecodeCase((70, 0, 33), s_q=2, h_q=12, h_kv=3, page_size=5, causal=True, strided=False, **rows))


def sources(row_format: str) -> st.SearchStrategy[Rows]:
    return st.builds(
        Rows,
        topk=st.sampled_from([0, 1, 31, 32, 65, 130]),
        n_pages=st.sampled_from([0, 1, 5]),
        page_size=st.sampled_from([2, 16, 64]),
        row_format=st.just(row_format),
        lengths=st.booleans(),
        invalid=st.sampled_from([0.0, 0.2, 1.0]),
    )


@st.composite
def sparse_cases(draw: st.DrawFn, names: Sequence[str]) -> SparseCase:
    name = draw(st.sampled_from(names))
    d = QUANTIZED[name].elements if name in QUANTIZED else 576
    like = [other for other in names if other != NATIVE and QUANTIZED[other].elements == d] or [NATIVE]
    like = like if name in QUANTIZED else [NATIVE]
    return SparseCase(
        draw(sources(name)),
        draw(st.none() | st.sampled_from(like).flatmap(sources)),
        b=draw(st.integers(0, 3)),
        s_q=draw(st.integers(1, 3)),
        h_q=draw(st.sampled_from([1, 16, 64, 128])),
        d=d,
        d_v=512,
        softmax_scale=draw(st.sampled_from([None, 0.125])),
        sink=draw(st.booleans()),
        batch_invariant=draw(st.booleans()),
        strided=False,
        seed=draw(strategies.SEEDS),
    )


def check_sparse_case(case: SparseCase, arch: str, multiprocessors: int, landing: emulator.Landing) -> None:
    emulated = emulated_device(arch, multiprocessors, landing)
    with no_hazards(emulated) as engine:
        check_sparse(case, lambda **kwargs: attention.sparse_decode(engine, **kwargs))
    launched(emulated, bool(case.b))


PLACES = (st.sampled_from(ARCHS), st.integers(1, 9), st.sampled_from(["late", "early"]))


@settings(max_examples=24)
@given(sparse_cases([NATIVE, "fp8_v32"]), *PLACES)
def test_sparse(case: SparseCase, arch: str, multiprocessors: int, landing: emulator.Landing) -> None:
    check_sparse_case(case, arch, multiprocessors, landing)


@pytest.mark.slow
@settings(max_examples=200)
@given(sparse_cases([NATIVE, *QUANTIZED]), *PLACES)
def test_sparse_in_every_format(case: SparseCase, arch: str, multiprocessors: int, landing: emulator.Landing) -> None:
    check_sparse_case(case, arch, multiprocessors, landing)


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_row_format(name: str) -> None:
    """Pages of every format, with NaN among the codes of rows that no query sees."""
    row = QUANTIZED[name]
    cache = cache_of(row, (70, 0, 33), 16, seed=1, gaps=False)
    q = queries(3, 2, 20, row, "bfloat16", 1)
    arguments = (q, cache["kv_cache"], None, cache["block_table"], cache["cache_seqlens"], 512)
    emulated = emulated_device("sm_80")
    with no_hazards(emulated) as engine:
        out, lse = attention.decode(engine, *arguments, causal=True, row_format=name)
    launched(emulated)
    expected, expected_lse = reference.decode(*arguments, causal=True, row_format=name)
    wide = name.startswith("int")
    problem = difference("out", out, expected.bfloat16(), ROUNDED if wide else OFFICIAL_OUT)
    assert problem is None, problem
    assert difference("lse", lse, expected_lse.float(), OFFICIAL_LSE if not wide else ROUNDED) is None


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_every_code(name: str) -> None:
    """One row a query sees alone, so that its result is the row: all codes, under all sorts of scales.

    A row that has a NaN among its codes has NaN for its score, and is NaN: a few such rows are enough.
    """
    row = QUANTIZED[name]
    n = 64
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 256, (n, 1, row.bytes), generator=generator, dtype=torch.uint8)
    rows[:, :, : row.codes_bytes] = torch.arange(row.codes_bytes) + torch.arange(n)[:, None, None]
    if name.startswith("fp"):
        rows[4:] = torch.where(rows[4:] & 0x7F == 0x7F, rows[4:] - 1, rows[4:])
    if row.scale_bytes == 4:
        scales = torch.randn(n, 1, row.groups, generator=generator)
        rows[..., row.scales_at : row.scales_at + 4 * row.groups] = scales.view(torch.uint8)
    elif row.bits == 8:  # exponents, of a row as of its neighbours
        scale = rows[..., row.scales_at : row.scales_at + row.groups]
        scale[:] = scale % 40 + 100
    if row.rope:
        rope = torch.randn(n, 1, row.rope, generator=generator).bfloat16()
        rows[..., row.rope_at : row.rope_at + 2 * row.rope] = rope.view(torch.uint8)
    cache = empty_cache(row, n // 2, 2, gaps=False)
    write(row, cache, torch.arange(n), rows)
    indices = torch.arange(n, dtype=torch.int32).view(n, 1, 1)
    q = torch.zeros(n, 1, 1, row.elements, dtype=torch.bfloat16)
    emulated = emulated_device("sm_80")
    with no_hazards(emulated) as engine:
        out, _ = attention.sparse_decode(engine, q, cache, None, indices, row.elements, row_format=name)
    launched(emulated)
    expected = row.dequantize(rows).bfloat16().view(n, -1)
    expected[expected.isnan().any(dim=1)] = torch.nan
    assert torch.equal(out.view(n, -1).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_call_is_planned_once() -> None:
    """Calls that differ in addresses and values alone share what was found out; others do not."""
    emulated = emulated_device("sm_80")
    engine = emulated.engine
    case = DecodeCase((70, 3), h_q=3, d=64, d_v=64, strided=False)
    for seed, table in ((1, slice(None)), (2, slice(None)), (3, slice(0, 2))):
        inputs = build(replace(case, seed=seed))
        given = inputs.kwargs(block_table=inputs.block_table[:, table].contiguous())
        out, _ = attention.decode(engine, **given)
        expected = reference.decode(**inputs.reference_kwargs())[0]
        assert difference("out", out, expected.bfloat16(), OFFICIAL_OUT) is None
    assert len(engine.plans) == 2
    assert len(emulated.configs) == 6


def test_what_no_kernel_takes_runs_by_definition_and_says_why() -> None:
    engine = emulated_device("sm_80").engine
    for changes, why in (
        ({"dtype": "float32"}, "float32"),
        ({"d": 20, "d_v": 20}, "multiple"),
        ({"strided": True}, "16 bytes"),
    ):
        check_decode(DecodeCase((5,), h_q=2, **{"strided": False, **changes}), partial(attention.decode, engine))
        assert why in next(reversed(engine.chosen.values()))
        assert "definition" in next(reversed(engine.chosen.values()))
    with pytest.raises(ArgumentError, match="d_v"):
        attention.decode(engine, **build(DecodeCase((5,), strided=False)).kwargs(d_v=577))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.25, 1e-35, 1e4])
def test_any_scale(arch: str, scale: float) -> None:
    """A scale of 0 attends to all rows alike; masked rows, whose score is -inf, stay masked."""
    check(DecodeCase((70, 0, 1), s_q=2, h_q=40, causal=True, softmax_scale=scale, sink=True, strided=False), arch)


def test_decode_up() -> None:
    emulated = emulated_device("sm_80")
    inputs = build(DecodeCase((70, 0, 3), s_q=2, h_q=3, d=64, d_v=64, causal=True, sink=True, strided=False))
    weight = torch.randn(3, 48, 64, generator=torch.Generator().manual_seed(1)).bfloat16().mT
    with no_hazards(emulated) as engine:
        out, lse = attention.decode_up(engine, **inputs.kwargs(weight=weight))
    launched(emulated)
    expected, expected_lse = reference.decode_up(**inputs.reference_kwargs(weight=weight))
    assert out.is_contiguous()
    assert difference("out", out, expected.bfloat16(), replace(ROUNDED, absolute=2e-2)) is None
    assert difference("lse", lse, expected_lse.float(), OFFICIAL_LSE) is None


@pytest.mark.parametrize("arch", ARCHS)
def test_batch_invariant(arch: str) -> None:
    """The bits of a sequence are those of a call of its own, however many multiprocessors there are."""
    case = SparseCase(Rows(200), b=5, s_q=2, h_q=64, sink=True, batch_invariant=True, strided=False)
    named = build_sparse(case)
    check_sparse_case(case, arch, 3, "late")

    def of(rows: slice, multiprocessors: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = {name: named[name][rows] for name in ("q", "indices")}
        with no_hazards(emulated_device(arch, multiprocessors)) as engine:
            return attention.sparse_decode(engine, **{**named, **own})

    alone = of(slice(2, 3), 7)
    for multiprocessors in (1, 4):
        together = of(slice(None), multiprocessors)
        assert all(same_bits(one, many[2:3]) for one, many in zip(alone, together, strict=True))
