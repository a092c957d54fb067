"""The drop-in functions over indices and over caches of bytes, in the signatures of old and new releases."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flashmla_ops as flash_mla
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import QUANTIZED
from tests.support.poison import same_bits
from tests.support.sparse import Rows, SparseCase, build

INT = torch.int32
#: The caches of each release: the format of the first cache, and of the second.
RELEASES = {
    "V3": ("native", None),
    "V3.2": ("fp8_v32", None),
    "V4": ("fp8_model1", "fp8_model1"),
    "V4.1": ("fp8_v41", "fp4_v41"),
}


def arguments(release: str, **changes: Any) -> dict[str, Any]:
    first, second = RELEASES[release]
    d = QUANTIZED[first].elements if first in QUANTIZED else 576
    extra = None if second is None else Rows(topk=70, page_size=2, n_pages=40, row_format=second, lengths=True)
    rows = Rows(topk=130, page_size=64, row_format=first, lengths=True)
    return build(SparseCase(rows, extra, b=2, s_q=2, h_q=64, d=d, sink=True)) | changes


def official(named: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The arguments by the official names."""
    return {
        "q": named["q"],
        "k_cache": named["kv_cache"],
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
        "indices": named["indices"],
        "attn_sink": named["attn_sink"],
        "extra_k_cache": named["extra_kv_cache"],
        "extra_indices_in_kvcache": named["extra_indices"],
        "topk_length": named["topk_length"],
        "extra_topk_length": named["extra_topk_length"],
    } | changes


def call(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return flash_mla.flash_mla_with_kvcache(**kwargs)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("release", RELEASES)
def test_every_release(release: str, told: bool) -> None:
    """The format is that of the bytes of a row, whether or not ``is_fp8_kvcache`` is given."""
    named = arguments(release)
    expected = torch.ops.flashmla.sparse_decode(**named)
    changes = {"is_fp8_kvcache": release != "V3"} if told else {}
    kwargs = official(named, **changes)
    assert all(map(same_bits, call(kwargs), expected))
    meta = kwargs["tile_scheduler_metadata"]
    second = named["extra_kv_cache"] is not None
    sizes = (130, 2 if second else None, 70 if second else None)
    assert meta.config == flash_mla.FlashMLASchedMeta.Config(2, 2, 64, 64, 1, False, release != "V3", *sizes)
    assert meta.tile_scheduler_metadata is None
    assert all(map(same_bits, call(kwargs), expected))  # the filled plan serves the next layer


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_caches_of_either_byte_type(dtype: torch.dtype) -> None:
    named = arguments("V4")
    expected = call(official(named))
    caches = {name: named[name].view(dtype) for name in ("kv_cache", "extra_kv_cache")}
    assert all(map(same_bits, call(official(named | caches)), expected))


def test_batch_invariant() -> None:
    named = arguments("V4.1", batch_invariant=True)
    expected = torch.ops.flashmla.sparse_decode(**named)
    assert all(map(same_bits, call(official(named, enable_batch_invariant=True)), expected))


def test_dense_over_bytes() -> None:
    named = arguments("V3.2")
    cache = torch.randint(0, 120, (4, 64, 1, 656), dtype=torch.uint8)
    table, lengths = torch.tensor([[2, 1], [0, 3]], dtype=INT), torch.tensor([70, 128], dtype=INT)
    sink = named["attn_sink"]
    meta, _ = flash_mla.get_mla_metadata()
    result = flash_mla.flash_mla_with_kvcache(named["q"], cache, table, lengths, 512, meta, causal=True, attn_sink=sink)
    schedule = torch.ops.flashmla.decode_schedule(lengths, 2, 64, 1, torch.get_num_threads())
    options = {"causal": True, "schedule": schedule, "row_format": "fp8_v32", "attn_sink": sink}
    expected = torch.ops.flashmla.decode(named["q"], cache, None, table, lengths, 512, **options)
    assert all(map(same_bits, result, expected))


@pytest.mark.parametrize(
    ("release", "changes", "argument", "expected"),
    [
        ("V4", {"causal": True}, "causal", "False with indices"),
        ("V4", {"is_fp8_kvcache": False}, "is_fp8_kvcache", "True with a cache of uint8"),
        ("V3", {"is_fp8_kvcache": True}, "is_fp8_kvcache", "False with a cache of bfloat16"),
        ("V4", {"k_cache": torch.zeros(2, 4, 1, 585, dtype=torch.uint8)}, "k_cache", "rows of 656 (fp8_v32), 584"),
        ("V4.1", {"k_cache": torch.zeros(2, 4, 1, 288, dtype=torch.uint8)}, "k_cache", "rows of FP4 in extra_k_cache"),
        ("V4", {"extra_k_cache": torch.zeros(2, 4, 584)}, "extra_k_cache", "4 dimensions"),
        ("V4", {"extra_indices_in_kvcache": None}, "extra_indices", "a tensor with extra_kv_cache"),
        ("V4", {"indices": torch.zeros(2, 2, 5)}, "indices", "int32"),
        ("V4", {"indices": torch.tensor(0)}, "indices", "shape [b, s_q, topk]"),
        ("V4", {"topk_length": torch.tensor([1, 131], dtype=INT)}, "topk_length", "lengths in [0, 130]"),
        ("V4", {"indices": None}, "topk_length", "None without indices"),
        ("V3.2", {"extra_k_cache": torch.zeros(2, 4, 1, 584, dtype=torch.uint8)}, "q", "d_qk 512"),
    ],
)
def test_misuse(release: str, changes: dict[str, Any], argument: str, expected: str) -> None:
    kwargs = official(arguments(release), **changes)
    if release == "V3.2":
        kwargs["extra_indices_in_kvcache"] = torch.zeros(2, 2, 5, dtype=INT)
    with pytest.raises(ArgumentError) as caught:
        call(kwargs)
    assert caught.value.argument == argument
    assert caught.value.expected.startswith(expected)
    assert not kwargs["tile_scheduler_metadata"].have_initialized


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"indices": torch.zeros(2, 2, 129, dtype=INT)}, "indices"),
        ({"extra_indices_in_kvcache": torch.zeros(2, 2, 9, dtype=INT)}, "extra_indices_in_kvcache"),
        ({"extra_k_cache": torch.zeros(2, 4, 1, 584, dtype=torch.uint8)}, "extra_k_cache"),
        ({"enable_batch_invariant": True}, "enable_batch_invariant"),
        ({"k_cache": torch.zeros(5, 64, 1, 512, dtype=torch.bfloat16)}, "k_cache"),
        ({"indices": None}, "indices"),
    ],
)
def test_a_plan_for_another_call_raises(changes: dict[str, Any], argument: str) -> None:
    kwargs = official(arguments("V4"))
    call(kwargs)
    with pytest.raises(ArgumentError, match="as tile_scheduler_metadata was filled for") as caught:
        call(kwargs | changes)
    assert caught.value.argument == argument


