"""Graphs that are none of our business come out of Inductor as they would without us: the same kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperModel,
)

from lowering.codegen import order
from lowering.passes import run
from tests.lowering.compiled import Compiled
from tests.lowering.generated import generate
from tests.lowering.programs import PROGRAMS


def check_untouched(function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> None:
    """The modules are the same text, or were until ours put their steps in another order."""
    found = generate(function, *args, dynamic=dynamic, **kwargs)
    assert not found.fired
    assert found.stock
    if found.ours != found.stock:
        with patch.object(order, "grouped", list):
            found = generate(function, *args, dynamic=dynamic, **kwargs)
        assert found.ours == found.stock


def variants() -> Iterator[Any]:
    """Each program with static sizes and float32, and with dynamic sizes and bfloat16."""
    for name in PROGRAMS:
        yield pytest.param(name, False, id=name)
        kept = name.startswith(("reduction", "update"))
        yield pytest.param(name, True, id=f"{name}, dynamic", marks=() if kept else pytest.mark.slow)


@pytest.mark.parametrize(("name", "dynamic"), variants())
def test_a_program_is_generated_as_without_us(name: str, dynamic: bool) -> None:
    function, inputs = PROGRAMS[name]
    check_untouched(function, *inputs(torch.bfloat16 if dynamic else torch.float32), dynamic=dynamic)


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def bert() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    return BertModel(BertConfig(vocab_size=64, **SMALL)), {"input_ids": torch.arange(14).view(2, 7)}


def vit() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    return ViTModel(ViTConfig(image_size=16, patch_size=4, **SMALL)), {"pixel_values": torch.rand(1, 3, 16, 16)}


def t5() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return T5Model(config), {"input_ids": torch.arange(9).view(1, 9), "decoder_input_ids": torch.arange(5).view(1, 5)}


def whisper() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(
        vocab_size=64, d_model=32, num_mel_bins=8, max_source_positions=20, max_target_positions=16,
        suppress_tokens=None, begin_suppress_tokens=None, **layers, **heads, **special,
    )  # fmt: skip
    return WhisperModel(config), {
        "input_features": torch.rand(1, 8, 40),
        "decoder_input_ids": torch.arange(5).view(1, 5),
    }


def wav2vec2() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = Wav2Vec2Config(
        vocab_size=64, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, **SMALL,
    )  # fmt: skip
    return Wav2Vec2Model(config), {"input_values": torch.rand(1, 400)}


MODELS = [bert, vit, t5, whisper, wav2vec2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_model_whose_graph_is_not_rewritten(build: Callable[..., Any], attention: str) -> None:
    """Its attention and products would be: so the passes do not run, and all that follows them does."""
    torch.manual_seed(0)
    model, inputs = build()
    model.eval().set_attn_implementation(attention)
    with patch.object(run, "PASSES", []):
        check_untouched(model, **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_model_is_right_with_everything_on(build: Callable[..., Any], attention: str) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.eval().set_attn_implementation(attention)
    compiled = Compiled(lambda **given: model(**given).last_hidden_state)
    torch.testing.assert_close(compiled(**inputs), model(**inputs).last_hidden_state, atol=1e-4, rtol=1e-4)
