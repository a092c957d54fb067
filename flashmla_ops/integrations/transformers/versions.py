"""What differs between the versions of transformers that are supported, and a word about those that are not tested.

A version is known by what it has, never by its number, except in that word.
"""

from __future__ import annotations

import inspect
import re
import warnings

import transformers
from transformers import GenerationMixin

#: The newest version that the tests ran with.
TESTED = (5, 24)

#: What models and ``generate`` call the argument that takes a cache: "cache" from 5.24 on.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def warn_if_newer(version: str) -> None:
    """Say once that a version is newer than what was tested; it runs what it can."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers > TESTED:
        tested = ".".join(map(str, TESTED))
        warnings.warn(
            f"transformers {version} is newer than {tested}, the newest that flashmla_ops was tested with", stacklevel=2
        )


warn_if_newer(transformers.__version__)
