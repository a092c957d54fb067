"""Checkpoints as vLLM loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from flashmla_ops.errors import ArgumentError

#: The trained MLA model that comes with the package.
TINY = Path(__file__).parents[2] / "fixtures" / "tiny_mla_lm"


def untied(model: Path, into: Path) -> Path:
    """Copy a checkpoint of one file of weights, with a head of its own in place of one tied to the embedding.

    vLLM's DeepSeek models leave a tied head zero. Raises `ArgumentError` for a folder without ``model.safetensors``.
    """
    weights_file = model / "model.safetensors"
    if not weights_file.is_file():
        raise ArgumentError("vllm", "model", "a folder with model.safetensors", model)
    shutil.copytree(model, into, dirs_exist_ok=True)
    weights = load_file(weights_file)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=1))
    return into
