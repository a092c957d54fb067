"""torch's own checks of every operator: schema, autograd registration, fake tensors, tracing with dynamic shapes."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from tests.strategies import DTYPES
from tests.support.cases import DecodeCase, build
from tests.support.poison import strided

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

LAYOUTS = {
    "mla": {"d": 40, "d_v": 32},
    "mla_two": {"d": 32, "d_v": 32, "d_k": 8},
    "gqa": {"d": 56, "d_v": 24, "qk_start": 24, "h_kv": 2},
    "gqa_two": {"d": 24, "d_v": 24, "qk_start": 24, "d_k": 32, "h_kv": 2},
}


def check(op: torch._ops.OpOverload, *args: object, utilities: tuple[str, ...] = UTILITIES, **kwargs: object) -> None:
    result = opcheck(op, args, kwargs, test_utils=utilities)
    assert result == dict.fromkeys(utilities, "SUCCESS")


def small(layout: str, dtype: str, lay_out: bool) -> DecodeCase:
    return DecodeCase(
        lengths=(9, 0, 16), s_q=2, h_q=6, page_size=8, dtype=dtype, strided=lay_out, causal=True, **LAYOUTS[layout]
    )


@pytest.mark.parametrize("lay_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode(layout: str, dtype: str, lay_out: bool) -> None:
    inputs = build(small(layout, dtype, lay_out))
    check(torch.ops.flashmla.decode.default, **inputs.kwargs())


@pytest.mark.parametrize("lay_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_with_every_option(dtype: str, lay_out: bool) -> None:
    case = small("mla_two", dtype, lay_out)
    case = DecodeCase(**{**case.__dict__, "num_parts": 2, "sink": True, "softmax_scale": 0.2})
    check(torch.ops.flashmla.decode.default, **build(case).kwargs())


@pytest.mark.parametrize("lay_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_out(dtype: str, lay_out: bool) -> None:
    inputs = build(small("mla", dtype, lay_out))
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    out, lse = torch.zeros_like(out), torch.zeros_like(lse)
    if lay_out:
        generator = torch.Generator().manual_seed(0)
        out, lse = strided(out, generator), strided(lse, generator, contiguous_rows=False)
    check(torch.ops.flashmla.decode.out, **inputs.kwargs(), out=out, lse=lse)


@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize("lay_out", [False, True])
def test_decode_schedule(num_parts: int, lay_out: bool) -> None:
    cache_seqlens = torch.tensor([5, 0, 700], dtype=torch.int32)
    if lay_out:
        cache_seqlens = strided(cache_seqlens, torch.Generator().manual_seed(0), contiguous_rows=False)
    check(torch.ops.flashmla.decode_schedule.default, cache_seqlens, 2, 16, 1, num_parts)


@pytest.mark.parametrize("lay_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two", [False, True])
def test_append(dtype: str, lay_out: bool, two: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    element = getattr(torch, dtype)
    caches = [torch.zeros(3, 4, 2, d, dtype=element) for d in (40, 8)]
    rows = [torch.randn(5, 2, d, generator=generator).to(element) for d in (40, 8)]
    slots = torch.tensor([0, -1, 11, 0, 5])
    if lay_out:
        caches = [strided(x, generator) for x in caches]
        rows = [strided(x, generator, contiguous_rows=False) for x in rows]
        slots = strided(slots, generator, contiguous_rows=False)
    if two:
        check(torch.ops.flashmla.append_.two, *caches, *rows, slots)
    else:
        check(torch.ops.flashmla.append_.default, caches[0], rows[0], slots)


@pytest.mark.parametrize("lay_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
def test_merge_states(dtype: str, lay_out: bool, batched: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = (2,) if batched else ()
    outs = [torch.randn(*batch, 3, 4, 24, generator=generator).to(getattr(torch, dtype)) for _ in range(3)]
    lses = [torch.randn(*batch, 4, 3, generator=generator) for _ in range(3)]
    if lay_out:
        outs = [strided(x, generator, contiguous_rows=False) for x in outs]
        lses = [strided(x, generator, contiguous_rows=False) for x in lses]
    check(torch.ops.flashmla.merge_states.default, outs, lses)
