"""``help()`` of an operator names each of its arguments, in words that are no schema."""

from __future__ import annotations

import pydoc
import re

import pytest
import torch

import flashmla_ops
from flashmla_ops.ops._library import DEFINED, operator


@pytest.mark.parametrize("name", sorted(DEFINED))
def test_every_argument_is_explained(name: str) -> None:
    overload = operator(name)
    packet = getattr(torch.ops.flashmla, name.partition(".")[0])
    schemas, _, words = packet.__doc__.partition("\n\n")
    assert str(overload._schema) in schemas
    missing = [a.name for a in overload._schema.arguments if not re.search(rf"\b{a.name}\b", words)]
    assert not missing
    assert "ArgumentError" in words
    assert "float32" in words or "int32" in words


def test_help_shows_it() -> None:
    shown = pydoc.plain(pydoc.render_doc(torch.ops.flashmla.decode))
    assert "cache_seqlens    [b] int32" in shown
    assert flashmla_ops.ops.decode.__doc__ in torch.ops.flashmla.decode.__doc__