def test_compiled() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    kwargs = official(arguments("V4"))
    eager = call(kwargs)
    for _ in range(3):
        fresh = kwargs | {"tile_scheduler_metadata": flash_mla.get_mla_metadata()[0]}
        assert all(map(same_bits, compiled(fresh), eager))
    assert counter.frame_count == 1


def test_sparse_prefill() -> None:
    parameters = inspect.signature(flash_mla.flash_mla_sparse_fwd).parameters
    assert list(parameters) == ["q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length"]
    assert [parameters[name].default for name in ("d_v", "attn_sink", "topk_length")] == [512, None, None]
    q, kv = torch.randn(3, 64, 576).bfloat16(), torch.randn(90, 1, 576).bfloat16()
    indices = torch.randint(-9, 99, (3, 1, 128), dtype=INT)
    indices[1] = -1
    sink, lengths = torch.randn(64), torch.tensor([128, 5, 60], dtype=INT)
    results = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1, 512, sink, lengths)
    expected = torch.ops.flashmla.sparse_prefill(q, kv, indices, 512, 0.1, "native", sink, lengths)
    assert all(map(same_bits, results, expected))
    out, max_logits, lse = results
    assert (out[1] == 0).all()
    assert (max_logits[1] == -math.inf).all()
    assert (lse[1] == math.inf).all()
    rows = torch.randint(0, 120, (90, 1, 528), dtype=torch.uint8)
    narrow = (q[..., :512].contiguous(), rows, indices, 0.1)
    made = flash_mla.flash_mla_sparse_fwd(*narrow)
    expected = torch.ops.flashmla.sparse_prefill(*narrow[:3], 512, 0.1, "fp8_v41")
    assert all(map(same_bits, made, expected))
    with pytest.raises(ArgumentError, match="'indices': expected int32, got int64"):
        flash_mla.flash_mla_sparse_fwd(q, kv, indices.long(), 0.1)
