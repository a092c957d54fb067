"""Ranks that are started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashmla_ops.parallel.local import LocalRanks


@pytest.fixture(scope="session")
def two() -> Iterator[LocalRanks]:
    with LocalRanks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four() -> Iterator[LocalRanks]:
    with LocalRanks(4) as ranks:
        yield ranks
