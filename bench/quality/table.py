"""The tables of docs/sparsity.md and docs/quantize.md, made of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.quality import tiles, weights
from cutlass_kernels.tables import place

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent.parent / "docs" / "sparsity.md"
MARK = "quality"
HEADS = ("tokens", "selector", "rows skipped", "bytes saved", "perplexity", "same token", "lost", "needles")


def table() -> str:
    """Markdown: for each model and length, every selector."""
    parts = []
    for file in sorted(RESULTS.glob("*.json")):
        rows = json.loads(file.read_text())
        sizes = {row["length"]: (row["texts"], row["tokens"] // row["texts"]) for row in rows}
        of_each = "; ".join(f"at {n}, the last {last} tokens of {texts}" for n, (texts, last) in sizes.items())
        parts.append(f"**{rows[0]['model']}** (decoded of each text: {of_each})")
        lines = [HEADS, ("---",) * len(HEADS), *(_line(row) for row in rows)]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def write() -> None:
    """Put each table between the marks of its page."""
    for page, mark, made in (
        (PAGE, MARK, table()),
        (weights.PAGE, MARK, weights.table()),
        (PAGE, "tiles", tiles.table()),
    ):
        place(page, mark, made)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    change = 100 * (row["perplexity"] / row["perplexity_dense"] - 1)
    needles = f"{row['needles_kept']} of {row['needles_dense']}" if row["needles"] else "-"
    return (
        str(row["length"]),
        row["selector"],
        f"{100 * row['rows_skipped']:.0f} %",
        f"{100 * row['bytes_saved']:.0f} %",
        f"{change:+.2f} %",
        f"{100 * row['same_token']:.1f} %",
        "not bounded" if row["lost"] > 0.999 else f"<= {100 * row['lost']:.1f} %",
        needles,
    )
