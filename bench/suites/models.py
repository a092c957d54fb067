"""Suite ``models``: a decode step of models of transformers as their users run them, eager and compiled, taking turns.

The geometries are those of models that people know, with random weights: DeepSeek-V2-Lite (MLA) and Llama-3-70B (GQA)
in two layers, SmolLM2-135M whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import steps
from bench.peers import no_compiler, transformers_mla
from bench.runner import Problem
from bench.steps import StepCase, StepInputs
from bench.suite import Bound, Peer, Suite

NAME = "models"
V2_LITE, LLAMA, SMOLLM2 = "DeepSeek-V2-Lite", "Llama-3-70B", "SmolLM2-135M"
#: What configurations of Llama have, but for a vocabulary that two layers do not drown in.
SIZES: dict[str, dict[str, Any]] = {
    LLAMA: {
        "vocab_size": 4096,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    SMOLLM2: {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def cases(quick: bool) -> list[StepCase]:
    """Ours is the compiled step; the others are peers."""
    compiled = partial(StepCase, mode="compiled")
    if quick:
        return [compiled(1024, "bf16", group=SMOLLM2)]
    return [
        *(compiled(s_kv, dtype, group=V2_LITE) for dtype in ("bf16", "fp32") for s_kv in (4096, 16384)),
        compiled(2048, "bf16", group=LLAMA),
        *(compiled(2048, dtype, group=SMOLLM2) for dtype in ("bf16", "fp32")),
    ]


@functools.lru_cache(maxsize=1)
def model_of(name: str, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # transformers takes seconds to import

    if name == V2_LITE:
        return steps.model_in(dtype)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[name], attn_implementation="sdpa", dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no weights
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    return steps.sharpened(model)


def problem(case: StepCase, peers: Sequence[Peer[StepInputs]], cold_bytes: int) -> Problem:
    return steps.problem(NAME, case, peers, cold_bytes, model=partial(model_of, case.group))


def eager(inputs: StepInputs) -> StepInputs:
    return replace(inputs, case=replace(inputs.case, mode="eager"))


def bind_sdpa_eager(inputs: StepInputs) -> Bound:
    return transformers_mla.bind_sdpa(eager(inputs))


def bind_flashmla_eager(inputs: StepInputs) -> Bound:
    return steps.bind_flashmla(eager(inputs))


def uncompilable(inputs: StepInputs) -> str | None:
    return no_compiler()


PEERS = (
    Peer("transformers SDPA eager", "the model as it is", bind_sdpa_eager),
    Peer("transformers SDPA compiled", "with stock Inductor", transformers_mla.bind_sdpa, unfair=uncompilable),
    Peer("flashmla eager", "ours without a compiler", bind_flashmla_eager),
)
SUITE = Suite(NAME, "a decode step of models of transformers", cases, problem, PEERS)
