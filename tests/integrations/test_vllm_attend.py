"""The functions of tensors under the plugin of vLLM, against the definitions. vLLM itself: test_vllm.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.integrations.vllm import attend
from flashmla_ops.integrations.vllm.checkpoint import TINY, untied

PAGE_SIZE, N_PAGES, D, H_Q, H_KV = 4, 24, 32, 4, 2


def paged(queries: list[int], prefixes: list[int]) -> tuple[attend.Batch, Tensor]:
    """A batch whose pages lie in no order, and the slots of its query tokens."""
    b = len(queries)
    table = torch.randperm(N_PAGES, dtype=torch.int32)[: b * 5].view(b, 5)
    ends = torch.tensor([0, *queries]).cumsum(0)
    lengths = torch.tensor([p + n for p, n in zip(prefixes, queries, strict=True)], dtype=torch.int32)
    decodes = sum(n == 1 for n in queries)
    batch = attend.Batch(decodes, prefixes, lengths, table, ends.int())
    return batch, torch.cat(
        [slots_of(batch, i, p, p + n) for i, (p, n) in enumerate(zip(prefixes, queries, strict=True))]
    )


def slots_of(batch: attend.Batch, sequence: int, start: int, stop: int) -> Tensor:
    at = torch.arange(start, stop)
    return batch.block_table[sequence, at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3}, {"softcap": 2.0}, {"attn_sink": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"causal": False}],
    ids=str,
)
@pytest.mark.parametrize(
    ("queries", "prefixes"),
    [([1, 1, 1], [7, 0, 12]), ([5, 3], [0, 0]), ([1, 1, 4, 6], [9, 2, 0, 8])],
    ids=["decoding", "prompts", "mixed"],
)
def test_grouped_heads_attend_to_their_rows(
    options: dict[str, object], queries: list[int], prefixes: list[int]
) -> None:
    batch, slots = paged(queries, prefixes)
    cache = torch.randn(N_PAGES, H_KV, PAGE_SIZE, 2 * D)
    t = sum(queries)
    q, k, v = torch.randn(t, H_Q, D), torch.randn(t, H_KV, D), torch.randn(t, H_KV, D)
    attend.append_grouped(k, v, cache, slots)
    given = attend.Options(softmax_scale=0.2, **options)  # type: ignore[arg-type]
    out = attend.attend_grouped(q, k, v, cache, batch, given)
    table, rows = (batch.block_table, batch.cache_seqlens), attend.as_rows(cache)
    expected, _ = reference.decode(q, rows, None, *table, D, D, cu_seqlens_q=batch.cu_seqlens_q, **given._asdict())
    torch.testing.assert_close(out, expected.to(out.dtype), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attend.attend_grouped(q, None, None, cache, batch, given), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("row_format", ["native", "fp8_v32", "int8_g128"])
def test_latents_are_decoded_as_they_lie(row_format: str) -> None:
    batch, slots = paged([1, 1], [6, 0])
    lengths = torch.tensor([7, 0], dtype=torch.int32)
    native = row_format == "native"
    cache = torch.randn(N_PAGES, PAGE_SIZE, 576) if native else torch.zeros(N_PAGES, PAGE_SIZE, 656, dtype=torch.uint8)
    before = torch.cat([slots_of(batch, 0, 0, 6), torch.tensor([-1])])
    attend.append_latents(torch.randn(7, 512), torch.randn(7, 1, 64), cache, before, row_format)
    attend.append_latents(torch.randn(2, 512), torch.randn(2, 1, 64), cache, slots, row_format)
    q = torch.randn(2, H_Q, 576)
    out, lse = attend.decode_latents(q, cache, batch.block_table, lengths, 512, 0.1, row_format)
    wanted = reference.decode(
        q[:, None], cache[:, :, None], None, batch.block_table, lengths, 512, softmax_scale=0.1, row_format=row_format
    )
    torch.testing.assert_close(out, wanted[0].squeeze(1).to(out.dtype), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(lse[0], wanted[1][0, :, 0].float(), atol=1e-4, rtol=1e-4)
    assert lse[1].eq(-torch.inf).all()


@pytest.mark.parametrize("row_format", ["native", "fp8_v32"])
@pytest.mark.parametrize("prefixes", [[0, 0], [9, 0]], ids=["prompts", "chunks"])
def test_prompts_see_what_they_have_in_pages(row_format: str, prefixes: list[int]) -> None:
    queries = [4, 3]
    batch, _ = paged(queries, prefixes)
    native = row_format == "native"
    cache = torch.zeros(N_PAGES, PAGE_SIZE, 1, 576) if native else torch.zeros(N_PAGES, PAGE_SIZE, 1, 656).byte()
    earlier = torch.randn(max(prefixes), 1, 576)
    torch.ops.flashmla.append_(cache, earlier, slots_of(batch, 0, 0, max(prefixes)), row_format)
    if not native:
        earlier = torch.ops.flashmla.dequantize_rows(
            torch.ops.flashmla.quantize_rows(earlier, row_format), row_format, torch.float32
        )
    weight = torch.randn(H_Q, 24, 512) / 20

    def expand(rows: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        heads = torch.einsum("nc,hdc->nhd", rows[:, 0, :512], weight)
        return torch.cat([heads[..., :16], rows[..., 512:].expand(-1, H_Q, -1)], dim=-1), heads[..., 16:]

    new = torch.randn(sum(queries), 1, 576)
    q, (k, v) = torch.randn(sum(queries), H_Q, 80), expand(new, None)
    lengths = None if not any(prefixes) else torch.tensor(prefixes, dtype=torch.int32)
    out = attend.prefill_latents(
        q, k, v, cache.squeeze(2), batch.cu_seqlens_q, lengths, batch.block_table, expand, 0.1, row_format
    )
    all_k, all_v = expand(torch.cat([earlier, new]), None)
    cu_k = torch.tensor([0, max(prefixes) + queries[0], max(prefixes) + sum(queries)])
    expected, _ = reference.prefill(q, all_k, all_v, batch.cu_seqlens_q, cu_k, causal=True, softmax_scale=0.1)
    torch.testing.assert_close(out, expected.to(out.dtype), atol=1e-4, rtol=1e-3)


def test_formats_of_latents() -> None:
    assert attend.row_format_of("auto", None, 64, 32) == "native"
    assert attend.row_format_of("fp8_ds_mla", None, 512, 64) == "fp8_v32"
    assert attend.row_format_of("fp8_ds_mla", "int8_g128", 512, 64) == "int8_g128"
    with pytest.raises(ArgumentError, match=r"latents of 512 and 64 elements.*got 64 and 32"):
        attend.row_format_of("fp8_ds_mla", None, 64, 32)
    with pytest.raises(ArgumentError, match=r"one of fp8_v32, int8_g128, got fp4_v41"):
        attend.row_format_of("fp8_ds_mla", "fp4_v41", 512, 64)


def test_a_tied_head_is_written_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(untied(TINY, tmp_path / "model") / "model.safetensors")
    assert weights["lm_head.weight"].equal(weights["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        untied(tmp_path, tmp_path / "other")
