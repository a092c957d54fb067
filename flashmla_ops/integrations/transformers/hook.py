"""Switch a transformers model to absorbed attention and back, without touching a weight."""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers.attention import (
    ABSORBED_ATTENTION,
    PREVIOUS_ATTRIBUTE,
    MLAModule,
    Pages,
    absorbed_attention,
    is_plain_projection,
)
from flashmla_ops.integrations.transformers.masks import absorbed_mask

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
    ``torch.no_grad()``, as ``generate`` does. Calling it again changes nothing.

    Returns the number of attention modules now enabled. Raises `UnsupportedModelError`, leaving the model unchanged, if
    it has no MLA attention or one that is not known to be exact.
    """
    modules = mla_modules(model)
    if not modules:
        raise UnsupportedModelError(f"{type(model).__name__} has no attention with expand_kv: it is no MLA model")
    for name, module in modules:
        _check_supported(name, module)
    changed = [module for _, module in modules if not hasattr(module, PREVIOUS_ATTRIBUTE)]
    for module in changed:
        setattr(module, PREVIOUS_ATTRIBUTE, module.config._attn_implementation)
        module.expand_kv = MethodType(_keep_latents, module)
    for module in changed:
        module.config._attn_implementation = ABSORBED_ATTENTION
    return len(modules)


def disable(model: nn.Module) -> None:
    """Undo `enable`: the model is as it was before. Raises `UnsupportedModelError` if it is not enabled.

    An attention implementation that was chosen after `enable` stays.
    """
    if not is_enabled(model):
        raise UnsupportedModelError(f"{type(model).__name__} is not enabled")
    for _, module in mla_modules(model):
        if module.config._attn_implementation == ABSORBED_ATTENTION:
            module.config._attn_implementation = getattr(module, PREVIOUS_ATTRIBUTE)
        del module.expand_kv
        delattr(module, PREVIOUS_ATTRIBUTE)


def is_enabled(model: nn.Module) -> bool:
    """Whether every MLA attention of ``model`` (a model or a part of one) is enabled."""
    modules = mla_modules(model)
    return bool(modules) and all(hasattr(module, PREVIOUS_ATTRIBUTE) for _, module in modules)


def mla_modules(model: nn.Module) -> list[tuple[str, MLAModule]]:
    """The names and modules of every MLA attention in ``model``."""
    return [(name, module) for name, module in model.named_modules() if hasattr(type(module), "expand_kv")]


def _check_supported(name: str, module: MLAModule) -> None:
    model_type = module.config.model_type
    if model_type in INDEXED_MODEL_TYPES:
        raise UnsupportedModelError(f"{name}: '{model_type}' attends to indexed tokens, which needs sparse attention")
    if model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        raise UnsupportedModelError(f"{name}: model type '{model_type}' is not known to be exact; known: {known}")
    if not is_plain_projection(module.kv_b_proj):
        found = f"{type(module.kv_b_proj).__name__} with weight {type(module.kv_b_proj.weight).__name__}"
        expected = "a plain nn.Linear without bias, hooks or adapters"
        raise UnsupportedModelError(f"{name}.kv_b_proj: expected {expected}, got {found}")
    if getattr(module, "num_key_value_groups", 1) != 1:
        raise UnsupportedModelError(f"{name}: expected as many key as query heads in the expanded attention")


def _keep_latents(self: MLAModule, latent: Tensor, rope: Tensor | Pages) -> tuple[Tensor, Tensor | Pages]:
    """Stands in for ``expand_kv``: hands the cache on as it is, unless another attention was chosen since `enable`."""
    if self.config._attn_implementation == ABSORBED_ATTENTION:
        return latent, rope
    expanded: tuple[Tensor, Tensor] = type(self).expand_kv(self, latent, rope)
    return expanded
