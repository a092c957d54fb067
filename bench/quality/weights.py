"""Quantised weights: bits, bytes, perplexity and speed of each mix, and the table of docs/quantize.md."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from flashmla_ops.integrations.transformers import enable
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.quant import quantize
from flashmla_ops.quant.weights import NATIVE

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "weights"
PAGE = HERE.parent.parent / "docs" / "quantize.md"
AUTO = "auto"
#: Each way, in the table's order: the argument ``weights`` of `quantize`, or "auto".
MIXES = (NATIVE, "int8", "int8-attention+int4-mlp", "int4_g32", "int4", AUTO)
PROMPT, TURNS, STEPS = 64, 5, 8  # tokens; a turn of a model is STEPS tokens
HEADS = ("weights", "formats", "bits", "MB", "perplexity", "change", "calibration text", "tokens/s")


@dataclass(frozen=True)
class Row:
    """One way to quantise one model."""

    model: str
    weights: str
    formats: dict[str, int]  # how many weights have each
    bits: float  # of an element of what is quantised
    bytes: int  # of all weights
    tokens: int  # of the text that nothing was chosen by
    perplexity: float  # of it
    perplexity_before: float
    calibration: float
    calibration_before: float
    tokens_per_second: float | None = None

    def __str__(self) -> str:
        return "  ".join(line(asdict(self)))


def measure(
    name: str, folder: Path, calibration: Tensor, held_out: Tensor, *, tolerance: float, speed: bool
) -> list[Row]:
    """Every mix of the model in ``folder``, on texts ``[n, s]``."""
    rows, models = [], {}
    for mix in MIXES:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        chosen = {"mixed": AUTO} if mix == AUTO else {"weights": mix}
        found = quantize(model, **chosen, calibration=calibration, held_out=held_out, tolerance=tolerance)
        (of_calibration, of_calibration_after) = found.perplexity["calibration"]
        (before, after) = found.perplexity["held_out"]
        rows.append(
            Row(
                model=name,
                weights=mix,
                formats=dict(Counter(layer.format for layer in found.layers if layer.elements)),
                bits=found.bits if found.plan else 16.0,
                bytes=found.bytes,
                tokens=held_out.numel(),
                perplexity=after,
                perplexity_before=before,
                calibration=of_calibration_after,
                calibration_before=of_calibration,
            )
        )
        print(rows[-1], flush=True)
        if speed:
            models[mix] = model
    speeds = tokens_per_second(models, held_out[:1, : PROMPT + 1])
    return [Row(**asdict(row) | {"tokens_per_second": speeds.get(row.weights)}) for row in rows]


@torch.no_grad()
def tokens_per_second(models: Mapping[str, PreTrainedModel], ids: Tensor) -> dict[str, float]:
    """Decoding one sequence, uncompiled, with our attention; models take turns. The median over steps."""
    caches: dict[str, DynamicCache] = {}
    for mix, model in models.items():
        enable(model)
        caches[mix] = DynamicCache(config=model.config)
        model(ids[:, :-1], **{CACHE_ARGUMENT: caches[mix]})
    times: dict[str, list[float]] = {mix: [] for mix in models}
    for _ in range(TURNS):
        for mix, model in models.items():
            for _ in range(STEPS):
                start = time.perf_counter()
                model(ids[:, -1:], **{CACHE_ARGUMENT: caches[mix]})
                times[mix].append(time.perf_counter() - start)
    return {mix: 1 / statistics.median(steps) for mix, steps in times.items()}


def write_results(rows: list[Row]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(row) for row in rows], indent=1)
    (RESULTS / f"{rows[0].model}.json").write_text(text + "\n")


def line(row: dict[str, Any]) -> tuple[str, ...]:
    change = 100 * (row["perplexity"] / row["perplexity_before"] - 1)
    of_calibration = 100 * (row["calibration"] / row["calibration_before"] - 1)
    speed = row["tokens_per_second"]
    return (
        row["weights"],
        ", ".join(f"{count} {name}" for name, count in row["formats"].items()),
        f"{row['bits']:.2f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['perplexity']:.3f}",
        f"{change:+.2f} %",
        f"{of_calibration:+.2f} %",
        "" if speed is None else f"{speed:.1f}",
    )


def table() -> str:
    """Markdown: for each model, every mix."""
    parts = []
    for file in sorted(RESULTS.glob("*.json")):
        rows = json.loads(file.read_text())
        parts.append(f"**{rows[0]['model']}**, {rows[0]['tokens']} tokens")
        parts.append(tabulate([line(row) for row in rows], HEADS, tablefmt="pipe", disable_numparse=True))
    return "\n\n".join(parts)
