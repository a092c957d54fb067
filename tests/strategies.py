"""Hypothesis strategies: geometry, lengths and layouts of the cases that the operators must serve."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from flashmla_ops.formats import NATIVE, QUANTIZED
from tests.support.cases import DecodeCase
from tests.support.sparse import Rows, SparseCase

DTYPES = ("bfloat16", "float16", "float32")
SEEDS = st.integers(0, 2**31 - 1)

#: (h_q, h_kv): MLA's single KV head with awkward and common head counts, and grouped and full multi-head attention.
HEADS = st.one_of(
    st.sampled_from([1, 3, 9, 16, 17, 63, 64, 126, 128]).map(lambda h_q: (h_q, 1)),
    st.tuples(st.integers(1, 9), st.integers(1, 5)).map(lambda x: (x[0] * x[1], x[1])),
)

PAGE_SIZES = st.one_of(st.sampled_from([1, 2, 16, 64]), st.integers(1, 70))

SCALES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, -0.25, 0.125]))


@st.composite
def rows(draw: st.DrawFn) -> dict[str, int | None]:
    """How value and key lie in a row: the four layouts of the design, and any overlap of the two."""
    width = st.one_of(st.integers(1, 80), st.sampled_from([16, 32, 64, 128]))
    d_v, d_key, d_r = draw(width), draw(width), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(["mla", "mla_two", "gqa", "gqa_two", "overlap"]))
    if kind == "mla":
        return {"d": d_v + d_r, "d_v": d_v, "qk_start": 0, "d_k": None}
    if kind == "mla_two":
        return {"d": d_v, "d_v": d_v, "qk_start": 0, "d_k": d_r}
    if kind == "gqa":
        return {"d": d_v + d_key, "d_v": d_v, "qk_start": d_v, "d_k": None}
    if kind == "gqa_two":
        return {"d": d_v, "d_v": d_v, "qk_start": d_v, "d_k": d_key}
    start = draw(st.integers(0, d_v + d_r - 1))
    return {"d": d_v + d_r, "d_v": d_v, "qk_start": start, "d_k": draw(st.none() | st.integers(1, 70))}


@st.composite
def lengths(draw: st.DrawFn, page_size: int, longest: int = 300) -> tuple[int, ...]:
    """Lengths of up to 5 sequences, zero and the neighbourhood of page and tile borders included."""
    border = st.builds(
        lambda n, delta: max(0, n + delta), st.sampled_from([page_size, 2 * page_size, 32, 64, 128]), st.integers(-1, 1)
    )
    one = st.one_of(st.just(0), st.integers(1, 5), border, st.integers(0, longest))
    return tuple(draw(st.lists(one, min_size=0, max_size=5)))


@st.composite
def options(draw: st.DrawFn, n_sequences: int) -> dict[str, object]:
    """Options of decode that have sequences cut in ways of their own, and what scores become."""
    ragged = st.lists(st.integers(0, 40) | st.just(1), min_size=n_sequences, max_size=n_sequences).map(tuple)
    return {
        "window": draw(st.just(0) | st.integers(1, 5) | st.integers(1, 200)),
        "softcap": draw(st.sampled_from([0.0, 0.5, 30.0])),
        "s_qs": draw(st.none() | ragged),
        "batch_invariant": draw(st.booleans()),
    }


@st.composite
def option_cases(draw: st.DrawFn) -> DecodeCase:
    """A decode case with any options, among them prompts, parts of prompts and decoding sequences in one call."""
    case: DecodeCase = draw(decode_cases() | mla_cases())
    return replace(case, num_parts=None, **draw(options(len(case.lengths))))


@st.composite
def decode_cases(draw: st.DrawFn) -> DecodeCase:
    """Any small decode case."""
    h_q, h_kv = draw(HEADS)
    page_size = draw(PAGE_SIZES)
    return DecodeCase(
        lengths=draw(lengths(page_size)),
        s_q=draw(st.integers(1, 4)),
        h_q=h_q,
        h_kv=h_kv,
        page_size=page_size,
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        softmax_scale=draw(SCALES),
        num_parts=draw(st.none() | st.integers(1, 9)),
        sink=draw(st.booleans()),
        strided=draw(st.booleans()),
        q_spread=draw(st.sampled_from([0.1, 1.0, 10.0])),
        seed=draw(SEEDS),
        **draw(rows()),
    )


@st.composite
def mla_cases(draw: st.DrawFn) -> DecodeCase:
    """The geometry of DeepSeek models (latent 512, rotary 64), where the widest kernels run."""
    two = draw(st.booleans())
    return DecodeCase(
        lengths=draw(lengths(64)),
        s_q=draw(st.integers(1, 4)),
        h_q=draw(st.sampled_from([1, 3, 9, 16, 63, 64, 126, 128])),
        page_size=draw(st.sampled_from([16, 64, 128])),
        d=512 if two else 576,
        d_k=64 if two else None,
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        num_parts=draw(st.none() | st.integers(1, 9)),
        sink=draw(st.booleans()),
        strided=draw(st.booleans()),
        q_spread=draw(st.sampled_from([0.1, 1.0, 10.0])),
        seed=draw(SEEDS),
    )


@st.composite
def sparse_rows(draw: st.DrawFn, row_format: str) -> Rows:
    """A source of rows: a cache of up to nine pages, and indices of which some or all name nothing."""
    return Rows(
        topk=draw(st.one_of(st.integers(0, 3), st.sampled_from([63, 64, 65, 128, 129]), st.integers(0, 300))),
        n_pages=draw(st.sampled_from([0, 1, 2, 5, 9])),
        page_size=draw(PAGE_SIZES),
        row_format=row_format,
        lengths=draw(st.booleans()),
        invalid=draw(st.sampled_from([0.0, 0.2, 0.9, 1.0])),
    )


@st.composite
def sparse_cases(draw: st.DrawFn) -> SparseCase:
    """Any small sparse case: native rows in all their layouts, or rows of bytes, from one source or two."""
    h_q, h_kv = draw(HEADS | st.sampled_from([5, 20, 112, 200]).map(lambda h_q: (h_q, 1)))
    options = {
        "b": draw(st.integers(0, 3)),
        "s_q": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "softmax_scale": draw(SCALES),
        "sink": draw(st.booleans()),
        "batch_invariant": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "seed": draw(SEEDS),
    }
    first = draw(st.sampled_from([NATIVE, *QUANTIZED]))
    if first == NATIVE:
        layout = draw(rows() | st.just({"d": 576, "d_v": 512, "qk_start": 0, "d_k": None}))
        layout["d"] += layout["d_k"] or 0
        extra = draw(st.none() | sparse_rows(NATIVE))
        return SparseCase(draw(sparse_rows(NATIVE)), extra, h_q=h_q, h_kv=h_kv, **layout, **options)
    elements = QUANTIZED[first].elements
    others = sorted(name for name, row in QUANTIZED.items() if row.elements == elements)
    extra = draw(st.none() | st.sampled_from(others).flatmap(sparse_rows))
    return SparseCase(draw(sparse_rows(first)), extra, h_q=h_q, d=elements, d_v=512, **options)
