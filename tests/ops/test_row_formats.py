"""decode and decode_up over rows of bytes: every format against float64, and bit for bit against its own elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import QUANTIZED, RowFormat, header
from tests.strategies import SEEDS, lengths
from tests.support.compare import OFFICIAL_LSE, OFFICIAL_OUT, Tolerance, difference
from tests.support.poison import same_bits
from tests.support.rows import empty_cache, read, write

FORMATS = sorted(QUANTIZED)
#: Beside queries of bfloat16 rows are held in it where pairs of it are multiplied: an integer times a scale is rounded.
ROUNDED = Tolerance(absolute=2e-3, relative=2.01 / 128, cosine=5e-6)


def cache_of(row: RowFormat, lens: tuple[int, ...], page_size: int, seed: int, gaps: bool) -> dict[str, Any]:
    """A cache of random rows in scattered pages; all else is poison, and so are entries behind a sequence's pages."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-n // page_size) for n in lens]
    order = torch.randperm(sum(pages) + 2, generator=generator)
    cache = empty_cache(row, sum(pages) + 2, page_size, gaps=gaps)
    table = torch.full((len(lens), max(pages, default=0) + 1), 2147480000, dtype=torch.int32)
    for i, (length, count) in enumerate(zip(lens, pages, strict=True)):
        table[i, :count], order = order[:count].int(), order[count:]
        spread = 0.3 * torch.rand(length, 1, 1, generator=generator)  # scales differ; the bounds are for small values
        rows = row.quantize(torch.randn(length, 1, row.elements, generator=generator) * spread)
        positions = torch.arange(length)
        write(row, cache, table[i, positions // page_size] * page_size + positions % page_size, rows)
    cache_seqlens = torch.tensor(lens, dtype=torch.int32)
    return {"kv_cache": cache, "block_table": table, "cache_seqlens": cache_seqlens}


def queries(b: int, s_q: int, h_q: int, row: RowFormat, dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(b, s_q, h_q, row.elements, generator=generator).to(getattr(torch, dtype))


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(FORMATS), page_size=st.sampled_from([1, 2, 16, 61, 64]), seed=SEEDS)
def test_decode_reads_every_format(data: st.DataObject, name: str, page_size: int, seed: int) -> None:
    row, lens = QUANTIZED[name], data.draw(lengths(page_size, longest=200))
    s_q, h_q = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 5, 8, 16, 20, 64, 128]))
    dtype, gaps = data.draw(st.sampled_from(["bfloat16", "float32", "float16"])), data.draw(st.booleans())
    cache = cache_of(row, lens, page_size, seed, gaps)
    q = queries(len(lens), s_q, h_q, row, dtype, seed)
    causal, levels = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2, 3, 3]))
    d_v = data.draw(st.sampled_from([512, row.elements, 100]))
    arguments = (q, cache["kv_cache"], None, cache["block_table"], cache["cache_seqlens"], d_v)
    sink = torch.randn(h_q) if data.draw(st.booleans()) else None
    out, lse = torch.ops.flashmla.decode(
        *arguments, causal=causal, row_format=name, attn_sink=sink, softmax_scale=0.05, levels=levels
    )
    expected, expected_lse = reference.decode(*arguments, 0, 0.05, causal, sink, name)
    rounded = name.startswith("int") and dtype == "bfloat16"
    tolerances = (ROUNDED, ROUNDED) if rounded else (OFFICIAL_OUT, OFFICIAL_LSE)
    problem = difference("out", out, expected, tolerances[0]) or difference("lse", lse, expected_lse, tolerances[1])
    assert problem is None, f"{problem}; {name} {lens} page {page_size} s_q {s_q} h_q {h_q} {dtype} seed {seed}"


