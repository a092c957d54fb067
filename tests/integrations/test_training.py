"""A step of fine-tuning an enabled model: on the operators, and with the gradients that transformers finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from flashmla_ops.integrations.transformers import enable
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import VOCABULARY, tiny_model

MODELS = {
    "deepseek_v3": lambda: tiny_model("deepseek_v3"),
    "deepseek_v2": lambda: tiny_model("deepseek_v2"),
    "llama": lambda: tiny_grouped("llama"),
}


@pytest.fixture(autouse=True)
def with_gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


class Counting(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "flashmla":
            self.calls[func.name().removeprefix("flashmla::")] += 1
        return func(*args, **(kwargs or {}))


def pair(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights in transformers' hands and in ours."""
    eager, ours = MODELS[model_type]().train(), MODELS[model_type]().train()
    enable(ours)
    return eager, ours


def tokens(b: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (b, length), generator=torch.Generator().manual_seed(length))


def step(model: Any, ids: Tensor, **given: Any) -> dict[str, Tensor]:
    """One step of gradient descent; the parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids, **given).loss.backward()
    optimizer.step()
    return dict(model.named_parameters())


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
        torch.testing.assert_close(ours[name], parameter, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("length", [7, 70])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_step_is_that_of_transformers(model_type: str, length: int, use_cache: bool) -> None:
    eager, ours = pair(model_type)
    ids = tokens(2, length)
    with Counting() as counting:
        found = step(ours, ids, use_cache=use_cache)
    layers = ours.config.num_hidden_layers
    assert counting.calls == {"prefill": layers, "prefill_backward": layers}
    compare(found, step(eager, ids))


@pytest.mark.parametrize("model_type", MODELS)
def test_padding_takes_transformers_own_attention(model_type: str) -> None:
    eager, ours = pair(model_type)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with Counting() as counting:
        found = step(ours, ids, attention_mask=mask)
    assert not counting.calls
    compare(found, step(eager, ids, attention_mask=mask))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
def test_checkpointed_layers(model_type: str) -> None:
    eager, ours = pair(model_type)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 20)
    with Counting() as counting:
        found = step(ours, ids, use_cache=False)
    assert counting.calls["prefill"] == 2 * counting.calls["prefill_backward"]
    compare(found, step(eager, ids))


@pytest.mark.parametrize(("model_type", "backend"), [("deepseek_v3", "aot_eager"), ("llama", "flashmla")])
def test_a_compiled_step(model_type: str, backend: str) -> None:
    torch._dynamo.reset()
    eager, ours = pair(model_type)
    ids = tokens(2, 70)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    step(compiled, ids, use_cache=False)
    compare(dict(ours.named_parameters()), step(eager, ids))
