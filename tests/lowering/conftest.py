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


@pytest.fixture
def tolerated() -> None:
    """Where a test wants a pass to fail."""


@pytest.fixture(autouse=True)
def no_internal_error(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that a model's compilation survives fail a test."""

    def fail(error: Exception) -> str:
        raise error

    if "tolerated" not in request.fixturenames:
        for module in ("attempt", "run"):
            monkeypatch.setattr(f"lowering.passes.{module}.internal_error", fail)
