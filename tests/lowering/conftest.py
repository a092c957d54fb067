"""Fixtures of the lowering tests: a clean compiler around each test, and no gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import ReinplaceCounters, counters


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    ReinplaceCounters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
