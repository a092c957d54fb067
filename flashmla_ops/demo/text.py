"""The trained model: the same greedy text from transformers' attention and from FlashMLA, eager and compiled."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from flashmla_ops.demo.timing import single_threaded
from flashmla_ops.integrations.transformers import PagedLatentCache, StaticPagedLatentCache, compile, enable
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT

MODEL = Path(__file__).parent.parent / "fixtures" / "tiny_mla_lm"
PROMPTS = ("A computer is", "Unix", "The Free On-line Dictionary of Computing is", "An operating system that")
NEW_TOKENS = 48
PAGE_SIZE = 16
TIMED_ROUNDS = 3

TRANSFORMERS, EAGER, COMPILED = "transformers SDPA", "FlashMLA eager", "FlashMLA compiled"
#: transformers' attention too, with its decode steps through stock Inductor.
INDUCTOR = "transformers SDPA compiled"


@dataclass(frozen=True)
class Generation:
    """The tokens that one way of running the model gave, and what they cost."""

    tokens: Tensor  # [prompts, NEW_TOKENS]
    seconds: float
    cache_bytes: int


@dataclass(frozen=True)
class TextResult:
    """All generations by name, and the texts of the first."""

    generations: dict[str, Generation]
    texts: list[str]

    @property
    def identical(self) -> int:
        """Tokens of FlashMLA's generations that equal transformers' own."""
        reference = self.generations[TRANSFORMERS].tokens
        return sum(int((generation.tokens == reference).sum()) for generation in self._ours())

    @property
    def total(self) -> int:
        """Tokens of FlashMLA's generations."""
        return sum(generation.tokens.numel() for generation in self._ours())

    def _ours(self) -> list[Generation]:
        return [self.generations[name] for name in (EAGER, COMPILED)]


@single_threaded()
def run(advance: Callable[[str], None]) -> TextResult:
    """Generate with each way in turn; ``advance`` is told before each stage what comes."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    inputs = left_padded([tokenizer.encode(prompt).ids for prompt in PROMPTS])
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()
    ours = copy.deepcopy(theirs)
    enable(ours)
    capacity = inputs["input_ids"].shape[1] + NEW_TOKENS
    compiled = compile(copy.deepcopy(ours), fullgraph=True)
    ways: dict[str, Callable[[], Generation]] = {
        TRANSFORMERS: lambda: generate(theirs, inputs, DynamicCache(config=theirs.config), NEW_TOKENS),
        EAGER: lambda: generate(ours, inputs, PagedLatentCache(ours, page_size=PAGE_SIZE), NEW_TOKENS),
        COMPILED: lambda: generate(compiled, inputs, compiled_cache, NEW_TOKENS),
    }
    compiled_cache = StaticPagedLatentCache(compiled, capacity, page_size=PAGE_SIZE)
    generations: dict[str, Generation] = {}
    for name, way in ways.items():
        advance(f"trained model: {name}")
        way()  # warms up, or compiles
        generations[name] = min((way() for _ in range(TIMED_ROUNDS)), key=lambda generation: generation.seconds)
    texts = [tokenizer.decode(row.tolist()) for row in generations[TRANSFORMERS].tokens]
    return TextResult(generations, texts)


def generate(model: Any, inputs: dict[str, Tensor], cache: Any, new_tokens: int) -> Generation:
    """Greedy continuation of all prompts as one batch, from an empty cache, over any end of the text."""
    cache.reset()
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    seconds = time.perf_counter() - start
    return Generation(out[:, inputs["input_ids"].shape[1] :], seconds, cache_bytes(cache))


def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, ``[prompts, longest]``, padded on the left."""
    longest = max(len(ids) for ids in prompts)
    return {
        "input_ids": torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def cache_bytes(cache: Any) -> int:
    """Bytes that hold the rows of all layers."""
    if isinstance(cache, (PagedLatentCache, StaticPagedLatentCache)):
        return cache.n_bytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
