"""Served traces with a real model: the tiny one decodes what `bench.serving` simulates, over the rows of a `KVPool`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

import flashmla_ops
from bench import serving
from bench.serving import MAX_LENGTH, Ours, Request
from flashmla_ops.errors import OutOfPagesError
from flashmla_ops.integrations.transformers import enable
from flashmla_ops.integrations.transformers.paged_cache import append_rows
from flashmla_ops.integrations.transformers.rows import Pages
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.kv_cache import KVPool, Step

TINY = Path(flashmla_ops.__file__).parent / "fixtures" / "tiny_mla_lm"


def tiny_model() -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    enable(model)
    return model


def figures(requests: Sequence[Request], tokens: int, page_size: int) -> dict[str, float]:
    """Those of `serving.Outcome`, and generated tokens per second, prompts included in the time."""
    policy = Decoding(tiny_model(), tokens, page_size)
    start = time.perf_counter()
    outcome = serving.simulate(requests, policy, watch=True)
    seconds = time.perf_counter() - start
    if outcome.finished != len(requests) or policy.memory()[0]:
        raise RuntimeError(f"{outcome.finished} of {len(requests)} requests were served, and {policy.memory()} is left")
    return outcome.figures() | {"tokens_per_second": outcome.generated / seconds}


def words(tokens: Sequence[int], model: Any) -> list[int]:
    """The numbers of a trace, which say who shares what with whom, as words of the model."""
    return [token % model.config.vocab_size for token in tokens]


class Decoding(Ours):
    """A `KVPool` with rows, and a model that writes and reads them: greedy, every request by itself."""

    def __init__(self, model: Any, tokens: int, page_size: int) -> None:
        config = model.config
        row = config.kv_lora_rank + config.qk_rope_head_dim
        self.model = model
        self.pool = KVPool(
            layers=config.num_hidden_layers,
            d=row,
            dtype=torch.float32,
            n_pages=tokens // page_size,
            page_size=page_size,
            max_length=MAX_LENGTH,
        )
        self.generated: dict[int, list[int]] = {}  # by the first token of the prompt's own part: see `serving.trace`

    def admit(self, request: Request) -> bool:
        sequence = self.pool.open(request.prompt)
        n = sequence.pending
        try:
            with self.pool.step([sequence], n) as step:
                prompt = torch.tensor([words(request.prompt[-n:], self.model)])
                token = self._forward(prompt, step)
        except OutOfPagesError:
            self.pool.release(sequence)
            return False
        request.held = sequence
        self.generated[request.prompt[-1]] = [int(token)]
        return True

    def grow(self, running: Sequence[Request]) -> bool:
        if not running:
            return True
        generated = [self.generated[request.prompt[-1]] for request in running]
        try:
            with self.pool.step([request.held for request in running]) as step:
                tokens = self._forward(torch.tensor([each[-1:] for each in generated]), step)
        except OutOfPagesError:
            return False
        for each, token in zip(generated, tokens.tolist(), strict=True):
            each.append(token)
        return True

    @torch.no_grad()
    def _forward(self, tokens: Tensor, step: Step) -> Tensor:
        """The next token of each sequence, of which ``tokens [b, n]`` are the newest."""
        n = tokens.shape[1]
        positions = step.cache_seqlens[:, None] - n + torch.arange(n)
        # The prefix form of `flashmla_ops.integrations.transformers.masks`: how many tokens each query sees.
        mask = (positions + 1).to(torch.int32)[:, None, :, None]
        cache = Cache(layers=[_Layer(slabs[0], step, n) for slabs in self.pool.storage.slabs])
        inputs = {"position_ids": positions, "attention_mask": mask, CACHE_ARGUMENT: cache, "logits_to_keep": 1}
        following: Tensor = self.model(tokens, **inputs).logits[:, -1].argmax(-1)
        return following


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """The rows of one layer in one step of a pool, as our attention reads them."""

    is_sliding = False

    def __init__(self, slab: Tensor, step: Step, new: int) -> None:
        super().__init__()
        self.slab, self.step, self.new = slab, step, new
        self.length = int(step.cache_seqlens.max())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to make."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Pages]:
        append_rows(self.slab, (key_states, value_states), self.step.slot_mapping)
        return self.slab, Pages(self.step.block_table, self.step.cache_seqlens, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length - self.new

    def get_max_length(self) -> int:
        return -1
