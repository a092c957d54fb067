"""How many tiles of a prefill's second product (probabilities and values) a model's own softmax leaves to skip.

A kernel that has the scores may leave out the values of tokens that no query of its tile gives weight to. What it can
save at the most is measured here: tiles are taken, the lightest first, while no query loses more than a share of its
softmax, by the softmax that is known only when all scores are there. A kernel, which goes through the tokens once,
knows less.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from cutlass_kernels.tables import markdown

RESULTS = Path(__file__).parent / "results" / "tiles"
#: Queries and tokens of a tile.
TILES = ((64, 64), (16, 64), (16, 16), (1, 64))
LOST = (1e-4, 1e-3, 1e-2)
#: One layer of so many is looked at, so many queries of it at a time, and one head of so many.
LAYERS, QUERIES, HEADS = 6, 1024, 4


@dataclass(frozen=True)
class Row:
    model: str
    length: int
    queries: int  # of a tile
    tokens: int  # of a tile
    lost: float  # the share of its softmax that no query loses more of
    skipped: float  # of the tiles that causal attention has


def measure(name: str, folder: Path, ids: Tensor) -> list[Row]:
    """A causal forward of ``ids [1, s]``, s a multiple of 64."""
    counts: Counter[tuple[int, int, float]] = Counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
        if module.layer_idx % LAYERS == 1:
            for head in range(0, q.shape[1], HEADS):
                _count(q[0, head] * scaling, k[0, head * k.shape[1] // q.shape[1]], counts)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("count_tiles", attend)
    model.set_attn_implementation("count_tiles")
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return [
        Row(name, ids.shape[1], *tile, lost, counts[(*tile, lost)] / counts[(*tile, 1.0)])
        for tile in TILES
        for lost in LOST
    ]


def _count(q: Tensor, k: Tensor, counts: Counter[tuple[int, int, float]]) -> None:
    """Add the tiles that may be skipped for a loss, and all of them for a loss of 1."""
    j = torch.arange(len(k))
    for start in range(0, len(q), QUERIES):
        i = torch.arange(start, min(start + QUERIES, len(q)))[:, None]
        share = torch.softmax((q[i[:, 0]] @ k.T).masked_fill(j > i, -torch.inf), dim=-1)
        for queries, tokens in TILES:
            mass = share.unflatten(1, (-1, tokens)).sum(dim=-1).unflatten(0, (-1, queries)).amax(dim=1)
            seen = j[::tokens] <= i[queries - 1 :: queries]
            lightest = mass.where(seen, torch.inf).sort(dim=-1).values.cumsum(dim=-1)
            counts.update({(queries, tokens, lost): int((lightest <= lost).sum()) for lost in LOST})
            counts[(queries, tokens, 1.0)] += int(seen.sum())


def write_results(rows: list[Row]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{rows[0].model}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def table() -> str:
    """Markdown: for each model and tile, how many may be skipped for each loss."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        for row in json.loads(file.read_text()):
            tile = f"{row['queries']} x {row['tokens']}"
            lines.setdefault((row["model"], row["length"], tile), []).append(f"{row['skipped']:.0%}")
    header = ["model", "tokens", "queries x tokens of a tile", *(f"lost <= {lost:g}" for lost in LOST)]
    return markdown(header, [[*key, *cells] for key, cells in lines.items()], texts=3)
