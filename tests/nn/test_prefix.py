"""`prefill_with_prefix` against the float64 definition: any prefix, any pages, in place and chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import QUANTIZED
from flashmla_ops.nn import latents_to_heads, prefill_with_prefix
from flashmla_ops.nn.prefix import Span, chunks
from tests.strategies import PAGE_SIZES, SEEDS
from tests.support.compare import Tolerance, difference
from tests.support.poison import DEAD_PAGE
from tests.support.rows import empty_cache, read, write
from tests.support.threads import threads

#: For bf16 and fp16, the official bounds of dense prefill, with a wider cosine: partial results are rounded, and each
#: rounding of a weight is one error for the few columns of a small head.
OUT = {"float32": Tolerance(4e-6, 4e-5, 1e-9)}
OFFICIAL_OUT, LSE = Tolerance(1e-3, 8.01 / 128, 5e-5), Tolerance(4e-6, 2.01 / 65536, 1e-7)


@dataclass(frozen=True)
class PrefixCase:
    lengths: tuple[tuple[int, int], ...]  # (prefix, new tokens) of each sequence
    h_q: int = 4
    h_kv: int = 2  # of GQA; MLA has one row for all heads
    d_qk: int = 24
    d_v: int = 16
    d_c: int = 20  # of MLA
    page_size: int = 4
    dtype: str = "float32"
    split: bool = False  # two tensors
    chunk_tokens: int = 7
    softmax_scale: float | None = None
    seed: int = 0

    @property
    def bounds(self) -> list[int]:
        return list(accumulate((new for _, new in self.lengths), initial=0))


@st.composite
def prefix_cases(draw: st.DrawFn) -> PrefixCase:
    h_kv = draw(st.integers(1, 3))
    d_qk = draw(st.integers(2, 40) | st.sampled_from([64, 128, 192]))
    return PrefixCase(
        lengths=tuple(draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), max_size=4))),
        h_q=h_kv * draw(st.sampled_from([1, 2, 3, 7])),
        h_kv=h_kv,
        d_qk=d_qk,
        d_v=draw(st.integers(1, 40) | st.sampled_from([64, 128])),
        d_c=draw(st.integers(1, 48)),
        page_size=draw(PAGE_SIZES),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        split=draw(st.booleans()),
        chunk_tokens=draw(st.integers(1, 20) | st.sampled_from([64, 4096])),
        softmax_scale=draw(st.none() | st.sampled_from([0.0, -0.25, 1.0])),
        seed=draw(SEEDS),
    )


def scatter(rows: list[Tensor], page_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each sequence's rows ``[n, h, d]`` in shuffled pages, NaN everywhere else, dead entries behind in the table."""
    counts = [-(-len(each) // page_size) for each in rows]
    n_pages = sum(counts) + 2
    cache = rows[0].new_full((n_pages, page_size, *rows[0].shape[1:]), torch.nan)
    order = torch.randperm(n_pages, generator=generator).tolist()
    table = torch.full((len(rows), max(counts) + 1), DEAD_PAGE, dtype=torch.int32)
    for i, each in enumerate(rows):
        for at in range(counts[i]):
            table[i, at] = page = order.pop()
            tokens = each[at * page_size : (at + 1) * page_size]
            cache[page, : len(tokens)] = tokens
    return cache, table


def check(case: PrefixCase, *, mla: bool) -> None:
    """Rows of prefix and new tokens alike, cached up to the prefix; the reference sees the expanded whole."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div_(10).to(dtype)

    d_r = max(1, case.d_qk // 3)
    d_nope = case.d_qk - d_r
    widths = (case.d_c, d_r) if mla else (case.d_v, case.d_qk)
    rows = [normal(prefix + new, 1 if mla else case.h_kv, sum(widths)) for prefix, new in case.lengths]
    weight = normal(case.h_q * (d_nope + case.d_v), case.d_c)
    expand = latents_to_heads(weight, d_nope, case.d_v) if mla else None

    def heads(each: Tensor) -> tuple[Tensor, Tensor]:  # k, v
        return expand(each, None) if expand else (each[..., case.d_v :], each[..., : case.d_v])

    cached = [each[:prefix] for each, (prefix, _) in zip(rows, case.lengths, strict=True)]
    caches = [
        scatter([each[..., part] for each in cached], case.page_size, torch.Generator().manual_seed(case.seed))
        for part in ((slice(0, widths[0]), slice(widths[0], None)) if case.split else (slice(None),))
    ]
    q = normal(case.bounds[-1], case.h_q, case.d_qk)
    new_heads = [heads(each[prefix:]) for each, (prefix, _) in zip(rows, case.lengths, strict=True)]
    k, v = (torch.cat([pair[i] for pair in new_heads]) for i in range(2))
    cu_seqlens = torch.tensor(case.bounds, dtype=torch.int32)
    out, lse = prefill_with_prefix(
        q,
        k,
        v,
        cu_seqlens,
        caches[0][0],
        caches[1][0] if case.split else None,
        caches[0][1],
        torch.tensor([prefix for prefix, _ in case.lengths], dtype=torch.int32),
        qk_start=0 if mla else case.d_v,
        softmax_scale=case.softmax_scale,
        expand=expand,
        chunk_tokens=case.chunk_tokens,
    )
    all_k, all_v = (torch.cat([heads(each)[i] for each in rows]) for i in range(2))
    cu_all = torch.tensor([0, *accumulate(sum(pair) for pair in case.lengths)], dtype=torch.int32)
    expected = reference.prefill(q, all_k, all_v, cu_seqlens, cu_all, True, case.softmax_scale)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    problem = difference("out", out, expected[0].to(dtype), OUT.get(case.dtype, OFFICIAL_OUT))
    problem = problem or difference("lse", lse, expected[1].float(), LSE)
    assert problem is None, f"{problem} | {case!r}"


@settings(max_examples=150)
@given(prefix_cases().filter(lambda case: case.lengths))
def test_rows_in_place(case: PrefixCase) -> None:
    with threads(1):
        check(case, mla=False)


@settings(max_examples=150)
@given(prefix_cases().filter(lambda case: case.lengths))
def test_latents_chunk_by_chunk(case: PrefixCase) -> None:
    with threads(1):
        check(case, mla=True)


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_geometry(mla: bool, dtype: str) -> None:
    lengths = ((300, 130), (0, 70), (65, 0), (1, 1))
    check(PrefixCase(lengths, 16, 4, 192, 128, 512, 64, dtype, chunk_tokens=128), mla=mla)


def test_no_sequences() -> None:
    empty = torch.zeros(0, 2, 8)
    table, lengths = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    bounds = torch.zeros(1, dtype=torch.int32)
    out, lse = prefill_with_prefix(empty, empty, empty, bounds, torch.zeros(1, 1, 2, 16), None, table, lengths)
    assert (list(out.shape), list(lse.shape)) == ([0, 2, 8], [2, 0])


@given(st.lists(st.integers(0, 50), max_size=5), st.integers(1, 30))
def test_chunks_are_the_spans_in_order_and_bounded(lengths: list[int], tokens: int) -> None:
    spans = [Span(i, 0, length) for i, length in enumerate(lengths)]
    cut = list(chunks(spans, tokens))
    assert all(0 < sum(span.stop - span.start for span in chunk) <= tokens for chunk in cut)
    assert all(sum(span.stop - span.start for span in chunk) == tokens for chunk in cut[:-1])
    covered = [(span.sequence, at) for chunk in cut for span in chunk for at in range(span.start, span.stop)]
    assert covered == [(i, at) for i, length in enumerate(lengths) for at in range(length)]


def test_no_more_than_a_chunk_is_expanded() -> None:
    seen: list[int] = []
    plain = latents_to_heads(torch.randn(4 * 20, 8), 12, 8)

    def expand(rows: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.append(rows.shape[0])
        return plain(rows, rotary)

    cache, table = scatter([torch.randn(100, 1, 12), torch.randn(33, 1, 12)], 8, torch.Generator().manual_seed(0))
    q, k, v = torch.randn(6, 4, 16), torch.randn(6, 4, 16), torch.randn(6, 4, 8)
    bounds, prefixes = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([100, 33], dtype=torch.int32)
    prefill_with_prefix(q, k, v, bounds, cache, None, table, prefixes, expand=expand, chunk_tokens=50)
    assert seen == [50, 50, 33]


GOOD = {
    "q": torch.zeros(3, 2, 8),
    "k": torch.zeros(3, 1, 8),
    "v": torch.zeros(3, 1, 8),
    "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
    "kv_cache": torch.zeros(2, 4, 1, 8),
    "k_cache": torch.zeros(2, 4, 1, 8),
    "block_table": torch.tensor([[0, 1]], dtype=torch.int32),
    "prefix_lens": torch.tensor([5], dtype=torch.int32),
    "qk_start": 8,
}


@pytest.mark.parametrize(
    ("changed", "argument", "expected", "actual"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 3])}, "cu_seqlens", "values that never fall", "[0, 4, 3]"),
        ({"prefix_lens": torch.tensor([1, 1])}, "prefix_lens", "1 lengths, one for each sequence of cu_seqlens", "2"),
        (
            {"prefix_lens": torch.tensor([9])},
            "prefix_lens",
            "lengths in [0, 8], what block_table has room for",
            "9 at [0]",
        ),
        (
            {"prefix_lens": torch.tensor([-1])},
            "prefix_lens",
            "lengths in [0, 8], what block_table has room for",
            "-1 at [0]",
        ),
        ({"block_table": torch.tensor([0, 1])}, "block_table", "shape [1, max_pages]", "[2]"),
        ({"block_table": torch.tensor([[0, 2]])}, "block_table", "pages in [0, 2)", "2 at [0, 1]"),
        ({"kv_cache": torch.zeros(2, 4, 8)}, "kv_cache", "shape [n_pages, page_size, h, d]", "[2, 4, 8]"),
        ({"k_cache": torch.zeros(1, 4, 1, 8)}, "k_cache", "[2, 4, 1], as kv_cache", "[1, 4, 1]"),
        ({"chunk_tokens": 0}, "chunk_tokens", "at least 1", "0"),
    ],
)
def test_a_bad_argument_is_named(changed: dict[str, object], argument: str, expected: str, actual: str) -> None:
    prefill_with_prefix(**GOOD)
    with pytest.raises(ArgumentError) as raised:
        prefill_with_prefix(**(GOOD | changed))
    assert (raised.value.argument, raised.value.expected, raised.value.actual) == (argument, expected, actual)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_a_prefix_of_bytes(name: str, absorbed: bool) -> None:
    """As behind a native cache of the same elements: read in place, and expanded chunk by chunk."""
    row, generator = QUANTIZED[name], torch.Generator().manual_seed(0)
    cache = empty_cache(row, 6, 8, gaps=True)
    table = torch.tensor([[4, 0, 3], [2, 5, DEAD_PAGE]], dtype=torch.int32)
    prefixes, cu_seqlens = torch.tensor([20, 9], dtype=torch.int32), torch.tensor([0, 5, 8], dtype=torch.int32)
    for pages, length in zip(table.tolist(), prefixes.tolist(), strict=True):
        positions = torch.arange(length)
        slots = torch.tensor(pages)[positions // 8] * 8 + positions % 8
        write(row, cache, slots, row.quantize(torch.randn(length, 1, row.elements, generator=generator)))
    native = read(row, cache).float()
    d, h_k = (row.elements, 1) if absorbed else (16 + row.elements - 448, 4)  # c_kv is 448 wide
    q, k = torch.randn(8, 4, d, generator=generator), torch.randn(8, h_k, d, generator=generator)
    v = k[..., :512] if absorbed else torch.randn(8, 4, 16, generator=generator)
    weight = torch.randn(4 * 32, 448, generator=generator) / 20
    arguments = (q, k, v, cu_seqlens)
    where = {"expand": None if absorbed else latents_to_heads(weight, 16, 16), "chunk_tokens": 7}
    made = prefill_with_prefix(*arguments, cache, None, table, prefixes, row_format=name, **where)
    plain = prefill_with_prefix(*arguments, native, None, table, prefixes, **where)
    for x, y in zip(made, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
