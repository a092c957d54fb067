"""One decode step at DeepSeek-V2-Lite's geometry: transformers' SDPA against FlashMLA, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache

from flashmla_ops.demo.text import COMPILED, EAGER, TRANSFORMERS
from flashmla_ops.demo.timing import median_times
from flashmla_ops.integrations.transformers import PagedLatentCache, StaticPagedLatentCache, enable
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT

CONTEXTS = (1024, 4096)
ROUNDS = {torch.float32: 7, torch.bfloat16: 3}
PAGE_SIZE = 64
LAYERS = 2
#: Largest difference of the logits between two ways, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of a decode step by name, for one dtype and context."""

    dtype: torch.dtype
    context: int
    seconds: dict[str, float]
    weight_bytes: int  # what a step has to read at least: all weights but the embedding table
    difference: float  # of the logits, relative to the largest


@dataclass(frozen=True)
class StepResult:
    """Everything measured at this geometry."""

    steps: list[StepTimes]
    attention: dict[str, float]  # the attention module alone, fp32, at the longest context

    def speedup(self) -> float:
        """transformers SDPA over FlashMLA compiled, fp32, at the longest context."""
        (step,) = (s for s in self.steps if s.dtype == torch.float32 and s.context == CONTEXTS[-1])
        return step.seconds[TRANSFORMERS] / step.seconds[COMPILED]

    def wrong(self) -> list[str]:
        """The results that differ by more than rounding explains, a line each."""
        return [
            f"logits at {step.context} in {step.dtype} differ by {step.difference:.1e}"
            for step in self.steps
            if not step.difference <= TOLERANCE[step.dtype]
        ]


class Ways:
    """The three ways to run a step over the same weights, each with a cache of its own that holds the same rows."""

    def __init__(self, model: Any, advance: Callable[[str], None]) -> None:
        self.config, self.dtype = model.config, model.dtype
        self.theirs = model
        self.ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        enable(self.ours)
        self.compiled = torch.compile(self.ours.forward, backend="flashmla", fullgraph=True)
        self.static = StaticPagedLatentCache(self.ours, CONTEXTS[-1] + PAGE_SIZE, page_size=PAGE_SIZE)
        self.advance = advance

    def fill(self, context: int) -> dict[str, Any]:
        """Caches by name, filled with the same random latents; the static cache keeps its place in memory."""
        caches = {
            TRANSFORMERS: DynamicCache(config=self.config),
            EAGER: PagedLatentCache(self.ours, page_size=PAGE_SIZE),
            COMPILED: self.static,
        }
        self.static.reset()
        generator = torch.Generator().manual_seed(context)
        for layer in range(LAYERS):
            latent = torch.randn(1, 1, context, self.config.kv_lora_rank, generator=generator).to(self.dtype)
            rope = torch.randn(1, 1, context, self.config.qk_rope_head_dim, generator=generator).to(self.dtype)
            for cache in caches.values():
                cache.update(latent, rope, layer)
        return caches

    def steps(self, context: int, caches: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
        """A decode step of one token, by name; returns logits."""
        token, position = torch.tensor([[5]]), torch.tensor([[context]])
        forwards = {TRANSFORMERS: self.theirs.forward, EAGER: self.ours.forward, COMPILED: self.compiled}

        def step(name: str) -> Tensor:
            cache = {CACHE_ARGUMENT: caches[name]}
            logits: Tensor = forwards[name](token, position_ids=position, **cache).logits
            return logits

        return {name: (lambda name=name: step(name)) for name in forwards}  # type: ignore[misc]

    def time_steps(self, context: int) -> StepTimes:
        """The step at one context: first compared, then timed."""
        caches = self.fill(context)
        steps = self.steps(context, caches)
        logits = {}
        for name, step in steps.items():
            logits[name] = step().float()
            caches[name].crop(-1)
        expected = logits[TRANSFORMERS]
        # torch's max, unlike Python's, keeps a NaN.
        largest = torch.stack([(each - expected).abs().max() for each in logits.values()]).max()
        difference = float(largest / expected.abs().max())
        self.advance(f"{dtype_name(self.dtype)} decode steps at {context} tokens")
        seconds = median_times(steps, ROUNDS[self.dtype], lambda name: caches[name].crop(-1))
        return StepTimes(self.dtype, context, seconds, weight_bytes(self.theirs), difference)

    def time_attention(self, context: int) -> dict[str, float]:
        """The first layer's attention module alone, eager, with its projections and its cache update."""
        caches = self.fill(context)
        hidden = torch.randn(1, 1, self.config.hidden_size, dtype=self.dtype)
        position_embeddings = self.theirs.model.rotary_emb(hidden, torch.tensor([[context]]))
        modules = {name: m.model.layers[0].self_attn for name, m in ((TRANSFORMERS, self.theirs), (EAGER, self.ours))}
        caches[TRANSFORMERS].layers = caches[TRANSFORMERS].layers[:1]  # one layer runs: cut only what grew

        def attend(name: str) -> Callable[[], object]:
            return lambda: modules[name](
                hidden,
                attention_mask=None,
                position_embeddings=position_embeddings,
                **{CACHE_ARGUMENT: caches[name]},
            )

        calls = {name: attend(name) for name in modules}
        return median_times(calls, ROUNDS[self.dtype], lambda name: caches[name].crop(-1))


def run(advance: Callable[[str], None]) -> StepResult:
    """Time all contexts and dtypes; ``advance`` is told before each stage what comes."""
    steps: list[StepTimes] = []
    attention: dict[str, float] = {}
    advance("building DeepSeek-V2-Lite's geometry")
    model = v2_lite()
    for dtype in ROUNDS:
        advance(f"compiling the decode step in {dtype_name(dtype)}")
        ways = Ways(model.to(dtype), advance)
        steps += [ways.time_steps(context) for context in CONTEXTS]
        if dtype == torch.float32:
            advance(f"attention module alone at {CONTEXTS[-1]} tokens")
            attention = ways.time_attention(CONTEXTS[-1])
        torch._dynamo.reset()
    return StepResult(steps, attention)


def v2_lite() -> Any:
    """DeepSeek-V2-Lite's attention geometry in two dense layers with random weights, SDPA attention, fp32."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=LAYERS,
        n_routed_experts=4,
        max_position_embeddings=32768,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return DeepseekV2ForCausalLM(config).eval()


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that every decode step reads: all but the embedding table, of which it reads one row."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return int(total - model.get_input_embeddings().weight.nbytes)


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
