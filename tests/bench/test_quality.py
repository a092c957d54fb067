"""The measurement of quality: what is read, and a tiny model from one end to the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.quality import table, tiles, weights
from bench.quality.evaluate import evaluate
from bench.quality.texts import documentation, haystacks
from flashmla_ops.sparsity import DynamicSparsity
from tests.integrations.grouped import tiny_grouped


class Bytes:
    """A tokenizer: a token is a byte, below 250."""

    def __call__(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = [min(byte, 249) for byte in text.encode()]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_needles_lie_at_their_depths() -> None:
    depths = [0.1, 0.5, 0.9]
    for stack, depth in zip(haystacks(Bytes(), 2000, depths, 3), depths, strict=True):
        text = Bytes().decode(stack.ids[0].tolist())
        assert stack.ids.shape == (1, 2000)
        assert abs(text.index(f"library is {stack.answer}") / 2000 - depth) < 0.1
        assert text.endswith("secret number of the library is")
        assert text.count("secret number of the garden") == 1


def test_texts_lie_apart() -> None:
    texts = documentation(Bytes(), 3, 500)
    assert texts.shape == (3, 500)
    assert len({tuple(text.tolist()) for text in texts}) == 3


def test_nothing_skipped_changes_nothing() -> None:
    model = tiny_grouped()
    selectors = {
        "all": DynamicSparsity(eps=0.0, min_context=0, page_size=8),
        "few": DynamicSparsity("boxes", keep=0.1, min_context=0, page_size=8),
    }
    with torch.no_grad():
        ids = documentation(Bytes(), 2, 200)
        rows = evaluate("tiny", model, Bytes(), ids, 10, haystacks(Bytes(), 200, [0.5], 1), selectors)
    everything, few = rows
    assert everything.tokens == 20
    assert abs(everything.perplexity / everything.perplexity_dense - 1) < 1e-4
    assert everything.same_token == 1.0
    assert everything.rows_skipped == 0.0
    assert few.rows_skipped > 0.5
    assert few.perplexity != few.perplexity_dense
    assert table._line(few.as_json())[:2] == ("200", "few")


def test_mixes_of_weights(tmp_path: Path) -> None:
    model = tiny_grouped()
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 200, (4, 80), generator=torch.Generator().manual_seed(0))
    rows = weights.measure("tiny", tmp_path, ids[:2], ids[2:], tolerance=0.5, speed=True)
    assert [row.weights for row in rows] == [*weights.MIXES]
    native, int8, *_, auto = rows
    assert native.perplexity == native.perplexity_before == int8.perplexity_before
    assert native.bytes > int8.bytes >= auto.bytes
    assert all(row.tokens_per_second for row in rows)
    assert weights.line(asdict(native))[2:6] == (
        "16.00",
        f"{native.bytes / 1e6:.1f}",
        f"{native.perplexity:.3f}",
        "+0.00 %",
    )


def test_tiles_that_no_query_gives_weight_to(tmp_path: Path) -> None:
    tiny_grouped().save_pretrained(tmp_path)
    rows = tiles.measure("tiny", tmp_path, torch.arange(2, 130)[None] % 200)
    assert len(rows) == len(tiles.TILES) * len(tiles.LOST)
    assert all(0 <= row.skipped <= 1 for row in rows)


def test_tiles_are_counted_by_their_heaviest_query() -> None:
    """Queries 0 to 63 see themselves alone, those behind see the first 64 tokens only, but for one."""
    q, k = torch.zeros(128, 2), torch.zeros(128, 2)
    q[64:, 0], k[:64, 0] = 40.0, 1.0
    counts: Counter[tuple[int, int, float]] = Counter()
    tiles._count(q, k, counts)
    assert (counts[64, 64, 1.0], counts[64, 64, 1e-3]) == (3, 1)
    q[100] = -q[100]
    counts.clear()
    tiles._count(q, k, counts)
    assert (counts[64, 64, 1.0], counts[64, 64, 1e-3]) == (3, 0)
    assert (counts[1, 64, 1.0], counts[1, 64, 1e-3]) == (64 + 2 * 64, 64)
