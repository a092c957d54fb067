"""The memory of attention beside its inputs and outputs, by level of the hierarchy: a table of every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cutlass_kernels.tables import markdown
from flashmla_ops.errors import FlashMLAError
from flashmla_ops.footprint import Footprint, decode_footprint, prefill_footprint

LEVELS = {1: "whole rows of scores", 2: "blocks", 3: "blocks and parallel parts"}
#: For each suite: a description, and the footprint at a level, all threads together, in bf16.
CALLS: dict[str, dict[str, Callable[[int], Footprint]]] = {
    "decode": {
        "1 sequence of 4096, h_q 128": lambda level: decode_footprint(1, 128, 4096, levels=level),
        "4 sequences of 16384, h_q 128": lambda level: decode_footprint(4, 128, 16384, levels=level),
        "4 sequences of 16384, h_q 16": lambda level: decode_footprint(4, 16, 16384, levels=level),
    },
    "prefill": {
        f"{tokens} tokens, 16 heads, causal": lambda level, tokens=tokens: prefill_footprint(  # type: ignore[misc]
            tokens, 16, levels=level
        )
        for tokens in (2048, 4096)
    },
}


def of_suite(suite: str) -> list[dict[str, Any]]:
    """The rows of the suite's table; none where no C++ kernels run."""
    rows = []
    for call, footprint in CALLS.get(suite, {}).items():
        for level in LEVELS:
            try:
                found = footprint(level)
            except FlashMLAError:
                return []
            rows.append({"call": call, "level": level} | vars(found))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; "less" is the share that a level saves of what level 1 needs."""
    header = [
        "call",
        "level",
        "scores and weights",
        "packed copies",
        "partial outputs",
        "together",
        "less than level 1",
    ]
    lines = []
    whole = {row["call"]: total(row) for row in rows if row["level"] == 1}
    for row in rows:
        kib = [f"{row[part] / 1024:.0f}" for part in ("scores", "copies", "outputs")]
        saved = 1 - total(row) / whole[row["call"]]
        cells = [
            row["call"],
            f"{row['level']}: {LEVELS[row['level']]}",
            *kib,
            f"{total(row) / 1024:.0f}",
            f"{saved:.0%}",
        ]
        lines.append(cells)
    found = markdown(header, lines, texts=2)
    return "Peak memory of a call beside its inputs and outputs, in KiB, in bf16.\n\n" + found


def total(row: Mapping[str, Any]) -> int:
    return int(row["scores"] + row["copies"] + row["outputs"])
