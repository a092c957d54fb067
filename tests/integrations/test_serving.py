"""transformers' server with our attention, over HTTP: streams, requests at once, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

import flashmla_ops
from flashmla_ops.__main__ import main
from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers import attention, is_enabled
from tests.integrations.grouped import tiny_grouped

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs the extra 'serve'")
pytest.importorskip("psutil")

MODEL = Path(flashmla_ops.__file__).parent / "fixtures" / "tiny_mla_lm"
PROMPTS = ("A computer is", "Unix", "An operating system that")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, with what a server has to know of its tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(MODEL, folder)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def start(folder: Path, **options: Any) -> tuple[Any, str]:
    from flashmla_ops.integrations.transformers.serving import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"device": "cpu", "dtype": "float32", "host": "127.0.0.1", "port": port, "non_blocking": True}
    return serve(str(folder), **common | options), f"http://127.0.0.1:{port}/v1"


@pytest.fixture(params=["batches", "one by one"])
def address(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    if request.param == "batches":
        request.getfixturevalue("foreign_attention_in_batches")
    sizes = {"cb_block_size": 16, "cb_num_blocks": 64, "cb_max_batch_tokens": 64}
    options = {"continuous_batching": True, **sizes} if request.param == "batches" else {}
    server, address = start(folder, attn_implementation="absorbed_mla", **options)
    models = [timed.model for timed in server._model_manager.loaded_models.values()]
    assert [is_enabled(model) for model in models] == [True]
    yield address
    server.kill_server()


def expected(folder: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def test_streams_at_once(folder: Path, address: str) -> None:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=address, api_key="none", max_retries=10)
    common: dict[str, Any] = {"model": str(folder), "max_tokens": NEW_TOKENS, "temperature": 0}

    async def stream(prompt: str) -> list[str]:
        chunks = await client.completions.create(prompt=prompt, stream=True, **common)
        return [chunk.choices[0].text async for chunk in chunks if chunk.choices]

    async def talk() -> tuple[list[list[str]], str]:
        streams = await asyncio.gather(*map(stream, PROMPTS))
        message = {"role": "user", "content": PROMPTS[0]}
        answer = await client.chat.completions.create(messages=[message], **common)
        return streams, answer.choices[0].message.content

    with mock.patch.object(attention, "attend_ragged", wraps=attention.attend_ragged) as attend:
        streams, answer = asyncio.run(talk())
    texts = expected(folder)
    assert ["".join(chunks) for chunks in streams] == texts
    assert all(len(chunks) > NEW_TOKENS // 2 for chunks in streams)  # and not all at the end
    assert answer == texts[0]
    if attend.call_count:
        assert max(call.args[3].rows.block_table.shape[0] for call in attend.call_args_list) > 1


def test_models_that_are_refused(tmp_path: Path) -> None:
    """They say so when the server starts, and transformers' own manager is in its place again."""
    from transformers.cli.serving import model_manager

    before = model_manager.ModelManager
    tiny_grouped("diffllama").save_pretrained(tmp_path)
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    with pytest.raises(UnsupportedModelError, match="diffllama"):
        start(tmp_path)
    assert model_manager.ModelManager is before


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    assert "/v1/chat/completions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["info", "--continuous-batching"])


def test_another_attention_is_left_alone(folder: Path) -> None:
    from flashmla_ops.integrations.transformers.serving import EnabledModels

    manager = EnabledModels(device="cpu", attn_implementation="eager", force_model=str(folder))
    (timed,) = manager.loaded_models.values()
    assert not is_enabled(timed.model)
    assert timed.model.config._attn_implementation == "eager"
    manager.shutdown()
