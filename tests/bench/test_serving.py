"""Simulated serving: policies hold what they say, and the pool holds most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import decoding, occupancy, serving
from bench.peers import vllm_blocks

#: A module like vLLM's, with an import that is nowhere, and one of a module beside it.
BLOCK_POOL = """
import no_such_library.at_all
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import Block

class BlockPool:
    def __init__(self, num_gpu_blocks: int, enable_caching: bool, hash_block_size: int, something: int = 0):
        assert not enable_caching
        init_logger(__name__).info("made")
        self.free = [Block(i) for i in range(1, num_gpu_blocks)]

    def get_num_free_blocks(self):
        return len(self.free)

    def get_new_blocks(self, count):
        return [self.free.pop() for _ in range(count)]

    def free_blocks(self, blocks):
        self.free += blocks
"""
BLOCK = """
from vllm.config import Config
from dataclasses import dataclass

@dataclass
class Block:
    block_id: int
    config: Config | None = None
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    core = tmp_path / "vllm" / "v1" / "core"
    core.mkdir(parents=True)
    (core / "block_pool.py").write_text(BLOCK_POOL)
    (core / "kv_cache_utils.py").write_text(BLOCK)
    return tmp_path


def test_every_policy_serves_all(wheel: Path) -> None:
    requests = serving.trace(60, 0.5)
    kind = vllm_blocks.load(wheel)
    policies = {
        "ours": serving.Ours(1 << 13, 16),
        "blocks": serving.Blocks(1 << 13, 16, lambda pages: vllm_blocks.new(pages, kind)),
        "reserved": serving.Reserved(1 << 13),
        "growing": serving.Growing(1 << 13),
    }
    figures = {}
    for name, policy in policies.items():
        outcome = serving.simulate(requests, policy, watch=True)
        assert (outcome.finished, outcome.generated) == (60, sum(each.output for each in requests))
        assert policy.memory()[0] == 0
        figures[name] = outcome.figures()
    assert figures["ours"]["utilisation"] > 0.96
    assert figures["ours"]["context"] > 2 * figures["reserved"]["context"]
    assert figures["ours"]["context"] > figures["blocks"]["context"] > figures["growing"]["context"]
    assert figures["reserved"]["utilisation"] < 0.75


@pytest.mark.parametrize(("prompt", "output"), [(200, 1), (100, 60)])
@pytest.mark.parametrize("policy", [lambda: serving.Ours(128, 16), lambda: serving.Growing(128)])
def test_a_request_larger_than_memory_is_no_endless_wait(prompt: int, output: int, policy: Callable[[], Any]) -> None:
    small = serving.Request(0, list(range(8)), 3)
    with pytest.raises(ValueError, match="fit into memory"):
        serving.simulate([small, serving.Request(1, list(range(prompt)), output)], policy())


def test_mocks_are_gone(wheel: Path) -> None:
    import sys

    before = set(sys.modules)
    vllm_blocks.load(wheel)
    assert not {name for name in set(sys.modules) - before if "vllm" in name or "no_such" in name}


def test_the_table_has_all_policies_and_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "CALLS", 100)
    monkeypatch.setattr(serving, "REQUESTS", 20)
    rows = occupancy.of_suite("pool")
    text = occupancy.table(rows)
    assert text.count("contiguous, reserved") == len(serving.TRACES)
    assert "allocate p99.9" in text
    assert occupancy.of_suite("decode") == []
    simulated, decoded = ([row for row in rows if row["policy"] == name] for name in ("flashmla", occupancy.DECODED))
    assert decoded[0].pop("tokens_per_second") > 0
    assert decoded[0] | {"policy": "flashmla"} == simulated[0]


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_a_real_model_decodes_a_trace(shared: float) -> None:
    """Its tokens are those of each request alone, though some had to give way and begin anew."""
    model = decoding.tiny_model()
    requests = [serving.Request(0, each.prompt, 30 + i) for i, each in enumerate(serving.trace(8, shared))]
    policy = decoding.Decoding(model, 1536, 16)
    outcome = serving.simulate(requests, policy)
    assert (outcome.finished, policy.memory()[0]) == (8, 0)
    assert outcome.preempted > 0
    for request in requests:
        prompt = torch.tensor([decoding.words(request.prompt, model)])
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": request.output, "do_sample": False}
        alone = model.generate(prompt, eos_token_id=None, pad_token_id=0, **options)[0, prompt.shape[1] :].tolist()
        assert policy.generated[request.prompt[-1]][: request.output] == alone
