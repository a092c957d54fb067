"""A model that runs without our operators says so: refusals, `why_not`, one warning, and attention weights."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from flashmla_ops.errors import FallbackWarning, UnsupportedModelError
from flashmla_ops.integrations.transformers import PagedLatentCache, disable, enable, is_enabled, why_not
from flashmla_ops.integrations.transformers.masks import MAX_ABSORBED_QUERIES
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.nn.fast_linear import fast_linear
from flashmla_ops.versions import warn_if_untested
from tests.integrations.models import cached, left_padded, tiny_model, tokens
from tests.integrations.test_generate import generate
from tests.integrations.test_hook import count_decodes, logits


class Linear(nn.Linear):
    """Stands for any projection that computes more than its weight, and is called as torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


class LoRA(nn.Module):
    """A layer as adapters build it: the old one inside, and a product of two small matrices beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 4, bias=False), nn.Linear(4, 160, bias=False)
        self.weight = base.weight
        nn.init.constant_(self.down.weight, 0.1)
        nn.init.constant_(self.up.weight, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.up(self.down(x))
        return out


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class QuantisedWeight(torch.Tensor):
    """A tensor subclass, as quantised weights are."""


def last_attention(model: PreTrainedModel) -> Any:
    return model.model.layers[1].self_attn


def subclass(model: PreTrainedModel) -> None:
    adapted = Linear(32, 160, bias=False)
    adapted.load_state_dict(last_attention(model).kv_b_proj.state_dict())
    last_attention(model).kv_b_proj = adapted


def adapt(model: PreTrainedModel) -> None:
    last_attention(model).kv_b_proj = LoRA(last_attention(model).kv_b_proj)


def add_bias(model: PreTrainedModel) -> None:
    last_attention(model).kv_b_proj.bias = nn.Parameter(torch.linspace(-1, 1, 160))


def add_hook(model: PreTrainedModel) -> None:
    last_attention(model).kv_b_proj.register_forward_hook(lambda module, arguments, out: out * 1.5)


def replace_forward(model: PreTrainedModel) -> None:
    projection = last_attention(model).kv_b_proj
    projection.forward = lambda x: nn.functional.linear(x, projection.weight) * 1.5


def parametrize_weight(model: PreTrainedModel) -> None:
    parametrize.register_parametrization(last_attention(model).kv_b_proj, "weight", Half())


def quantise(model: PreTrainedModel) -> None:
    projection = last_attention(model).kv_b_proj
    data = projection.weight.detach().as_subclass(QuantisedWeight)
    projection.weight = nn.Parameter(data, requires_grad=False)
    assert type(projection.weight) is not nn.Parameter


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "subclass": (subclass, r"a tests\.integrations\.test_fallbacks\.Linear, a subclass of nn\.Linear"),
    "adapter": (adapt, r"a tests\.integrations\.test_fallbacks\.LoRA, and no nn\.Linear"),
    "bias": (add_bias, "has a bias"),
    "hook": (add_hook, "has forward hooks"),
    "forward": (replace_forward, "forward was replaced"),
    "parametrize": (parametrize_weight, "is parametrized"),
    "quantised": (quantise, r"weight is a tests\.integrations\.test_fallbacks\.QuantisedWeight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_projection_that_is_more_than_its_weight_is_refused(change: str) -> None:
    model = tiny_model()
    make, reason = CHANGES[change]
    make(model)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.1\.self_attn\.kv_b_proj: .*plain nn\.Linear.*{reason}"):
        enable(model)
    assert not is_enabled(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("change", CHANGES)
def test_a_projection_changed_after_enable(change: str) -> None:
    """The changed layer goes by the model's own code and says so once; the other one stays absorbed."""
    model, eager = tiny_model(), tiny_model()
    enable(model)
    assert why_not(model) == []
    make, reason = CHANGES[change]
    for each in (model, eager):
        make(each)
    with pytest.warns(FallbackWarning, match=f"layer 1 .*{reason}.*why_not") as caught:
        actual = logits(model)
    assert [warning.category for warning in caught] == [FallbackWarning]
    torch.testing.assert_close(actual, logits(eager), atol=1e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_decodes(model) == 1
    (line,) = why_not(model)
    assert line.startswith("model.layers.1.self_attn.kv_b_proj: ")


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_projection_compiles_into_one_graph(change: str) -> None:
    model, eager = tiny_model(), tiny_model()
    enable(model)
    for each in (model, eager):
        CHANGES[change][0](each)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=change != "quantised", backend="eager")
    ids = tokens(2, 9)
    torch.testing.assert_close(compiled(ids).logits, eager(ids).logits, atol=1e-4, rtol=1e-4)


