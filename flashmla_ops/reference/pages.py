"""Which pages of a sequence a query attends to: summaries of pages, their softmax mass, and the choice, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.reference.cache import gather_rows
from flashmla_ops.sparsity.summaries import SUMMARIES

#: How `choose_pages` chooses; "mask" skips what has a mass of -inf.
RULES = ("certified", "share", "fraction", "mask")


@dataclass(frozen=True)
class Always:
    """The pages that are always attended to: the first ones, and the last that the first query sees and all after.

    A sequence has ``length`` rows, the last ``s_q`` of which are the queries' own.
    """

    page_size: int
    sink_pages: int
    local_pages: int
    min_context: int

    def candidates(self, length: int, s_q: int) -> range:
        """The other pages. Every query sees all of their rows, and rows after them."""
        seen = -(-(length - s_q + 1) // self.page_size)  # by the first query
        if length < self.min_context:
            return range(0)
        return range(self.sink_pages, max(self.sink_pages, seen - self.local_pages))


def summarize(
    summaries: Tensor,  # [n_pages, h_kv, n_bytes] uint8, written in place
    kv_cache: Tensor,  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None,  # [n_pages, page_size, h_kv, d_k]
    slot_mapping: Tensor,  # [n] int64
    kind: str,
    qk_start: int = 0,
    planes: Tensor | None = None,  # [d_key, n_planes] float32
) -> None:
    """Summarize the pages whose last row is among the slots: rows are appended in order, so they are complete."""
    page_size = kv_cache.size(1)
    last = slot_mapping[(slot_mapping >= 0) & (slot_mapping % page_size == page_size - 1)]
    pages = last.unique() // page_size
    if len(pages) == 0:
        return
    keys = kv_cache[pages][..., qk_start:]
    if k_cache is not None:
        keys = torch.cat([keys, k_cache[pages]], dim=-1)
    heads = keys.transpose(1, 2).flatten(0, 1).float()  # [pages * h_kv, page_size, d_key]
    summaries[pages] = SUMMARIES[kind].encode(heads, planes).unflatten(0, (len(pages), kv_cache.size(2)))


def page_mass(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor,  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None,  # [n_pages, page_size, h_kv, d_k]
    block_table: Tensor,  # [b, max_pages] int32
    cache_seqlens: Tensor,  # [b] int32
    summaries: Tensor,  # [n_pages, h_kv, n_bytes] uint8
    kind: str,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    sink_pages: int = 1,
    local_pages: int = 2,
    min_context: int = 0,
    planes: Tensor | None = None,  # [d_qk, n_planes] float32
) -> tuple[Tensor, Tensor]:  # mass and slack [b, h_q, s_q, max_pages], float64
    """The logarithm of each page's softmax mass, exact for the pages that are always attended to.

    Query s sees the rows before ``length - s_q + s + 1``. The slack has room for the rounding of results to float32.
    """
    b, s_q, h_q, d_qk = q.shape
    h_kv, scale = kv_cache.size(2), d_qk**-0.5 if softmax_scale is None else softmax_scale
    always = Always(kv_cache.size(1), sink_pages, local_pages, min_context)
    mass = q.new_full((b, h_q, s_q, block_table.size(1)), -math.inf, dtype=torch.float64)
    slack = torch.zeros_like(mass)
    for i, length in enumerate(cache_seqlens.tolist()):
        if length < max(min_context, 1):
            continue
        candidates = always.candidates(length, s_q)
        heads = q[i].double().view(s_q, h_kv, h_q // h_kv, d_qk).permute(1, 2, 0, 3) * scale  # [h_kv, group, s_q, d]
        exact = _exact_mass(heads, kv_cache, k_cache, block_table[i], length, qk_start, i)
        mass[i, :, :, : exact.size(-1)] = exact.flatten(0, 1)
        pages = block_table[i, candidates.start : candidates.stop].long()
        for head in range(h_kv if len(candidates) else 0):
            rows = heads[head].flatten(0, 1)
            estimate = SUMMARIES[kind].mass(rows, summaries[pages, head], always.page_size, planes)
            group = slice(head * heads.size(1), (head + 1) * heads.size(1))
            for result, part in zip((mass, slack), estimate, strict=True):
                result[i, group, :, candidates.start : candidates.stop] = part.unflatten(0, (-1, s_q))
    return mass, slack + (2**-20 * (1 + mass.abs())).where(mass > -math.inf, 0.0)


def _exact_mass(
    q: Tensor,  # [h_kv, group, s_q, d_qk] float64, scaled
    kv_cache: Tensor,
    k_cache: Tensor | None,
    pages: Tensor,  # [max_pages]
    length: int,
    qk_start: int,
    sequence: int,
) -> Tensor:  # [h_kv, group, s_q, pages in use]
    page_size, s_q = kv_cache.size(1), q.size(2)
    keys = gather_rows(kv_cache, pages, 0, length, op="page_mass", sequence=sequence)[..., qk_start:]
    if k_cache is not None:
        keys = torch.cat([keys, gather_rows(k_cache, pages, 0, length, op="page_mass", sequence=sequence)], dim=-1)
    scores = torch.einsum("hgsd,thd->hgst", q, keys.double())
    last = torch.arange(s_q, device=q.device) + length - s_q
    scores = scores.masked_fill(torch.arange(length, device=q.device) > last[:, None], -math.inf)
    blank = -length % page_size
    padded = torch.nn.functional.pad(scores, (0, blank), value=-math.inf)
    pages_of: Tensor = padded.unflatten(-1, (-1, page_size))
    return pages_of.logsumexp(dim=-1)


def choose_pages(
    mass: Tensor,  # [b, h_q, s_q, max_pages]
    slack: Tensor,  # [b, h_q, s_q, max_pages]
    block_table: Tensor,  # [b, max_pages] int32
    cache_seqlens: Tensor,  # [b] int32
    rule: str,
    limit: float,
    page_size: int,
    h_kv: int,
    page_step: int,
    head_step: int,
    sink_pages: int = 1,
    local_pages: int = 2,
    min_context: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # pages [b * h_kv, max_pages], lengths [b * h_kv], residue [b, h_q, s_q]
    """The pages that the query heads of each KV head attend to, in order, and the most that the others may weigh.

    The residue is the logarithm of the sum of ``exp(mass + slack)`` over the pages that are skipped.
    """
    b, h_q, s_q, max_pages = mass.shape
    always = Always(page_size, sink_pages, local_pages, min_context)
    chosen = torch.zeros(b * h_kv, max_pages, dtype=torch.int32, device=mass.device)
    lengths = torch.zeros(b * h_kv, dtype=torch.int32, device=mass.device)
    residue = mass.new_full((b, h_q, s_q), -math.inf, dtype=torch.float64)
    groups_mass, groups_slack = (x.double().unflatten(1, (h_kv, -1)) for x in (mass, slack))
    groups_residue = residue.unflatten(1, (h_kv, -1))
    for i, length in enumerate(cache_seqlens.tolist()):
        pages, candidates = -(-length // page_size), always.candidates(length, s_q)
        for head in range(h_kv):
            own, room = (x[i, head].flatten(0, 1)[:, :pages] for x in (groups_mass, groups_slack))
            skipped = torch.zeros(pages, dtype=torch.bool, device=mass.device)
            for page in _skipped(own, room, candidates, rule, limit):
                skipped[page] = True
            kept = block_table[i, :pages][~skipped]
            row = i * h_kv + head
            chosen[row, : len(kept)] = kept * page_step + head * head_step
            lengths[row] = length - int(skipped.sum()) * page_size
            upper = _upper(own, room)[:, skipped].logsumexp(dim=-1)
            # Room for the rounding to float32.
            upper = upper + 2**-20 * (1 + upper.abs().where(upper.abs() < math.inf, 0.0))
            groups_residue[i, head] = upper.unflatten(0, (-1, s_q))
    return chosen, lengths, residue


def _skipped(mass: Tensor, slack: Tensor, candidates: range, rule: str, limit: float) -> list[int]:
    """The candidates that are skipped; mass and slack ``[rows, pages]``. What is not a number is never skipped.

    Nothing is where a mass is infinite.
    """
    pages = list(candidates)
    if rule == "mask":
        return [page for page in pages if bool((mass[:, page] == -math.inf).all())]
    if not pages or bool((mass == math.inf).any()):
        return []
    share = (mass - mass.logsumexp(dim=-1, keepdim=True)).exp()
    if rule == "share":
        return [page for page in pages if bool((share[:, page] < limit).all())]
    if rule == "fraction":
        numbers = [page for page in pages if bool(share[:, page].isfinite().all())]
        ranked = sorted(numbers, key=lambda page: float(share[:, page].amax()))
        return ranked[: len(pages) - math.ceil(len(pages) * limit)]
    return _certified(mass, slack, pages, limit)


def _certified(mass: Tensor, slack: Tensor, pages: list[int], eps: float) -> list[int]:
    """The longest run of candidates, the lightest first, of which it is proven that no query loses more than eps.

    A query loses ``lost / (kept + lost)`` where ``lost`` is at most the sum of ``exp(mass + slack)`` over what is
    skipped, and ``kept`` at least that of ``exp(mass - slack)`` over the rest.
    """
    top = mass.amax(dim=-1, keepdim=True)
    upper, lower = (_upper(mass, slack) - top).exp(), (mass - slack - top).exp()
    total = lower.sum(dim=-1, keepdim=True)
    weight = (upper / total).amax(dim=0)
    ranked = sorted(pages, key=lambda page: float(weight[page].nan_to_num(math.inf)))
    for n in range(len(ranked), 0, -1):
        kept = torch.ones(mass.size(1), dtype=torch.bool, device=mass.device)
        kept[ranked[:n]] = False
        lost = upper[:, ~kept].sum(dim=-1)
        if bool((lost * (1 - eps) <= lower[:, kept].sum(dim=-1) * eps * (1 - 2**-20)).all()):
            return ranked[:n]
    return []


def _upper(mass: Tensor, slack: Tensor) -> Tensor:
    """What a mass is proven not to exceed."""
    return (mass + slack).where(slack != math.inf, math.inf)
