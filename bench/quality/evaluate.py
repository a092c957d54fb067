"""A model with and without dynamic sparsity: the same prefill, then decoding token by token."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bench.quality.texts import Haystack
from flashmla_ops.integrations.transformers import enable
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.sparsity import DynamicSparsity

CHUNK = 1024
ANSWER_TOKENS = 7


@dataclass(frozen=True)
class Row:
    """One way to choose at one length. Shares are of what dense attention reads while decoding."""

    model: str
    selector: str
    length: int
    texts: int
    tokens: int  # decoded, of all texts
    perplexity: float
    perplexity_dense: float
    same_token: float  # share of places where the likeliest token is that of dense attention
    rows_skipped: float
    bytes_saved: float
    bytes_to_choose: float
    lost: float  # the largest bound
    needles: int  # asked for
    needles_found: int
    needles_dense: int  # found by dense attention
    needles_kept: int  # of those, found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def prefill(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """Dense, in chunks."""
    cache = DynamicCache(config=model.config)
    for start in range(0, ids.shape[1], CHUNK):
        model.model(ids[:, start : start + CHUNK], **{CACHE_ARGUMENT: cache})
    return cache


def losses(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, start: int) -> tuple[Tensor, Tensor]:
    """Cross entropy and likeliest token ``[b, n]`` of the tokens after ``start``, decoded one at a time."""
    entropies, likeliest = [], []
    for i in range(start, ids.shape[1] - 1):
        logits = model(ids[:, i : i + 1], **{CACHE_ARGUMENT: cache}).logits[:, -1].float()
        entropies.append(torch.nn.functional.cross_entropy(logits, ids[:, i + 1], reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.stack(entropies, dim=1), torch.stack(likeliest, dim=1)


def answers(model: PreTrainedModel, tokenizer: Any, stack: Haystack, cache: DynamicCache) -> bool:
    """Whether the model answers with the number. ``cache`` holds all but the last token of the prompt."""
    following, found = stack.ids[:, -1:], []
    for _ in range(ANSWER_TOKENS):
        following = model(following, **{CACHE_ARGUMENT: cache}).logits[:, -1:].argmax(-1)
        found.append(int(following))
    return stack.answer in tokenizer.decode(found)


def evaluate(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,  # [texts, length]
    decoded: int,
    stacks: Sequence[Haystack],
    selectors: dict[str, DynamicSparsity],
) -> list[Row]:
    """Every selector on the same caches. ``decoded``: how many tokens at the end of each text are decoded."""
    enable(model)
    start = ids.shape[1] - decoded - 1
    cache = prefill(model, ids[:, :start])
    dense, dense_tokens = losses(model, ids, copy.deepcopy(cache), start)
    measured: dict[str, tuple[Tensor, Tensor, Any]] = {}
    for label, sparsity in selectors.items():
        enable(model, sparsity=sparsity)
        entropies, tokens = losses(model, ids, copy.deepcopy(cache), start)
        measured[label] = (entropies, tokens, sparsity.report().together)
    found: dict[str, list[bool]] = {label: [] for label in ("dense", *selectors)}
    for stack in stacks:
        enable(model)
        cache = prefill(model, stack.ids[:, :-1])
        found["dense"].append(answers(model, tokenizer, stack, copy.deepcopy(cache)))
        for label, sparsity in selectors.items():
            enable(model, sparsity=sparsity)
            found[label].append(answers(model, tokenizer, stack, copy.deepcopy(cache)))
    enable(model)
    rows = []
    for label, (entropies, tokens, together) in measured.items():
        kept = [ours for ours, theirs in zip(found[label], found["dense"], strict=True) if theirs]
        rows.append(
            Row(
                model=name,
                selector=label,
                length=ids.shape[1],
                texts=ids.shape[0],
                tokens=entropies.numel(),
                perplexity=math.exp(float(entropies.mean())),
                perplexity_dense=math.exp(float(dense.mean())),
                same_token=float((tokens == dense_tokens).double().mean()),
                rows_skipped=together.rows_skipped,
                bytes_saved=together.bytes_saved,
                bytes_to_choose=together.bytes_to_choose / max(1, together.bytes),
                lost=together.lost,
                needles=len(stacks),
                needles_found=sum(found[label]),
                needles_dense=sum(found["dense"]),
                needles_kept=sum(kept),
            )
        )
    return rows
