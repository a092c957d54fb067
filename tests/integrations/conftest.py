"""Models of the transformers tests; built once, never changed by a test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from flashmla_ops.integrations.transformers import enable
from tests.integrations.models import tiny_model


class Pair(NamedTuple):
    """The same weights with transformers' eager attention and with absorbed attention."""

    eager: PreTrainedModel
    absorbed: PreTrainedModel


VARIANTS = {
    "v2-dense": ("deepseek_v2", False),
    "v2-moe": ("deepseek_v2", True),
    "v3-dense": ("deepseek_v3", False),
    "v3-moe": ("deepseek_v3", True),
}


@pytest.fixture(scope="package", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    model_type, moe = VARIANTS[request.param]
    models = Pair(tiny_model(model_type, moe=moe), tiny_model(model_type, moe=moe))
    enable(models.absorbed)
    return models


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def foreign_attention_in_batches() -> None:
    """From some version on, transformers' manager of continuous batches accepts its own attention functions alone."""
    from transformers.generation.continuous_batching import continuous_api
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    pytest.importorskip("psutil", reason="transformers sizes its paged cache by psutil")
    if not hasattr(continuous_api, "PagedAttentionCache") or "paged|sdpa" not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        pytest.skip("this transformers has no attention functions for paged caches")
