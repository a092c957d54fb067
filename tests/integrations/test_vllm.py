"""vLLM with our plugin: the tokens of transformers, over Python, HTTP and gRPC; what clients may do wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from bench import vllm
from bench.vllm import checkpoints
from bench.vllm.server import PATIENCE, Server, served
from flashmla_ops.integrations.transformers import PagedLatentCache, disable, enable, is_enabled
from flashmla_ops.integrations.vllm.checkpoint import TINY, untied
from tests.integrations.grouped import tiny_grouped

MISSING = vllm.missing() or ""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

TOKENS = 12
BEGINNING = list(range(3, 60))
#: Decoding beside prompts; then prompts whose beginning is in the cache.
ROUNDS = [[[5, 6, 7, 8, 9, 10, 11], [100, 200, 300], BEGINNING], [[*BEGINNING, 70], [*BEGINNING, 71, 72]]]
#: Several steps for a prompt.
IN_CHUNKS = {"block_size": 16, "max_num_batched_tokens": 16}
INT8 = {"flashmla_row_format": "int8_g128"}
BODY = {"model": "tiny_mla_lm", "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def run(script: str, job: dict[str, Any]) -> Any:
    """What a script of tests/support says about a job, in vLLM's Python."""
    return run_and_log(script, job)[0]


def run_and_log(script: str, job: dict[str, Any]) -> tuple[Any, str]:
    """That, and all that was printed."""
    command = [vllm.python(), vllm.ROOT / "tests/support" / script]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, input=json.dumps(job), env=vllm.environment(1, ours=True), **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def greedy(model: nn.Module, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """What transformers generates, eager."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    out = model.generate(torch.tensor([prompt]), pad_token_id=0, **options)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


def chances(model: nn.Module, prompt: list[int], tokens: list[int]) -> Tensor:
    """Log-probabilities of tokens that follow a prompt, one step for each."""
    cache = PagedLatentCache(model) if is_enabled(model) else DynamicCache()
    steps = [prompt, *([token] for token in tokens[:-1])]
    logits = [model(torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1] for step in steps]
    return torch.stack(logits).log_softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untied(TINY, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(tiny: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A model whose latents are of 512 and 64 elements."""
    folder = tmp_path_factory.mktemp("latents")
    return folder, checkpoints.write(checkpoints.MLA, folder, layers=2, hidden_size=256)


@pytest.mark.parametrize("options", [{}, IN_CHUNKS], ids=["whole", "chunks"])
def test_mla_has_the_tokens_of_transformers(options: dict[str, Any], tiny: Path, model: nn.Module) -> None:
    job = {"model": str(tiny), "options": options, "tokens": TOKENS, "rounds": ROUNDS}
    found = run("vllm_tokens.py", job)
    assert found["tokens"] == [[greedy(model, prompt) for prompt in prompts] for prompts in ROUNDS]
    assert found["cached"][1] == ([48, 48] if options else [0, 0])  # of pages of 16; a page of 64 is not full


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("mistral", {"sliding_window": 9}), ("gemma2", {}), ("qwen3", {})],
    ids=["biases", "window", "softcap", "heads of 24"],
)
def test_grouped_heads_have_the_tokens_of_transformers(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_grouped(name, vocab_size=512, **changes)
    model.save_pretrained(tmp_path)
    job = {"model": str(tmp_path), "options": IN_CHUNKS, "tokens": TOKENS, "rounds": ROUNDS}
    found = run("vllm_tokens.py", job)
    assert found["tokens"] == [[greedy(model, prompt) for prompt in prompts] for prompts in ROUNDS]


@pytest.mark.parametrize(
    ("row_format", "options"),
    [
        ("fp8_v32", {"kv_cache_dtype": "fp8"}),
        ("int8_g128", {"additional_config": {"flashmla_row_format": "int8_g128"}}),
    ],
)
def test_rows_of_bytes_move_numbers_as_they_do_in_transformers(
    row_format: str, options: dict[str, Any], latents: tuple[Path, nn.Module]
) -> None:
    folder, model = latents
    job = {"model": str(folder), "options": options, "tokens": TOKENS, "rounds": [[BEGINNING]]}
    found = run("vllm_tokens.py", job)
    tokens, served = found["tokens"][0][0], torch.tensor(found["logprobs"][0][0])
    native = chances(model, BEGINNING, tokens)
    enable(model, cache_format=row_format)
    rounded = chances(model, BEGINNING, tokens)
    disable(model)
    moved, expected = ((x - native).square().mean().sqrt() for x in (served, rounded))
    assert expected / 3 < moved < expected * 3


def test_alibi_is_left_to_vllm_and_that_is_said(tmp_path: Path) -> None:
    model = tiny_grouped("bloom", vocab_size=512, hidden_size=128)
    model.save_pretrained(tmp_path)
    job = {"model": str(tmp_path), "options": {}, "tokens": TOKENS, "rounds": ROUNDS}
    found, said = run_and_log("vllm_tokens.py", job)
    assert found["tokens"] == [[greedy(model, prompt) for prompt in prompts] for prompts in ROUNDS]
    assert said.count("flashmla leaves layers with ALiBi to vLLM's own CPU_ATTN") == 1


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"], grpc=True) as server:
        yield server


def test_http_answers_two_at_once(server: Server, model: nn.Module) -> None:
    answers: dict[int, Any] = {}

    def ask(at: int) -> None:
        answers[at] = server.post(BODY | {"prompt": ROUNDS[0][at], "max_tokens": TOKENS})

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for at in range(2):
        status, answer = answers[at]
        assert (status, answer["choices"][0]["token_ids"]) == (200, greedy(model, ROUNDS[0][at]))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_grpc_answers(stream: bool, server: Server, model: nn.Module) -> None:
    job = {"address": server.grpc, "prompt": ROUNDS[0][0], "tokens": TOKENS, "stream": stream}
    assert run("vllm_grpc.py", job) == {"tokens": greedy(model, ROUNDS[0][0])}


def test_grpc_refuses_what_is_too_long(server: Server) -> None:
    job = {"address": server.grpc, "prompt": [3] * 4000, "tokens": TOKENS, "stream": False}
    assert run("vllm_grpc.py", job)["code"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (BODY | {"prompt": [3] * 4000}, 400, "BadRequestError"),
        (BODY | {"prompt": [3], "max_tokens": 10**6}, 400, "BadRequestError"),
        (BODY | {"prompt": [10**7]}, 400, "BadRequestError"),
        (BODY | {"prompt": "a", "n": 10**6}, 400, "BadRequestError"),
        (BODY | {"prompt": "a", "model": "other"}, 404, "NotFoundError"),
        (b'{"model": "tiny_mla_lm", "prompt": ', 400, "Bad Request"),
        (b"\xff\xfe", 400, "Bad Request"),
    ],
    ids=["long", "many tokens", "no such token", "many answers", "no such model", "cut JSON", "no text"],
)
def test_http_says_what_is_wrong(body: Any, status: int, kind: str, server: Server) -> None:
    code, answer = server.post(body)
    assert (code, answer["error"]["type"]) == (status, kind)
    assert answer["error"]["message"]


def test_a_client_that_dies_leaks_no_page(server: Server) -> None:
    with server.client(BODY | {"prompt": BEGINNING, "max_tokens": 1900}) as client:
        assert client.stdout is not None
        client.stdout.readline()
        assert server.metric("num_requests_running") == 1
        assert server.metric("kv_cache_usage_perc") > 0
        client.send_signal(signal.SIGKILL)
    assert server.until("num_requests_running", 0) == 0
    assert server.until("kv_cache_usage_perc", 0) == 0
