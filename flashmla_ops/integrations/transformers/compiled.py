"""``model.generate`` on the flashmla backend of torch.compile, on any device.

transformers compiles decode steps on GPUs only, and ``torch.compile(model).generate`` calls the model inside, which is
not compiled. A model that `compile` was called on has a ``__call__`` that compiles decode steps itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin

from flashmla_ops.errors import FallbackWarning, UnsupportedModelError
from flashmla_ops.integrations.transformers.paged_cache import StaticPagedLatentCache
from flashmla_ops.integrations.transformers.specialise import Specialised, restore, specialise

#: The names that versions of transformers and their models have for the argument that takes a cache.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

#: Arguments of ``generate`` with which it drafts tokens, or is asked for drafts.
DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "is_assistant")


def compile(model: nn.Module, **options: Any) -> Any:
    """Let ``model.generate`` run its decode steps through ``torch.compile(backend="flashmla")``; returns ``model``.

    ``generate`` then uses a static cache, unless the caller chooses one, and each step of one token a sequence is one
    graph for all lengths: it is compiled once for a size of the cache. Prompts run uncompiled. ``model`` is a language
    model of transformers, with `enable` (before or after) or without it. ``options`` are those of ``torch.compile``.
    Where ``generate`` cannot be compiled (drafted tokens, a cache that grows), a `FallbackWarning` says why, once.
    Calling it again changes the options. `uncompile` undoes it. Raises `UnsupportedModelError` for any other model.
    """
    if not isinstance(model, GenerationMixin):
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        raise UnsupportedModelError(f"expected a model of transformers that has generate, got {name}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder and a decoder: expected a decoder alone")
    specialise(model, CompiledSteps)
    model.compile_options = {"backend": "flashmla"} | options
    model.compiled_step = None
    model.told_uncompiled = set()
    return model


def uncompile(model: nn.Module) -> None:
    """Undo `compile`. Raises `UnsupportedModelError` if it was not called."""
    if not isinstance(model, CompiledSteps):
        raise UnsupportedModelError(f"{type(model).__name__} is not compiled")
    restore(model, CompiledSteps)
    for name in ("compile_options", "compiled_step", "told_uncompiled"):
        delattr(model, name)


class CompiledSteps(Specialised):
    """Methods that a compiled model gets beside its own."""

    generation_config: Any
    training: bool
    _supports_attention_backend: bool
    compile_options: dict[str, Any]
    compiled_step: Callable[..., Any] | None
    told_uncompiled: set[str]  # the reasons that were told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled() or not _is_step(args, kwargs):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if isinstance(cache := _cache(kwargs), StaticPagedLatentCache):
            cache.check_room(1)
        if self.compiled_step is None:
            self.compiled_step = torch.compile(super().__call__, **self.compile_options)  # type: ignore[misc]
        return self.compiled_step(*args, **kwargs)

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """transformers' ``generate``, with a static cache where the caller chose none."""

        def chosen(name: str) -> Any:
            configs = (generation_config, self.generation_config)
            values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in values if value is not None), None)

        cache = _cache(kwargs)
        if reason := _why_uncompiled(self, chosen, cache):
            if reason not in self.told_uncompiled:
                self.told_uncompiled.add(reason)
                warnings.warn(f"generate runs uncompiled: {reason}", FallbackWarning, stacklevel=2)
        elif cache is None and chosen("cache_implementation") is None:
            # transformers wants its options in one place: all in a generation_config, or all as arguments.
            if generation_config is None:
                kwargs["cache_implementation"] = "static"
            else:
                generation_config = copy.deepcopy(generation_config)
                generation_config.cache_implementation = "static"
        return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers', without a mask where no token is padding: the graph then holds the causal mask itself."""
        plain = attention_mask is None or (attention_mask.dim() == 2 and bool(attention_mask.all()))
        # Models whose masks are not transformers' common ones (ALiBi) need the tensor.
        needless = plain and self._supports_attention_backend and _is_static(_cache(kwargs))
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, attention_mask=None if needless else attention_mask, **kwargs
        )
        if needless:  # transformers 5.24 makes a causal mask where there was none
            prepared.pop("attention_mask", None)
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code, ours or transformers': it runs this object, not a copy, and cannot be pickled."""
        state: dict[str, Any] = dict(super().__getstate__())  # type: ignore[call-overload]
        state.pop("_compiled_call", None)
        return state | {"compiled_step": None}


def _why_uncompiled(model: Any, chosen: Callable[[str], Any], cache: Any) -> str:
    """Why no step of a call of ``generate`` can be compiled; empty if one can."""
    for name in DRAFTING:
        if chosen(name):
            return f"{name} checks several drafted tokens at once, and takes some back"
    if chosen("use_cache") is False:
        return "use_cache is False"
    if cache is not None and not _is_static(cache):
        return f"a {type(cache).__name__} grows with each step; give a StaticCache, or none"
    implementation = chosen("cache_implementation")
    if cache is None and implementation not in (None, "static"):
        return f"cache_implementation='{implementation}' is not static"
    devices = set(getattr(model, "hf_device_map", {}).values())
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        return "its weights are offloaded"
    return ""


def _cache(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _is_static(cache: Any) -> bool:
    """Whether a cache has its size from the start. A `DynamicCache` without attention says it can be compiled, too."""
    return isinstance(cache, Cache) and cache.is_compileable and type(cache) is not DynamicCache


def _is_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of the model is for one token a sequence, behind others in a static cache."""
    cache, names = _cache(kwargs), ("input_ids", "inputs_embeds")
    ids = args[0] if args else next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    if not isinstance(ids, Tensor) or ids.shape[1] != 1 or not _is_static(cache):
        return False
    return not cache.offloading and all(getattr(layer, "is_initialized", True) for layer in cache.layers)
