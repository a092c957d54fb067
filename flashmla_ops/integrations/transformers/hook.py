"""Switch a transformers model to our attention and back, without touching a weight."""

from __future__ import annotations

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from flashmla_ops.errors import ArgumentError, UnsupportedModelError
from flashmla_ops.formats import LATENTS, NATIVE
from flashmla_ops.integrations.transformers import configs
from flashmla_ops.integrations.transformers.attention import ABSORBED_ATTENTION, absorbed_attention
from flashmla_ops.integrations.transformers.batching import batch_latents, unbatch_latents
from flashmla_ops.integrations.transformers.families import (
    GROUPED_MODEL_TYPES,
    MLA,
    MLA_MODEL_TYPES,
    AttentionModule,
    attention_modules,
    family_of,
    unserved,
)
from flashmla_ops.integrations.transformers.grouped import GROUPED_ATTENTION, grouped_attention
from flashmla_ops.integrations.transformers.masks import absorbed_mask, grouped_mask
from flashmla_ops.integrations.transformers.ragged import PAGED
from flashmla_ops.integrations.transformers.served import Served
from flashmla_ops.integrations.transformers.specialise import mixin_of, restore, specialise
from flashmla_ops.ops.check import FLOATS
from flashmla_ops.sparsity import DynamicSparsity

#: The types of models that `enable` takes.
SUPPORTED_MODEL_TYPES = MLA_MODEL_TYPES + GROUPED_MODEL_TYPES

AttentionInterface.register(ABSORBED_ATTENTION, absorbed_attention)
AttentionMaskInterface.register(ABSORBED_ATTENTION, absorbed_mask)
AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, grouped_mask)
# Continuous batches have no masks, so that none is registered under these names.
AttentionInterface.register(PAGED + ABSORBED_ATTENTION, absorbed_attention)
AttentionInterface.register(PAGED + GROUPED_ATTENTION, grouped_attention)


def enable(model: nn.Module, *, sparsity: DynamicSparsity | None = None, cache_format: str = NATIVE) -> int:
    """Let ``model`` attend through `torch.ops.flashmla.*`, in place, on its own cache.

    MLA attends through `flashmla::decode_up` where queries are short, absorbed; prefill expands the cache chunk by
    chunk for `flashmla::prefill`. GQA, MHA and MQA run `decode`, `prefill` and `attend_masked` on cached keys and
    values. Weights and ``state_dict`` stay as they are; ``kv_b_proj`` is read at each step, so training or loading
    weights later needs no second call. A training step runs `flashmla::prefill` and its backward where sequences are
    whole and without padding. Padded and compiled prefill of MLA, and any other forward that needs a gradient, runs
    transformers' SDPA: generate under ``torch.no_grad()``, as ``generate`` does. An enabled model has a copy of its
    configuration, so that another model built on the same object stays as it is; it can be copied, pickled and saved.
    Calling it again changes the sparsity, and takes back the choice of another attention.

    With ``sparsity``, decoding (at most 64 tokens a sequence, without padding) attends to chosen pages of a
    `DynamicCache`, a `PagedLatentCache` or a `StaticPagedLatentCache`; prefill and other caches are dense.
    ``sparsity.report()`` says what was skipped.

    With ``cache_format`` the rows of a `PagedLatentCache` or a `StaticPagedLatentCache` that is made for the model
    later are bytes ("int8_g128", "fp8_v32", "int4_g32"; `flashmla_ops.formats`), for MLA whose latents and rotary keys
    have 512 and 64 elements. Other caches keep rows as they are, and a `FallbackWarning` says so.

    Returns the number of attention modules now enabled. Raises, leaving the model unchanged, `UnsupportedModelError` if
    it has no attention that is known to be exact, or one that is not, and `ArgumentError` for a format that there is
    not, that does not fit the model's rows, or that comes with sparsity, which reads elements.
    """
    modules = served_modules(model)
    if not modules:
        raise UnsupportedModelError(nothing_served(model))
    for name, module in modules:
        if reason := unserved(module):
            raise UnsupportedModelError(f"{name}{reason}")
    family = family_of(modules[0][1])
    check_format(modules, cache_format, sparsity)
    configs.separate(model, family.attention)
    told = next((module.told_fallbacks for _, module in modules if isinstance(module, Served)), set())
    for _, module in modules:
        if not isinstance(module, Served):
            specialise(module, family.mixin)
            module.told_fallbacks = told
        if sparsity is not None or mixin_of(module) is family.mixin:  # and not to None that of a `FlashMLALayer`
            module.sparsity, module.cache_format = sparsity, cache_format
    configs.choose(model, {module.config.model_type for _, module in modules}, family.attention)
    if family is MLA:
        batch_latents(model)
    return len(modules)


