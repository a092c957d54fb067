"""Enabled models as objects: saved, loaded, copied, sent to a process, and beside others on one configuration."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers import disable, enable, is_enabled, why_not
from flashmla_ops.integrations.transformers.configs import OWN_CONFIG
from flashmla_ops.integrations.transformers.specialise import Specialised, restore, specialise
from tests.integrations.models import tiny_model, tokens
from tests.integrations.test_hook import count_decodes, logits


def through_pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": through_pickle,
    "torch": through_torch,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_enabled_and_apart(way: str) -> None:
    model = tiny_model()
    original, expected = model.config, logits(model)
    enable(model)
    twin = COPIES[way](model)
    assert is_enabled(twin)
    assert why_not(twin) == []
    assert count_decodes(twin) == 2
    torch.testing.assert_close(logits(twin), expected, atol=1e-4, rtol=1e-4)
    disable(twin)
    assert torch.equal(logits(twin), expected)
    assert is_enabled(model)
    disable(model)
    assert model.config is original
    assert [vars(module).keys() for module in twin.modules()] == [vars(module).keys() for module in model.modules()]


def test_loading_in_a_process_that_imported_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    enable(model)
    torch.save((model, tokens(2, 5), model(tokens(2, 5)).logits), tmp_path / "model.pt")
    script = [
        "import torch",
        f"model, ids, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)",
        "torch.testing.assert_close(model(ids).logits, expected)",
        "from flashmla_ops.integrations.transformers import is_enabled",
        "assert is_enabled(model)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def send_logits(model: nn.Module, results: multiprocessing.SimpleQueue) -> None:
    with torch.no_grad():
        results.put((is_enabled(model), model(tokens(2, 5)).logits.tolist()))


@pytest.mark.slow
def test_sending_to_a_process() -> None:
    model = tiny_model()
    enable(model)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=send_logits, args=(model, results))
    process.start()
    enabled, values = results.get()
    process.join()
    assert enabled
    torch.testing.assert_close(torch.tensor(values), model(tokens(2, 5)).logits)


def test_save_pretrained_while_enabled(tmp_path: Path) -> None:
    model, plain = tiny_model(), tiny_model()
    enable(model)
    model.save_pretrained(tmp_path / "enabled")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "enabled" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "enabled", attn_implementation="eager")
    assert not is_enabled(loaded)
    assert torch.equal(logits(loaded), logits(plain))


def pair_on_one_configuration() -> tuple[PreTrainedModel, PreTrainedModel]:
    first = tiny_model()
    second = type(first)(first.config).eval()
    assert second.config is first.config
    second.load_state_dict(first.state_dict())
    return first, second


def test_models_that_share_a_configuration() -> None:
    first, second = pair_on_one_configuration()
    shared, expected = first.config, logits(first)
    enable(first)
    assert torch.equal(logits(second), expected)
    assert (is_enabled(first), is_enabled(second)) == (True, False)
    assert second.config is shared
    assert shared._attn_implementation == "eager"
    enable(second)
    disable(first)
    assert (is_enabled(first), is_enabled(second)) == (False, True)
    assert (count_decodes(first), count_decodes(second)) == (0, 2)
    disable(second)
    assert torch.equal(logits(second), expected)
    assert first.config is shared
    assert second.config is shared


def test_a_configuration_changed_meanwhile_stays_the_models_own() -> None:
    first, second = pair_on_one_configuration()
    enable(first)
    first.config.pad_token_id = 7
    disable(first)
    assert (first.config.pad_token_id, second.config.pad_token_id) == (7, 0)
    assert first.model.config is first.config
    assert first.config._attn_implementation == "eager"


SWITCHES: dict[str, Callable[[PreTrainedModel], object]] = {
    "enable": enable,
    "enable a part": lambda model: enable(model.model.layers[0]),
    "enable the decoder": lambda model: enable(model.model),
    "disable": disable,
    "disable a part": lambda model: disable(model.model.layers[1]),
    "choose sdpa": lambda model: model.set_attn_implementation("sdpa"),
}


ORDERS = [
    *permutations(SWITCHES, 2),
    ("enable", "disable a part", "enable a part"),
    ("enable", "choose sdpa", "enable a part"),
    ("enable a part", "enable", "disable a part"),
    ("enable the decoder", "disable a part", "enable the decoder"),
]


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_is_enabled_tells_the_truth_after_any_order(order: tuple[str, ...]) -> None:
    model = tiny_model()
    expected = logits(model)
    for name in order:
        with contextlib.suppress(UnsupportedModelError):  # nothing to disable
            SWITCHES[name](model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert is_enabled(model) == (why_not(model) == [])
    if is_enabled(model):
        assert count_decodes(model) >= (1 if "enable a part" in order else 2)
    enable(model)
    assert is_enabled(model)
    assert count_decodes(model) == 2
    disable(model)
    assert not is_enabled(model)
    left = {name for module in model.modules() for name in vars(module)} & {"told_fallbacks", OWN_CONFIG}
    assert not left


def test_class_names_stay() -> None:
    """Wrappers choose modules by the names of their classes, and `repr` shows them."""
    model = tiny_model()
    before = repr(model)
    enable(model)
    assert repr(model) == before


def test_another_class_since() -> None:
    """Sharding a module does this: its class is derived from ours, and has to be undone first."""

    class Mixin(Specialised):
        pass

    thing = nn.Linear(2, 2)
    specialise(thing, Mixin)
    specialise(thing, Mixin)
    specialised = type(thing)
    thing.__class__ = type("Sharded", (specialised,), {})
    assert isinstance(thing, Mixin)
    with pytest.raises(UnsupportedModelError, match="Sharded"):
        restore(thing, Mixin)
    thing.__class__ = specialised
    restore(thing, Mixin)
    restore(thing, Mixin)
    assert type(thing) is nn.Linear


def test_another_expansion_is_refused() -> None:
    model = tiny_model()
    module = model.model.layers[1].self_attn
    module.expand_kv = module.expand_kv
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.expand_kv: expected transformers' own"):
        enable(model)
    del module.expand_kv
    module.__class__ = type("Mine", (type(module),), {"expand_kv": lambda self, latent, rope: (latent, rope)})
    with pytest.raises(UnsupportedModelError, match=r"expand_kv: expected transformers' own"):
        enable(model)
    assert not is_enabled(model)