@pytest.mark.parametrize("h_q", [1, 4, 16, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_result_is_that_of_the_elements(name: str, dtype: str, h_q: int) -> None:
    """Where the type holds the elements exactly, a native cache of them gives the same bits."""
    row, lens, page_size = QUANTIZED[name], (200, 0, 65, 3), 16
    cache = cache_of(row, lens, page_size, 3, gaps=False)
    q = queries(len(lens), 2, h_q, row, dtype, 3)
    kv = cache["kv_cache"]
    native = read(row, kv).to(q.dtype)
    where = (cache["block_table"], cache["cache_seqlens"], 512)
    made = torch.ops.flashmla.decode(q, kv, None, *where, causal=True, row_format=name)
    plain = torch.ops.flashmla.decode(q, native, None, *where, causal=True)
    assert all(same_bits(x, y) for x, y in zip(made, plain, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_decode_up_reads_it_too(name: str) -> None:
    row, lens = QUANTIZED[name], (70, 5)
    cache = cache_of(row, lens, 16, 5, gaps=True)
    q, weight = queries(2, 1, 16, row, "bfloat16", 5), torch.randn(16, 512, 64).bfloat16()
    arguments = (q, cache["kv_cache"], None, cache["block_table"], cache["cache_seqlens"])
    out, lse = torch.ops.flashmla.decode_up(*arguments, weight, 512, row_format=name)
    attended, expected = torch.ops.flashmla.decode(*arguments, 512, row_format=name)
    assert same_bits(lse, expected)
    torch.testing.assert_close(out, torch.einsum("bshv,hvu->bshu", attended, weight), atol=0.3, rtol=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_appended_rows_are_attended_to(name: str) -> None:
    row = QUANTIZED[name]
    cache = empty_cache(row, 4, 16, gaps=True)
    rows, table = torch.randn(40, 1, row.elements), torch.tensor([[2, 0, 3]], dtype=torch.int32)
    slots = torch.cat([torch.arange(16) + 16 * page for page in (2, 0, 3)])[:40]
    torch.ops.flashmla.append_(cache, rows, slots, name)
    q = queries(1, 1, 16, row, "bfloat16", 0)
    out, _ = torch.ops.flashmla.decode(
        q, cache, None, table, torch.tensor([40], dtype=torch.int32), 512, row_format=name
    )
    exact, _ = reference.decode(
        q, rows[None], None, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([40], dtype=torch.int32), 512
    )
    assert float((out.double() - exact).norm() / exact.norm()) < (0.2 if "4_" in name else 0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_one_graph_serves_all_lengths(name: str) -> None:
    row = QUANTIZED[name]
    compiled = torch.compile(
        lambda q, kv, table, lens: torch.ops.flashmla.decode(q, kv, None, table, lens, 512, row_format=name)[0] + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    for lens in ((30, 2), (5, 64)):
        cache = cache_of(row, lens, 16, 1, gaps=False)
        arguments = (queries(2, 1, 4, row, "bfloat16", 1), cache["kv_cache"], cache["block_table"])
        eager = torch.ops.flashmla.decode(
            arguments[0], arguments[1], None, arguments[2], cache["cache_seqlens"], 512, row_format=name
        )
        assert torch.equal(compiled(*arguments, cache["cache_seqlens"]), eager[0] + 1)


@pytest.mark.parametrize(
    ("changes", "argument", "expected"),
    [
        ({"kv_cache": torch.zeros(2, 4, 1, 576)}, "kv_cache", "uint8 or float8_e4m3fn"),
        ({"kv_cache": torch.zeros(2, 4, 1, 655, dtype=torch.uint8)}, "kv_cache", "rows of 656 bytes"),
        ({"k_cache": torch.zeros(2, 4, 1, 64)}, "k_cache", "None with rows of fp8_v32"),
        ({"q": torch.zeros(1, 1, 4, 656)}, "q", "d_qk 576"),
        ({"d_v": 600}, "d_v", r"a value in \[1, 576\]"),
        ({"row_format": "fp9"}, "row_format", "one of native, fp8_v32"),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_misuse_is_named(changes: dict[str, Any], argument: str, expected: str, fake: bool) -> None:
    good = {
        "q": torch.zeros(1, 1, 4, 576),
        "kv_cache": torch.zeros(2, 4, 1, 656, dtype=torch.uint8),
        "k_cache": None,
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "cache_seqlens": torch.zeros(1, dtype=torch.int32),
        "d_v": 512,
        "row_format": "fp8_v32",
    }
    given_ = good | changes
    if fake:
        given_ = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given_.items()}
    with pytest.raises((ArgumentError, RuntimeError), match=f"'{argument}': expected {expected}"):
        torch.ops.flashmla.decode(**given_)


def test_the_generated_headers_say_what_the_formats_say() -> None:
    text = header.generated()["flashmla/formats.h"]
    for number, (name, row) in enumerate(QUANTIZED.items(), 1):
        assert f"struct {row.cpp}Layout" in text
        assert f"X({number}, {row.cpp})" in text
        assert f'{{"{name}", ' in text
        assert f"bytes = {row.bytes};" in text
