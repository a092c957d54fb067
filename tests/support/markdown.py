"""Reading tables."""

from __future__ import annotations

import re


def squeezed(text: str) -> str:
    """A table without the spaces that align its columns."""
    return re.sub(" +", " ", text)
