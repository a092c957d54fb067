"""The attention modules that we know how to serve, and why not the others.

Two families: MLA, whose modules have ``expand_kv``, and MHA, GQA and MQA, whose modules cache keys and values as they
are. A module is known by the type of its model and by code that is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashmla_ops.integrations.transformers.attention import ABSORBED_ATTENTION, AbsorbedMLA
from flashmla_ops.integrations.transformers.grouped import GROUPED_ATTENTION, GroupedRows
from flashmla_ops.integrations.transformers.projection import PLAIN, obstacle
from flashmla_ops.integrations.transformers.served import Served

#: Model types whose ``expand_kv`` is exactly ``[W_UK c, k_pe], W_UV c`` and whose cache holds c and k_pe.
MLA_MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "axk1",
    "glm4_moe_lite",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
)

#: Model types whose attention is softmax(scale * q k^T + mask) v over cached keys and values, with at most a softcap
#: and a sink that they hand to the attention function. A window is in the mask.
GROUPED_MODEL_TYPES = (
    "apertus",
    "arcee",
    "bitnet",
    "cohere",
    "ernie4_5",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granitemoe",
    "helium",
    "jais2",
    "llama",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)

#: Model types that have ``expand_kv`` but attend to tokens chosen by an indexer, which absorbed attention would ignore.
INDEXED_MODEL_TYPES = ("axk2", "deepseek_v32", "glm5_next", "glm_moe_dsa", "hy_v4")

#: An attention module of transformers, which has no common class for them.
AttentionModule = Any


@dataclass(frozen=True)
class Family:
    """Attention modules that are served in one way."""

    attention: str  # the name of the attention function in transformers' registries
    mixin: type[Served]  # what `enable` adds to a module
    model_types: tuple[str, ...]
    #: Why a module of a known type is refused; empty if it is not.
    obstacle: Callable[[AttentionModule], str] = lambda module: ""


def family_of(module: AttentionModule) -> Family:
    return MLA if hasattr(type(module), "expand_kv") else GROUPED


def attention_modules(model: nn.Module) -> list[tuple[str, AttentionModule]]:
    """The names and modules of every attention in ``model`` that one of the families may serve."""
    return [(name, module) for name, module in model.named_modules() if _is_attention(module)]


def unserved(module: AttentionModule) -> str:
    """Why a module is refused, as its name is to be continued; empty if it is not."""
    family, model_type = family_of(module), module.config.model_type
    if reason := family.obstacle(module):
        return reason
    if model_type not in family.model_types:
        return f": model type '{model_type}' is not known to be exact; known: {', '.join(family.model_types)}"
    if not _is_transformers_own(module):
        return f": expected an attention of transformers, got a {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in vars(module):
        return ".forward: expected transformers' own method, got another, as offloading to another device makes"
    return ""


def _is_attention(module: nn.Module) -> bool:
    if hasattr(type(module), "expand_kv"):
        return True
    return hasattr(module, "config") and hasattr(module, "layer_idx") and hasattr(module, "o_proj")


def _is_transformers_own(module: AttentionModule) -> bool:
    """Whether no class that is not transformers' or ours is between a module and ``nn.Module``."""
    known = ("transformers.models.", "flashmla_ops.", "torch.nn.", "builtins")
    return all(kind.__module__.startswith(known) for kind in type(module).__mro__)


def _mla_obstacle(module: AttentionModule) -> str:
    model_type = module.config.model_type
    if model_type in INDEXED_MODEL_TYPES:
        return f": '{model_type}' attends to indexed tokens, which needs sparse attention"
    if model_type not in MLA_MODEL_TYPES:
        return ""
    if not _has_known_expansion(module):
        return ".expand_kv: expected transformers' own method, got another"
    if reason := obstacle(module.kv_b_proj):
        return f".kv_b_proj: expected {PLAIN}: {reason}"
    if getattr(module, "num_key_value_groups", 1) != 1:
        return ": expected as many key as query heads in the expanded attention"
    return ""


def _has_known_expansion(module: AttentionModule) -> bool:
    """Whether ``expand_kv`` is the one of a model of transformers, and not of a class derived from it."""
    expansions = [vars(kind)["expand_kv"] for kind in type(module).__mro__ if "expand_kv" in vars(kind)]
    own = next(each for each in expansions if each is not AbsorbedMLA.expand_kv)
    return "expand_kv" not in vars(module) and own.__module__.startswith("transformers.models.")


MLA = Family(ABSORBED_ATTENTION, AbsorbedMLA, MLA_MODEL_TYPES, _mla_obstacle)
GROUPED = Family(GROUPED_ATTENTION, GroupedRows, GROUPED_MODEL_TYPES)
