"""The differences between the versions of transformers that are supported.

A version is known by what it has, never by its number; one that was not tested is said once.
"""

from __future__ import annotations

import inspect

import transformers
from transformers import GenerationMixin

from flashmla_ops.versions import warn_if_untested

#: The name of the argument of models and ``generate`` that takes a cache: "cache" from 5.24 on.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


warn_if_untested("transformers", transformers.__version__)
