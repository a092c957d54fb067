"""The drop-in functions: signatures, lazily filled metadata, results, typed errors where the official one asserts."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flashmla_ops as flash_mla
from flashmla_ops.errors import ArgumentError
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.oracle import check_decode
from tests.support.poison import same_bits

CASE = DecodeCase(lengths=(130, 0, 7, 64), s_q=2, h_q=9, causal=True)


def call(inputs: DecodeInputs, meta: flash_mla.FlashMLASchedMeta, **changes: Any) -> tuple[Tensor, Tensor]:
    kwargs = {
        "q": inputs.q,
        "k_cache": inputs.kv_cache,
        "block_table": inputs.block_table,
        "cache_seqlens": inputs.cache_seqlens,
        "head_dim_v": inputs.d_v,
        "tile_scheduler_metadata": meta,
        "softmax_scale": inputs.softmax_scale,
        "causal": inputs.causal,
    }
    return flash_mla.flash_mla_with_kvcache(**(kwargs | changes))


def test_signature() -> None:
    parameters = inspect.signature(flash_mla.flash_mla_with_kvcache).parameters
    required = ["q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata"]
    defaults = {
        "num_splits": None,
        "softmax_scale": None,
        "causal": False,
        "is_fp8_kvcache": None,
        "indices": None,
        "attn_sink": None,
        "extra_k_cache": None,
        "extra_indices_in_kvcache": None,
        "topk_length": None,
        "extra_topk_length": None,
        "enable_batch_invariant": False,
    }
    assert list(parameters) == [*required, *defaults]
    assert all(parameters[name].default is inspect.Parameter.empty for name in required)
    assert {name: parameters[name].default for name in defaults} == defaults


def test_metadata_takes_the_arguments_of_older_releases_and_is_empty() -> None:
    meta, num_splits = flash_mla.get_mla_metadata(torch.ones(2), 16, 1, is_fp8=False)
    assert num_splits is None
    assert meta == flash_mla.FlashMLASchedMeta(False, None, None, None)
    assert flash_mla.get_mla_metadata()[0] is not meta


def test_config_fields() -> None:
    names = [field.name for field in dataclasses.fields(flash_mla.FlashMLASchedMeta.Config)]
    heads = ["b", "s_q", "h_q", "page_block_size", "h_k"]
    plan = ["causal", "is_fp8_kvcache", "topk", "extra_page_block_size", "extra_topk", "enable_batch_invariant"]
    assert names == [*heads, *plan]


def test_first_call_fills_the_metadata_and_later_ones_reuse_it() -> None:
    inputs = build(CASE)
    meta, _ = flash_mla.get_mla_metadata()
    first = call(inputs, meta)
    assert meta.have_initialized
    assert meta.config == flash_mla.FlashMLASchedMeta.Config(4, 2, 9, 64, 1, True, False, None, None, None)
    schedule = torch.ops.flashmla.decode_schedule(inputs.cache_seqlens, 2, 9, 1, torch.get_num_threads())
    assert torch.equal(meta.tile_scheduler_metadata, schedule)
    filled = meta.tile_scheduler_metadata
    second = call(inputs, meta)
    assert meta.tile_scheduler_metadata is filled
    assert all(map(same_bits, first, second))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_agrees_with_the_reference(dtype: str, causal: bool, scale: float | None) -> None:
    case = dataclasses.replace(CASE, dtype=dtype, causal=causal, softmax_scale=scale)

    def decode(q: Tensor, kv_cache: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ours = ("window", "softcap", "cu_seqlens_q", "batch_invariant")
        for name in ("k_cache", "qk_start", "schedule", "attn_sink", *ours):
            del kwargs[name]
        head_dim_v = kwargs.pop("d_v")
        meta, num_splits = flash_mla.get_mla_metadata()
        return flash_mla.flash_mla_with_kvcache(
            q, kv_cache, head_dim_v=head_dim_v, tile_scheduler_metadata=meta, num_splits=num_splits, **kwargs
        )

    check_decode(case, decode)


def test_batch_invariant() -> None:
    """A sequence has the same bits alone as in its batch; the plan that a call has filled serves the next one."""
    inputs = build(dataclasses.replace(CASE, lengths=(3000, 0, 70, 1500)))
    meta, _ = flash_mla.get_mla_metadata()
    out, lse = call(inputs, meta, enable_batch_invariant=True)
    assert all(map(same_bits, (out, lse), call(inputs, meta, enable_batch_invariant=True)))
    for i in range(4):
        rows = {"q": inputs.q, "block_table": inputs.block_table, "cache_seqlens": inputs.cache_seqlens}
        own, _ = flash_mla.get_mla_metadata()
        alone = call(inputs, own, enable_batch_invariant=True, **{name: x[i : i + 1] for name, x in rows.items()})
        assert all(map(same_bits, (out[i : i + 1], lse[i : i + 1]), alone))


def test_positional_call_of_the_readme() -> None:
    inputs = build(CASE)
    meta, _ = flash_mla.get_mla_metadata()
    tensors = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    out, lse = flash_mla.flash_mla_with_kvcache(*tensors, 512, meta, causal=True)
    assert out.shape == (4, 2, 9, 512)
    assert lse.shape == (4, 9, 2)
    assert lse.dtype == torch.float32
    assert (out[1] == 0).all()
    assert (lse[1] == torch.inf).all()


@pytest.mark.parametrize(
    ("changes", "argument", "expected", "actual"),
    [
        ({"num_splits": torch.ones(2)}, "num_splits", "None", "Tensor"),
        ({"indices": torch.zeros(4, 2, 64, dtype=torch.int32)}, "causal", "False with indices", "True"),
        ({"attn_sink": torch.zeros(8)}, "attn_sink", "9 heads", "8"),
        ({"extra_k_cache": torch.zeros(1, 64, 1, 576)}, "extra_k_cache", "None", "Tensor"),
        ({"extra_indices_in_kvcache": torch.zeros(4, 2, 64)}, "extra_indices_in_kvcache", "None", "Tensor"),
        ({"topk_length": torch.zeros(4)}, "topk_length", "None", "Tensor"),
        ({"extra_topk_length": torch.zeros(4)}, "extra_topk_length", "None", "Tensor"),
        ({"is_fp8_kvcache": True}, "is_fp8_kvcache", "False", "True"),
        ({"block_table": None}, "block_table", "a tensor", "None"),
        ({"cache_seqlens": None}, "cache_seqlens", "a tensor", "None"),
        ({"tile_scheduler_metadata": torch.zeros(2)}, "tile_scheduler_metadata", "FlashMLASchedMeta", "Tensor"),
        ({"q": torch.zeros(4, 2, 576)}, "q", "4 dimensions", "3 dimensions"),
        ({"k_cache": torch.zeros(64, 576)}, "k_cache", "4 dimensions", "2 dimensions"),
        ({"head_dim_v": 577}, "d_v", "a value in [1, 576]", "577"),
        ({"cache_seqlens": torch.tensor([1, 0, -1, 0], dtype=torch.int32)}, "cache_seqlens", "at least 0", "-1 at [2]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_misuse_is_a_typed_error(changes: dict[str, Any], argument: str, expected: str, actual: str) -> None:
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(ArgumentError) as caught:
        call(build(CASE), meta, **changes)
    assert caught.value.argument == argument
    assert expected in caught.value.expected
    assert caught.value.actual == actual
    assert meta == flash_mla.FlashMLASchedMeta(), "a call that raised must leave the metadata empty"


@pytest.mark.parametrize(
    ("field", "value", "argument"),
    [
        ("lengths", (130, 0, 7), "q"),
        ("s_q", 1, "q"),
        ("h_q", 3, "q"),
        ("page_size", 16, "k_cache"),
        ("h_kv", 3, "k_cache"),
        ("causal", False, "causal"),
    ],
)
def test_metadata_filled_for_another_shape_raises(field: str, value: Any, argument: str) -> None:
    meta, _ = flash_mla.get_mla_metadata()
    call(build(CASE), meta)
    before = dataclasses.replace(meta)
    with pytest.raises(ArgumentError, match="as tile_scheduler_metadata was filled for") as caught:
        call(build(dataclasses.replace(CASE, **{field: value})), meta)
    assert caught.value.argument == argument
    assert meta.config == before.config
    assert meta.tile_scheduler_metadata is before.tile_scheduler_metadata


def test_metadata_filled_for_other_lengths_raises() -> None:
    meta, _ = flash_mla.get_mla_metadata()
    call(build(CASE), meta)
    with pytest.raises(ArgumentError) as caught:
        call(build(dataclasses.replace(CASE, lengths=(130, 0, 8, 64))), meta)
    assert caught.value.argument == "schedule"
    assert (caught.value.expected, caught.value.actual) == (
        "a schedule made for length 8 at [2]",
        "one made for length 7",
    )


def test_gradients_are_those_of_the_operator() -> None:
    inputs = build(CASE)
    leaf = inputs.q.detach().clone().requires_grad_()
    out, lse = call(inputs, flash_mla.FlashMLASchedMeta(), q=leaf)
    out.sum().backward()
    named = inputs.reference_kwargs(out=out.detach(), lse=lse.detach(), dout=torch.ones_like(out), dlse=None)
    del named["cu_seqlens_q"]
    assert torch.equal(leaf.grad, torch.ops.flashmla.decode_backward(**named)[0])


def test_gradients_of_sparse_decode_are_those_of_decode() -> None:
    """Where indices name the rows that a sequence has."""
    leaves = [torch.randn(1, 1, 4, 576, requires_grad=True), torch.randn(1, 64, 1, 576, requires_grad=True)]
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    found = []
    for rows in ((None, None), (table, lengths)):
        named = {"indices": torch.arange(3, dtype=torch.int32).view(1, 1, 3)} if rows[0] is None else {}
        out, lse = flash_mla.flash_mla_with_kvcache(*leaves, *rows, 512, flash_mla.FlashMLASchedMeta(), **named)
        found.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    torch.testing.assert_close(*found)


def test_compiled_with_metadata_filled_before() -> None:
    inputs = build(CASE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    meta, _ = flash_mla.get_mla_metadata()
    eager = call(inputs, meta)
    for _ in range(3):
        assert all(map(same_bits, compiled(inputs, meta), eager))
    assert counter.frame_count == 1


def test_compiled_fills_fresh_metadata() -> None:
    inputs = build(CASE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    eager_meta = flash_mla.FlashMLASchedMeta()
    eager = call(inputs, eager_meta)
    for _ in range(3):
        meta, _ = flash_mla.get_mla_metadata()
        assert all(map(same_bits, compiled(inputs, meta), eager))
        assert meta.have_initialized
        assert meta.config == eager_meta.config
        assert torch.equal(meta.tile_scheduler_metadata, eager_meta.tile_scheduler_metadata)
    assert counter.frame_count == 1


def test_compiled_with_metadata_made_inside() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
        meta, _ = flash_mla.get_mla_metadata()
        call(inputs, meta)
        return call(inputs, meta)

    inputs = build(CASE)
    assert all(map(same_bits, step(inputs), call(inputs, flash_mla.FlashMLASchedMeta())))
    assert counter.frame_count == 1