def test_panels_read_by_others_are_refused() -> None:
    model = tiny_model()
    fast_linear(model, panels=True, keep=())
    with pytest.raises(UnsupportedModelError, match="PanelLinear"):
        enable(model)


def test_other_reasons() -> None:
    model = tiny_model()
    assert [line.split(": ", 1)[1] for line in why_not(model)] == ["is not enabled: call enable(model)"] * 2
    assert "Linear has no attention that caches latents" in why_not(nn.Linear(2, 2))[0]
    enable(model.double())
    assert all("torch.float64" in line for line in why_not(model))
    with pytest.warns(FallbackWarning, match=r"torch\.float64") as caught:
        logits(model)
    assert len(caught) == 1
    for module in (layer.self_attn for layer in model.float().train().model.layers):
        module.attention_dropout = 0.1
    assert all("attention_dropout 0.1" in line for line in why_not(model))
    model.eval().set_attn_implementation("sdpa")
    assert all("'sdpa' was chosen after" in line for line in why_not(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_as_near_as_eager_attention(dtype: torch.dtype) -> None:
    model, eager, exact = (tiny_model().to(dtype) for _ in range(3))
    enable(model)
    ids = tokens(2, 5)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("ignore", FallbackWarning)  # where norms leave the cache in another dtype
        actual, expected = (each(ids).logits.double() for each in (model, eager))
    truth = exact.double()(ids).logits
    assert (actual - truth).square().mean() <= 2 * (expected - truth).square().mean()


@pytest.mark.parametrize("length", [1, 7, MAX_ABSORBED_QUERIES + 1])
@pytest.mark.parametrize("by_config", [False, True])
def test_attention_weights(length: int, by_config: bool) -> None:
    model, eager = tiny_model(), tiny_model()
    for each in (model, eager):
        if by_config:
            each.config.output_attentions = True
    enable(model)
    asked = {} if by_config else {"output_attentions": True}
    past = left_padded([9, 5])
    found = []
    for each in (model, eager):
        cache = each(**past, use_cache=True)[CACHE_ARGUMENT]
        mask = torch.cat([past["attention_mask"], torch.ones(2, length, dtype=torch.long)], dim=1)
        found.append(each(tokens(2, length), attention_mask=mask, **cached(cache), **asked).attentions)
    actual, expected = found
    assert len(actual) == len(expected) == 2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_attention_weights_of_a_paged_cache_and_of_generate() -> None:
    model, eager = tiny_model(), tiny_model()
    enable(model)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 3}
    inputs = {"input_ids": tokens(2, 6)}
    actual: Any = generate(model, inputs, **cached(PagedLatentCache(model, page_size=4)), **options)
    expected: Any = generate(eager, inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.attentions, expected.attentions, atol=1e-5, rtol=1e-4)


def test_nothing_is_told_where_all_is_served() -> None:
    model = tiny_model()
    enable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)
    disable(model)
    assert len(why_not(model)) == 2


def test_a_newer_transformers_warns() -> None:
    for known in ("5.17.0", "5.24.3", "5.24.0.dev0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_if_untested("transformers", known)
    for newer in ("5.25.0", "6.0.0"):
        with pytest.warns(UserWarning, match=rf"transformers {newer} has not been tested .*5\.24"):
            warn_if_untested("transformers", newer)


def test_the_integration_warns_once() -> None:
    code = "import transformers; transformers.__version__ = '9.1.0'; import flashmla_ops.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("transformers 9.1.0 has not been tested") == 1