def disable(model: nn.Module) -> None:
    """Undo `enable`: the model is as it was before. Raises `UnsupportedModelError` if no attention of it is enabled.

    An attention implementation that was chosen after `enable` stays. A configuration that was changed after `enable`
    stays the model's own; otherwise the model has the object again that it had before.
    """
    modules = [module for _, module in served_modules(model) if isinstance(module, Served)]
    if not modules or not configs.is_separate(model):
        raise UnsupportedModelError(f"{type(model).__name__} is not enabled")
    family = family_of(modules[0])
    for module in modules:
        if mixin_of(module) in (family.mixin, None):  # and not those of a `FlashMLALayer`, which stays one
            restore(module, family.mixin)
            del module.told_fallbacks, module.sparsity, module.cache_format
    unbatch_latents(model)
    configs.reunite(model, family.attention)


def is_enabled(model: nn.Module) -> bool:
    """Whether every attention of ``model`` (a model or a part of one) is served, and no other attention chosen."""
    return configs.is_separate(model) and all_served(model)


def all_served(model: nn.Module) -> bool:
    """Whether every attention of ``model`` is enabled or a `FlashMLALayer`, and no other attention chosen."""
    modules = served_modules(model)
    return bool(modules) and not any(_not_enabled(module) for _, module in modules)


def why_not(model: nn.Module) -> list[str]:
    """Why attention modules of ``model`` run without our operators: a line for each, empty if all are served.

    These are reasons that hold for every call: a module that is not enabled, a ``kv_b_proj`` that was adapted, hooked,
    quantised or offloaded, weights of another dtype, dropout. What depends on the call (a gradient, long padded
    prompts of MLA) is in the documentation of `enable`.
    """
    modules = served_modules(model)
    if not modules:
        return [nothing_served(model)]
    reasons = [(name, unserved(each) or _not_enabled(each) or _never_served(each)) for name, each in modules]
    return [f"{name}{reason}" for name, reason in reasons if reason]


def check_format(modules: list[tuple[str, AttentionModule]], cache_format: str, sparsity: object) -> None:
    """Raise `ArgumentError` unless the rows of all modules can be kept in a format."""
    if cache_format == NATIVE:
        return
    if cache_format not in LATENTS:
        raise ArgumentError("enable", "cache_format", f"one of {', '.join((NATIVE, *LATENTS))}", cache_format)
    wanted = LATENTS[cache_format]
    expected = f"a model with latents of {wanted[0]} and {wanted[1]} elements, which {cache_format} rows hold"
    for name, module in modules:
        found = "keys and values of each head"
        if family_of(module) is MLA:
            sizes = (module.kv_lora_rank, module.qk_rope_head_dim)
            found = "" if sizes == wanted else f"{sizes[0]} and {sizes[1]}"
        if found:
            raise ArgumentError("enable", "cache_format", expected, f"{found} in {name}")
    if sparsity is not None:
        raise ArgumentError("enable", "cache_format", f"{NATIVE!r} with sparsity", cache_format)


def served_modules(model: nn.Module) -> list[tuple[str, AttentionModule]]:
    """The attention modules that `enable` is about: those of MLA alone where a model has any."""
    modules = attention_modules(model)
    latent = [(name, module) for name, module in modules if family_of(module) is MLA]
    return latent or modules


def nothing_served(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = "has no attention that caches latents (MLA), or keys and values as the known types do"
    return f"{type(model).__name__}{f' (model type {model_type!r})' if model_type else ''} {known}"


def _not_enabled(module: AttentionModule) -> str:
    if not isinstance(module, Served):
        return ": is not enabled: call enable(model)"
    chosen = module.config._attn_implementation
    return "" if chosen == family_of(module).attention else f": attention '{chosen}' was chosen after enable(model)"


def _never_served(module: AttentionModule) -> str:
    name, weights = ("kv_b_proj", module.kv_b_proj) if family_of(module) is MLA else ("o_proj", module.o_proj)
    dtype = weights.weight.dtype
    if dtype not in FLOATS:
        return f".{name}: no operator takes {dtype}"
    if module.training and module.attention_dropout > 0.0:
        return f": is in training mode with attention_dropout {module.attention_dropout}"
    return ""
