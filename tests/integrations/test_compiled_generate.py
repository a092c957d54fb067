"""`compile(model)`: generate's steps are one compiled graph, with the tokens of eager generation."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from flashmla_ops.errors import FallbackWarning, UnsupportedModelError
from flashmla_ops.integrations.transformers import (
    StaticPagedLatentCache,
    compile,
    disable,
    enable,
    is_enabled,
    uncompile,
)
from flashmla_ops.integrations.transformers.families import MLA_MODEL_TYPES
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.models import cached, left_padded, tiny_model, tokens
from tests.integrations.test_generate import generate


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | special | changes))).eval()


def enabled_model(**changes: Any) -> PreTrainedModel:
    model = tiny_model(**changes)
    enable(model)
    return model


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "deepseek_v3": tiny_model,
    "deepseek_v3 enabled": enabled_model,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", MODELS)
def test_the_one_line(name: str) -> None:
    """On the flashmla backend, on a CPU: the operators are in the graph of a step."""
    model = MODELS[name](num_hidden_layers=1)
    inputs = {"input_ids": tokens(2, 9)}
    expected = generate(model, inputs)
    compile(model)
    out, (source,) = run_and_get_code(lambda: generate(model, inputs))
    assert torch.equal(out, expected)
    assert re.search(r"torch\.ops\.flashmla\.decode(_up)?\b", source)
    assert (graphs(), dict(counters["graph_break"])) == (1, {})


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_padded_batch_reads_its_mask_at_run_time(name: str) -> None:
    model, inputs = MODELS[name](num_hidden_layers=1), left_padded([9, 4])
    expected = generate(model, inputs)
    compile(model, fullgraph=True)
    out, (source,) = run_and_get_code(lambda: generate(model, inputs))
    assert torch.equal(out, expected)
    assert "torch.ops.flashmla.attend_masked" in source


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_and_the_same_tokens(name: str, lengths: list[int]) -> None:
    model, inputs = MODELS[name](), left_padded(lengths)
    expected = generate(model, inputs)
    compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    assert graphs() == 1
    assert model.generation_config.cache_implementation is None


def test_beams_and_a_configuration() -> None:
    model, inputs = tiny_llama(num_hidden_layers=1), left_padded([9, 4])
    config = GenerationConfig(max_new_tokens=6, do_sample=False, num_beams=2)
    expected = model.generate(**inputs, generation_config=config)
    compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    assert torch.equal(generate(model, inputs, max_new_tokens=6, num_beams=2), expected)
    assert config.cache_implementation is None
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MLA_MODEL_TYPES)
def test_every_supported_type(model_type: str) -> None:
    model = tiny_model(model_type)
    inputs = {"input_ids": tokens(2, 9)}
    expected = generate(model, inputs)
    enable(model)
    compile(model, backend="aot_eager")
    assert torch.equal(generate(model, inputs), expected)
    assert graphs() >= 1


def test_another_length_compiles_once_more_and_no_third_time() -> None:
    model = compile(tiny_llama(num_hidden_layers=1), backend="aot_eager")
    for seed, (prompt, new) in enumerate([(9, 5), (20, 8), (30, 12), (11, 3)]):
        inputs = {"input_ids": tokens(2, prompt, seed)}
        out = generate(model, inputs, max_new_tokens=new)
        assert torch.equal(out, generate(tiny_llama(num_hidden_layers=1), inputs, max_new_tokens=new))
    assert graphs() == 2


def test_a_cache_of_the_callers() -> None:
    model, inputs = enabled_model(num_hidden_layers=1), {"input_ids": tokens(2, 9)}
    expected = generate(model, inputs)
    compile(model, backend="aot_eager")
    for n, cache in enumerate((StaticCache(config=model.config, max_cache_len=64), StaticPagedLatentCache(model, 64))):
        assert torch.equal(generate(model, inputs, **cached(cache)), expected)
        assert graphs() == n + 1


UNCOMPILED: dict[str, tuple[Callable[[PreTrainedModel], dict[str, Any]], str]] = {
    "prompt lookup": (lambda model: {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens checks several"),
    "assistant": (lambda model: {"assistant_model": tiny_llama()}, "assistant_model checks several"),
    "no cache": (lambda model: {"use_cache": False}, "use_cache is False"),
    "a growing cache": (lambda model: {CACHE_ARGUMENT: DynamicCache(config=model.config)}, "a DynamicCache grows"),
    "dynamic": (lambda model: {"cache_implementation": "dynamic"}, "'dynamic' is not static"),
}


@pytest.mark.parametrize("way", UNCOMPILED)
def test_what_cannot_be_compiled_says_why_once(way: str) -> None:
    options, reason = UNCOMPILED[way]
    model, inputs = tiny_llama(), {"input_ids": tokens(1, 12).repeat(1, 2)}
    expected = generate(model, inputs)
    compile(model, backend="aot_eager")
    with pytest.warns(FallbackWarning, match=reason):
        assert torch.equal(generate(model, inputs, **options(model)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        generate(model, inputs, **options(model))
    assert graphs() == 0


def test_a_compiled_model_as_assistant() -> None:
    model, assistant = tiny_llama(), compile(tiny_llama(), backend="aot_eager")
    inputs = {"input_ids": tokens(1, 12)}
    with pytest.warns(FallbackWarning, match="is_assistant"):
        assert torch.equal(generate(model, inputs, assistant_model=assistant), generate(model, inputs))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own_weights(copied: Callable[[nn.Module], PreTrainedModel]) -> None:
    model, inputs = enabled_model(num_hidden_layers=1), {"input_ids": tokens(2, 9)}
    compile(model, backend="aot_eager")
    first = generate(model, inputs)
    twin = copied(model)
    assert is_enabled(twin)
    for parameter in twin.parameters():
        parameter.mul_(-1)
    changed = generate(twin, inputs)
    assert not torch.equal(changed, first)
    uncompile(twin)
    assert torch.equal(generate(twin, inputs), changed)
    assert torch.equal(generate(model, inputs), first)


def test_enable_and_disable_after_compile() -> None:
    model, inputs = tiny_model(num_hidden_layers=1), {"input_ids": tokens(2, 9)}
    expected = generate(model, inputs)
    compile(model, backend="aot_eager")
    for switch in (enable, disable, enable):
        switch(model)
        assert torch.equal(generate(model, inputs), expected)
    assert graphs() >= 2


def test_uncompile_restores() -> None:
    model = tiny_llama()
    before, kind = set(vars(model)), type(model)
    compile(compile(model), backend="aot_eager")
    assert type(model).__name__ == "LlamaForCausalLM"
    uncompile(model)
    assert type(model) is kind
    assert set(vars(model)) == before
    with pytest.raises(UnsupportedModelError, match="not compiled"):
        uncompile(model)


def test_training_and_gradients_are_not_compiled() -> None:
    model = compile(tiny_llama(), backend="aot_eager")
    cache: Any = StaticCache(config=model.config, max_cache_len=16)
    model(tokens(1, 3), **cached(cache))
    with torch.enable_grad():
        logits: Tensor = model(tokens(1, 1), **cached(cache)).logits
        logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    model.train()(tokens(1, 1), **cached(cache))
    assert graphs() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), r"got torch\.nn\.modules\.linear\.Linear"),
        (lambda: torch.compile(tiny_llama()), "OptimizedModule"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
            ),
            "an encoder and a decoder",
        ),
    ],
)
def test_models_that_cannot_be_compiled(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        compile(make())
