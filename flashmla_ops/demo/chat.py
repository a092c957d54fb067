"""SmolLM2-135M's real weights: the same answers from transformers' attention and from FlashMLA, eager and compiled."""

from __future__ import annotations

import copy
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from flashmla_ops.demo import weights
from flashmla_ops.demo.text import COMPILED, EAGER, INDUCTOR, TRANSFORMERS, Generation, TextResult, generate
from flashmla_ops.integrations.transformers import PagedLatentCache, StaticPagedLatentCache, compile, enable

#: A page of Python's own documentation, which the last question is about.
PAGE = pydoc_data.topics.topics["with"]
QUESTIONS = (
    "What is gravity?",
    "Write a short story about a lighthouse.",
    "How do I learn to play the piano?",
    f"{PAGE}\n\nWhat is this text about?",
)
NEW_TOKENS = 48
PAGE_SIZE = 16


def run(advance: Callable[[str], None]) -> TextResult:
    """Answer each question with each way in turn; ``advance`` is told before each stage what comes."""
    advance("SmolLM2-135M: fetching its weights (93 MB, once)")
    model, tokenizer = weights.smollm2()
    return answer(model, [chat(tokenizer, question) for question in QUESTIONS], tokenizer.decode, advance)


def chat(tokenizer: Any, question: str) -> Tensor:  # [1, n] int64
    message = [{"role": "user", "content": question}]
    ids: Tensor = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return ids


def answer(
    model: Any, prompts: list[Tensor], decode: Callable[[list[int]], str], advance: Callable[[str], None]
) -> TextResult:
    """The greedy continuations of prompts ``[1, n]``, each a batch of its own, by four ways over the same weights."""
    ours = _twin(model)
    enable(ours)
    inductor, compiled = compile(_twin(model), backend="inductor"), compile(_twin(ours), fullgraph=True)
    longest = max(prompt.shape[1] for prompt in prompts) + NEW_TOKENS
    static = StaticCache(config=model.config, max_cache_len=longest)
    pages = StaticPagedLatentCache(compiled, longest, page_size=PAGE_SIZE)
    ways: dict[str, tuple[Any, Callable[[], Any]]] = {
        TRANSFORMERS: (model, lambda: DynamicCache(config=model.config)),
        INDUCTOR: (inductor, lambda: static),
        EAGER: (ours, lambda: PagedLatentCache(ours, page_size=PAGE_SIZE)),
        COMPILED: (compiled, lambda: pages),
    }
    generations: dict[str, Generation] = {}
    for name, (way, cache) in ways.items():
        advance(f"SmolLM2-135M: {name}")
        _answer_all(way, prompts[:1], cache)  # warms up, or compiles
        generations[name] = _answer_all(way, prompts, cache)
    texts = [decode(row.tolist()) for row in generations[TRANSFORMERS].tokens]
    return TextResult(generations, texts)


def _answer_all(model: Any, prompts: list[Tensor], cache: Callable[[], Any]) -> Generation:
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in prompts]
    each = [generate(model, prompt, cache(), NEW_TOKENS) for prompt in inputs]
    tokens = torch.cat([generation.tokens for generation in each])
    most = max(generation.cache_bytes for generation in each)
    return Generation(tokens, sum(generation.seconds for generation in each), most)


def _twin(model: Any) -> Any:
    """Another model over the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
