"""Switch a transformers model to absorbed attention and back, without touching a weight."""

from __future__ import annotations

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers import configs
from flashmla_ops.integrations.transformers.attention import (
    ABSORBED_ATTENTION,
    AbsorbedMLA,
    MLAModule,
    absorbed_attention,
)
from flashmla_ops.integrations.transformers.masks import absorbed_mask
from flashmla_ops.integrations.transformers.projection import PLAIN, obstacle
from flashmla_ops.integrations.transformers.specialise import restore, specialise
from flashmla_ops.ops.check import FLOATS

#: Model types whose ``expand_kv`` is exactly ``[W_UK c, k_pe], W_UV c`` and whose cache holds c and k_pe.
SUPPORTED_MODEL_TYPES = (
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

#: Model types that have ``expand_kv`` but attend to tokens chosen by an indexer, which absorbed attention would ignore.
INDEXED_MODEL_TYPES = ("axk2", "deepseek_v32", "glm5_next", "glm_moe_dsa", "hy_v4")

AttentionInterface.register(ABSORBED_ATTENTION, absorbed_attention)
AttentionMaskInterface.register(ABSORBED_ATTENTION, absorbed_mask)


def enable(model: nn.Module) -> int:
    """Let ``model`` attend through `torch.ops.flashmla.decode` where queries are short, in place, on its own cache.

    Weights and ``state_dict`` stay as they are; ``kv_b_proj`` is read at each step, so training or loading weights
    later needs no second call. Prefill expands the cache chunk by chunk for `flashmla::prefill`; padded and compiled
    prefill, and any forward that needs a gradient, runs transformers' SDPA on the expanded cache: call the model under
    ``torch.no_grad()``, as ``generate`` does. An enabled model has a copy of its configuration, so that another model
    built on the same object stays as it is; it can be copied, pickled and saved. Calling it again changes nothing,
    except that it takes back the choice of another attention.

    Returns the number of attention modules now enabled. Raises `UnsupportedModelError`, leaving the model unchanged, if
    it has no MLA attention or one that is not known to be exact.
    """
    modules = mla_modules(model)
    if not modules:
        raise UnsupportedModelError(_no_mla(model))
    for name, module in modules:
        if reason := _unsupported(module):
            raise UnsupportedModelError(f"{name}{reason}")
    configs.separate(model, ABSORBED_ATTENTION)
    told = next((module.told_fallbacks for _, module in modules if isinstance(module, AbsorbedMLA)), set())
    for _, module in modules:
        specialise(module, AbsorbedMLA)
        module.told_fallbacks = told
        module.config._attn_implementation = ABSORBED_ATTENTION
    return len(modules)


def disable(model: nn.Module) -> None:
    """Undo `enable`: the model is as it was before. Raises `UnsupportedModelError` if no attention of it is enabled.

    An attention implementation that was chosen after `enable` stays. A configuration that was changed after `enable`
    stays the model's own; otherwise the model has the object again that it had before.
    """
    modules = [module for _, module in mla_modules(model) if isinstance(module, AbsorbedMLA)]
    if not modules:
        raise UnsupportedModelError(f"{type(model).__name__} is not enabled")
    for module in modules:
        restore(module, AbsorbedMLA)
        del module.told_fallbacks
    configs.reunite(model, ABSORBED_ATTENTION)


def is_enabled(model: nn.Module) -> bool:
    """Whether every MLA attention of ``model`` (a model or a part of one) is enabled, and no other attention chosen."""
    modules = mla_modules(model)
    return bool(modules) and not any(_not_enabled(module) for _, module in modules)


def why_not(model: nn.Module) -> list[str]:
    """Why attention modules of ``model`` run without our operators: a line for each, empty if all are served.

    These are reasons that hold for every call: a module that is not enabled, a ``kv_b_proj`` that was adapted, hooked,
    quantised or offloaded, weights of another dtype, dropout. What depends on the call (a gradient, an additive mask)
    is in the documentation of `enable`.
    """
    modules = mla_modules(model)
    if not modules:
        return [_no_mla(model)]
    reasons = [(name, _unsupported(each) or _not_enabled(each) or _never_absorbed(each)) for name, each in modules]
    return [f"{name}{reason}" for name, reason in reasons if reason]


def mla_modules(model: nn.Module) -> list[tuple[str, MLAModule]]:
    """The names and modules of every MLA attention in ``model``."""
    return [(name, module) for name, module in model.named_modules() if hasattr(type(module), "expand_kv")]


def _no_mla(model: nn.Module) -> str:
    return f"{type(model).__name__} has no attention with expand_kv: it is no MLA model"


def _unsupported(module: MLAModule) -> str:
    """Why `enable` refuses a module, as its name is to be continued; empty if it does not."""
    model_type = module.config.model_type
    if model_type in INDEXED_MODEL_TYPES:
        return f": '{model_type}' attends to indexed tokens, which needs sparse attention"
    if model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        return f": model type '{model_type}' is not known to be exact; known: {known}"
    if not _has_known_expansion(module):
        return ".expand_kv: expected transformers' own method, got another"
    if reason := obstacle(module.kv_b_proj):
        return f".kv_b_proj: expected {PLAIN}: {reason}"
    if getattr(module, "num_key_value_groups", 1) != 1:
        return ": expected as many key as query heads in the expanded attention"
    return ""


def _has_known_expansion(module: MLAModule) -> bool:
    """Whether ``expand_kv`` is the one of a model of transformers, and not of a class derived from it."""
    expansions = [vars(kind)["expand_kv"] for kind in type(module).__mro__ if "expand_kv" in vars(kind)]
    own = next(each for each in expansions if each is not AbsorbedMLA.expand_kv)
    return "expand_kv" not in vars(module) and own.__module__.startswith("transformers.models.")


def _not_enabled(module: MLAModule) -> str:
    if not isinstance(module, AbsorbedMLA):
        return ": is not enabled: call enable(model)"
    chosen = module.config._attn_implementation
    return "" if chosen == ABSORBED_ATTENTION else f": attention '{chosen}' was chosen after enable(model)"


def _never_absorbed(module: MLAModule) -> str:
    dtype = module.kv_b_proj.weight.dtype
    if dtype not in FLOATS:
        return f".kv_b_proj: no operator takes {dtype}"
    if module.training and module.attention_dropout > 0.0:
        return f": is in training mode with attention_dropout {module.attention_dropout}"
    return ""
