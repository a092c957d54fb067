"""``flashmla::summarize_``, ``flashmla::page_mass`` and ``flashmla::choose_pages``: which pages decoding attends to.

A page's mass for a query is the logarithm of the sum of ``exp(score)`` over its rows. `summarize_` writes what is kept
of the keys of pages that have become complete (`flashmla_ops.sparsity.summaries` has the kinds). `page_mass` estimates
masses from that, with a slack within which the truth is proven to lie; the first ``sink_pages`` pages of a sequence,
the last ``local_pages`` that its first query sees, and all after them, are always attended to: their mass is exact.
`choose_pages` chooses, for the query heads of each KV head together; `decode` then attends to what was chosen, with
one sequence for each KV head: `flashmla_ops.sparsity.attend` joins the three. Keys are those of `decode`:

    key = kv_cache[page, t, head, qk_start :] ++ k_cache[page, t, head, :]

    q                [b, s_q, h_q, d_qk] float32, bfloat16 or float16: query s sees the rows before length - s_q + s + 1
    kv_cache, k_cache  [n_pages, page_size, h_kv, d] and d_k or None, of one type
    block_table      [b, max_pages] int32: the pages of each sequence
    cache_seqlens    [b] int32: how many rows each sequence has
    summaries        [n_pages, h_kv, n_bytes] uint8; written by `summarize_`
    slot_mapping     [n] int64, as `append_` takes it: a page whose last slot is in it is complete
    kind             "codes", "boxes", "spread" or "signs"
    planes           [d_key, 128] float32 for "signs", else None
    softmax_scale    None: d_qk ** -0.5
    min_context      rows: a sequence with fewer attends to all; its masses are -inf
    mass, slack      [b, h_q, s_q, max_pages] float32: the truth lies within mass - slack and mass + slack
    rule, limit      "certified": skip the most of which it is proven that no query loses more than ``limit`` of its
                     softmax; "share": what every query gives less than ``limit`` of it; "fraction": attend to
                     the share ``limit`` of the pages, the heaviest; "mask": skip what has a mass of -inf
    page_size, h_kv  of the cache that was chosen from
    page_step, head_step  page p of KV head h becomes ``p * page_step + h * head_step``

`page_mass` returns mass and slack [b, h_q, s_q, max_pages] float32. `choose_pages` returns pages [b * h_kv, max_pages]
int32, a block table with a row for each KV head of each sequence, in order; lengths [b * h_kv] int32; and residue [b,
h_q, s_q] float32, no less than the logarithm of the summed ``exp(score)`` of what is skipped: with the lse of `decode`
over what is kept, ``sigmoid(residue - lse)`` bounds the share that is lost. A page with a mass or slack that is not a
number is never skipped, unless by "mask".
Raises `ArgumentError` for what does not fit, a length beyond the block table, a slot past the end of the cache, and a
page that the cache does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result
from flashmla_ops.ops.decode import check_lengths, check_table
from flashmla_ops.ops.operator import Arguments, Operator
from flashmla_ops.reference.pages import RULES
from flashmla_ops.sparsity.summaries import SUMMARIES, SUMMARY_NAMES, summary_bytes, summary_planes

RULE_NAMES = ", ".join(RULES)
#: So that 32 bits hold a sum of products of 4-bit codes and 16-bit weights.
MAX_KEY = 4096


@dataclass
class Summarize(Arguments):
    """Summaries, and the cache whose pages are summarized."""

    summaries: Tensor  # [n_pages, h_kv, n_bytes] uint8
    kv_cache: Tensor  # [n_pages, page_size, h_kv, d], d contiguous
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k], d_k contiguous
    slot_mapping: Tensor  # [n] int64
    kind: str
    qk_start: int = 0
    planes: Tensor | None = None  # [d_key, n_planes] float32


@dataclass
class PageMass(Arguments):
    """Queries, and the pages of a cache with their summaries."""

    q: Tensor  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor  # [n_pages, page_size, h_kv, d], d contiguous
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k], d_k contiguous
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    summaries: Tensor  # [n_pages, h_kv, n_bytes] uint8
    kind: str
    qk_start: int = 0
    softmax_scale: float | None = None
    sink_pages: int = 1
    local_pages: int = 2
    min_context: int = 0
    planes: Tensor | None = None  # [d_qk, n_planes] float32


@dataclass
class ChoosePages(Arguments):
    """Masses of pages, and how to choose by them."""

    mass: Tensor  # [b, h_q, s_q, max_pages] float32
    slack: Tensor  # [b, h_q, s_q, max_pages] float32
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    rule: str
    limit: float
    page_size: int
    h_kv: int
    page_step: int
    head_step: int
    sink_pages: int = 1
    local_pages: int = 2
    min_context: int = 0


def check_summaries(
    check: Check,
    summaries: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    kind: str,
    qk_start: int,
    planes: Tensor | None,
) -> None:
    """A cache of elements, and summaries of its pages."""
    check.require("kind", kind in SUMMARIES, f"one of {SUMMARY_NAMES}", kind)
    check.dims("kv_cache", kv_cache, "[n_pages, page_size, h_kv, d]")
    check.floating("kv_cache", kv_cache)
    check.contiguous_rows("kv_cache", kv_cache)
    check.require("kv_cache", kv_cache.size(1) >= 1, "page_size of at least 1", kv_cache.size(1))
    check.require("kv_cache", kv_cache.size(2) >= 1, "at least 1 KV head (h_kv)", kv_cache.size(2))
    d = kv_cache.size(3)
    check.require("qk_start", qk_start >= 0 and qk_start <= d, f"a value in [0, {d}]", qk_start)
    if k_cache is not None:
        check.dims("k_cache", k_cache, "[n_pages, page_size, h_kv, d_k]")
        check.dtype("k_cache", k_cache, kv_cache.dtype)
        check.device("k_cache", k_cache, kv_cache)
        check.contiguous_rows("k_cache", k_cache)
        check.same_sizes("k_cache", k_cache, "kv_cache", kv_cache, 3)
    d_key = d - qk_start + (0 if k_cache is None else k_cache.size(3))
    check.require("qk_start", d_key >= 1 and d_key <= MAX_KEY, f"keys of 1 to {MAX_KEY} elements", d_key)
    check.dims("summaries", summaries, "[n_pages, h_kv, n_bytes]")
    check.dtype("summaries", summaries, torch.uint8)
    check.device("summaries", summaries, kv_cache)
    check.contiguous_rows("summaries", summaries)
    check.size("summaries", summaries, 0, kv_cache.size(0), " pages, as kv_cache")
    check.size("summaries", summaries, 1, kv_cache.size(2), " KV heads, as kv_cache")
    n_bytes = summary_bytes(kind, kv_cache.size(1), d_key)
    check.size("summaries", summaries, 2, n_bytes, " bytes, for pages and keys of this size")
    n_planes = summary_planes(kind)
    if n_planes > 0:
        check.require("planes", planes is not None, f"a tensor for {kind}", "None")
    else:
        check.require("planes", planes is None, f"None for {kind}", "a tensor")
    if planes is not None:
        check.dims("planes", planes, "[d_key, n_planes]")
        check.dtype("planes", planes, torch.float32)
        check.device("planes", planes, kv_cache)
        check.size("planes", planes, 0, d_key, " elements, as keys")
        check.size("planes", planes, 1, n_planes, " planes")


def check_always(check: Check, sink_pages: int, local_pages: int, min_context: int) -> None:
    check.require("sink_pages", sink_pages >= 0, "at least 0", sink_pages)
    check.require("local_pages", local_pages >= 1, "at least 1", local_pages)
    check.require("min_context", min_context >= 0, "at least 0", min_context)


def contract_summarize(check: Check, a: Summarize) -> None:
    check_summaries(check, a.summaries, a.kv_cache, a.k_cache, a.kind, a.qk_start, a.planes)
    check.dims("slot_mapping", a.slot_mapping, "[n]")
    check.dtype("slot_mapping", a.slot_mapping, torch.int64)
    check.device("slot_mapping", a.slot_mapping, a.kv_cache)
    check.apart("summaries", a.summaries, {"kv_cache": a.kv_cache, "slot_mapping": a.slot_mapping})
    if a.k_cache is not None:
        check.apart("summaries", a.summaries, {"k_cache": a.k_cache})
    if a.planes is not None:
        check.apart("summaries", a.summaries, {"planes": a.planes})


def contract_mass(check: Check, a: PageMass) -> tuple[Result, Result]:
    check.dims("q", a.q, "[b, s_q, h_q, d_qk]")
    check.floating("q", a.q)
    b, s_q, h_q, d_qk = a.q.shape
    check.require("q", s_q >= 1, "at least 1 query token (s_q)", s_q)
    check_summaries(check, a.summaries, a.kv_cache, a.k_cache, a.kind, a.qk_start, a.planes)
    check.dtype("kv_cache", a.kv_cache, a.q.dtype)
    check.device("kv_cache", a.kv_cache, a.q)
    h_kv = a.kv_cache.size(2)
    check.require("q", h_q % h_kv == 0, f"query heads in multiples of the {h_kv} KV heads", h_q)
    d_key = a.kv_cache.size(3) - a.qk_start + (0 if a.k_cache is None else a.k_cache.size(3))
    check.require("q", d_qk == d_key, f"d_qk {d_key}, the length of a key", d_qk)
    check_table(check, a.block_table, a.cache_seqlens, a.q, b, " sequences, as q")
    check_always(check, a.sink_pages, a.local_pages, a.min_context)
    max_pages = a.block_table.size(1)
    return Result([b, h_q, s_q, max_pages], torch.float32), Result([b, h_q, s_q, max_pages], torch.float32)


def contract_choose(check: Check, a: ChoosePages) -> tuple[Result, Result, Result]:
    check.dims("mass", a.mass, "[b, h_q, s_q, max_pages]")
    check.dtype("mass", a.mass, torch.float32)
    check.dims("slack", a.slack, "[b, h_q, s_q, max_pages]")
    check.dtype("slack", a.slack, torch.float32)
    check.device("slack", a.slack, a.mass)
    check.same_sizes("slack", a.slack, "mass", a.mass, 4)
    b, h_q, s_q, max_pages = a.mass.shape
    check_table(check, a.block_table, a.cache_seqlens, a.mass, b, " sequences, as mass")
    check.size("block_table", a.block_table, 1, max_pages, " pages, as mass")
    check.require("rule", a.rule in RULES, f"one of {RULE_NAMES}", a.rule)
    check.require("limit", a.limit >= 0.0 and a.limit <= 1.0, "a number in [0, 1]", a.limit)
    check.require("page_size", a.page_size >= 1, "at least 1", a.page_size)
    check.require("h_kv", a.h_kv >= 1, "at least 1", a.h_kv)
    check.require("mass", h_q % a.h_kv == 0, f"query heads in multiples of the {a.h_kv} KV heads", h_q)
    check.require("mass", s_q >= 1, "at least 1 query token (s_q)", s_q)
    check_always(check, a.sink_pages, a.local_pages, a.min_context)
    pages, lengths = Result([b * a.h_kv, max_pages], torch.int32), Result([b * a.h_kv], torch.int32)
    return pages, lengths, Result([b, h_q, s_q], torch.float32)


def check_slots(check: Check, a: Summarize) -> None:
    slots = a.kv_cache.size(0) * a.kv_cache.size(1)
    for i, slot in enumerate(a.slot_mapping.tolist()):
        if slot >= slots:
            raise ArgumentError(check.op, "slot_mapping", f"slots below {slots}", f"{slot} at [{i}]")


def sharding_summarize(a: Summarize) -> list[Way]:
    return [{"summaries": 1, "kv_cache": 2, "k_cache": 2}]


def sharding_mass(a: PageMass) -> list[Way]:
    """By sequences, or by heads."""
    heads: Way = {"kv_cache": 2, "k_cache": 2, "summaries": 1} if a.kv_cache.size(2) > 1 else {}
    return [
        {"q": 0, "block_table": 0, "cache_seqlens": 0, "mass": 0, "slack": 0},
        {"q": 2, "mass": 1, "slack": 1, **heads},
    ]


def sharding_choose(a: ChoosePages) -> list[Way]:
    """By sequences: the heads of a KV head choose together, and their number is an argument."""
    return [
        dict.fromkeys(("mass", "slack", "block_table", "cache_seqlens", "pages", "lengths", "residue"), 0),
    ]


SUMMARIZE = Operator(
    "summarize_",
    Summarize,
    contract_summarize,
    lambda a: reference.summarize(*a.values()),
    mutates=("summaries",),
    values=check_slots,
    vmap=loop(lambda: torch.ops.flashmla.summarize_.default),
    sharding=sharding_summarize,
)
PAGE_MASS = Operator(
    "page_mass",
    PageMass,
    contract_mass,
    lambda a: reference.page_mass(*a.values()),
    returns=("mass", "slack"),
    values=lambda check, a: check_lengths(check, a.block_table, a.cache_seqlens, a.kv_cache.size(1)),
    vmap=loop(lambda: torch.ops.flashmla.page_mass.default),
    sharding=sharding_mass,
)
CHOOSE_PAGES = Operator(
    "choose_pages",
    ChoosePages,
    contract_choose,
    lambda a: reference.choose_pages(*a.values()),
    returns=("pages", "lengths", "residue"),
    values=lambda check, a: check_lengths(check, a.block_table, a.cache_seqlens, a.page_size),
    vmap=loop(lambda: torch.ops.flashmla.choose_pages.default),
    sharding=sharding_choose,
)
