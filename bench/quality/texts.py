"""What the model reads: Python's own documentation, and needles hidden in it."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUESTION = "\n\nQuestion: What is the secret number of the {name}? Answer: The secret number of the {name} is"
NEEDLE = "\nThe secret number of the {name} is {number}.\n"
NAMES = ("library", "garden", "harbour")


def documentation(tokenizer: Any, n_texts: int, length: int) -> Tensor:
    """Tokens ``[n_texts, length]``, from places of the documentation that are as far apart as it allows."""
    topics = pydoc_data.topics.topics
    ids = tokenizer("\n".join(topics[name] for name in sorted(topics)), return_tensors="pt").input_ids[0]
    step = (len(ids) - length) // max(1, n_texts - 1) if n_texts > 1 else 0
    return torch.stack([ids[i * step : i * step + length] for i in range(n_texts)])


@dataclass(frozen=True)
class Haystack:
    """A prompt that ends with a question, and the number that answers it."""

    ids: Tensor  # [1, length]
    answer: str


def haystacks(tokenizer: Any, length: int, depths: Sequence[float], n_needles: int) -> list[Haystack]:
    """A haystack for each depth, 0 to 1, at which the needle that is asked for lies; others lie around it."""
    hay = documentation(tokenizer, 1, length)[0].tolist()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    stacks = []
    for i, depth in enumerate(depths):
        numbers = [str(10000 + (7919 * (i + 1) * (j + 3)) % 89999) for j in range(n_needles)]
        question = encode(QUESTION.format(name=NAMES[0]))
        needles = [encode(NEEDLE.format(name=NAMES[j], number=numbers[j])) for j in range(n_needles)]
        room = length - len(question) - sum(map(len, needles))
        places = [(depth + j / n_needles) % 1.0 for j in range(n_needles)]
        ids, end = [], 0
        for place, needle in sorted(zip(places, needles, strict=True)):
            start, end = end, int(place * room)
            ids += hay[start:end] + needle
        ids += hay[end:room] + question
        stacks.append(Haystack(torch.tensor([ids]), numbers[0]))
    return stacks
