"""The text and the chart of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import indent, shorten
from typing import Any

import matplotlib as mpl
from tabulate import tabulate

from flashmla_ops.demo.steps import CONTEXTS, StepResult, dtype_name
from flashmla_ops.demo.text import COMPILED, EAGER, INDUCTOR, NEW_TOKENS, PROMPTS, TRANSFORMERS, Generation, TextResult

mpl.use("Agg")
from matplotlib import pyplot as plt

WAYS = (TRANSFORMERS, EAGER, COMPILED)
COLOURS = {TRANSFORMERS: "#9aa5b1", INDUCTOR: "#5d6b7a", EAGER: "#4c9f70", COMPILED: "#1f6f8b"}


def text_report(result: TextResult) -> str:
    """The generated text, and a line for each way."""
    lines = ["A trained MLA language model (3.7 M parameters, 4 layers, fp32), greedy:", ""]
    for prompt, text in zip(PROMPTS, result.texts, strict=True):
        lines.append(f"  {prompt} | {' '.join(text.split())}")
    lines += ["", _generations(result)]
    lines.append(f"  ({len(PROMPTS)} prompts of different lengths as one batch, {NEW_TOKENS} new tokens each.")
    lines.append("  transformers caches the same latents: FlashMLA saves the work of expanding them, not memory.")
    lines.append("  Pages are counted whole, and the compiled cache at its full capacity.)")
    return "\n".join(lines)


def chat_report(result: TextResult, questions: Sequence[str]) -> str:
    """The questions with their answers, and a line for each way."""
    lines = ["SmolLM2-135M-Instruct, its real weights (GQA, 9 query and 3 KV heads, 30 layers, fp32), greedy:", ""]
    for question, answer in zip(questions, result.texts, strict=True):
        lines += [f"  {shorten(question, 100, placeholder=' ...')}", f"    {' '.join(answer.split())}"]
    lines += ["", _generations(result)]
    lines.append(
        "  (Each question is a batch of its own. The cache is that of the longest; static caches are counted at"
    )
    lines.append("  their full capacity, pages whole. FlashMLA keeps the same rows as transformers, in as many bytes.)")
    return "\n".join(lines)


def _generations(result: TextResult) -> str:
    reference = result.generations[TRANSFORMERS].tokens
    rows = []
    for name, generation in result.generations.items():
        same = int((generation.tokens == reference).sum())
        kib = generation.cache_bytes / 1024
        rows.append((name, f"{speed(generation):.0f}", f"{kib:.0f} KiB", f"{same}/{reference.numel()}"))
    return _table(("", "tokens/s", "cache", "tokens identical to transformers"), rows)


def speed(generation: Generation) -> float:
    """Tokens a second, prompts included in the time."""
    return generation.tokens.numel() / generation.seconds


def step_report(result: StepResult, bandwidth: float) -> str:
    """A table of decode steps, and the attention module alone."""
    lines = ["One decode step at DeepSeek-V2-Lite's geometry (2 dense layers, random weights, batch 1), median ms:", ""]
    rows = []
    for step in result.steps:
        cells = [f"{step.seconds[name] * 1e3:.1f}" for name in WAYS]
        faster = step.seconds[TRANSFORMERS] / step.seconds[COMPILED]
        floor = step.weight_bytes / bandwidth * 1e3
        rows.append((step.context, dtype_name(step.dtype), *cells, f"{faster:.1f}x", f"{floor:.1f}"))
    lines.append(_table(("context", "dtype", *WAYS, "faster", "reading the weights"), rows))
    theirs, ours = (result.attention[name] for name in (TRANSFORMERS, EAGER))
    lines += [
        "",
        f"  Reading all weights once at the measured {bandwidth / 1e9:.1f} GB/s is what no step can go below.",
        f"  The attention module alone at {CONTEXTS[-1]} tokens, fp32: {theirs * 1e3:.1f} ms with transformers SDPA,"
        f" {ours * 1e3:.1f} ms with FlashMLA eager ({theirs / ours:.1f}x).",
    ]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return indent(tabulate(rows, header, tablefmt="plain", disable_numparse=True, stralign="right"), "  ")


def draw(result: StepResult, bandwidth: float, path: Path) -> None:
    """The step times as bars, with the time to read the weights as a line across each group."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.26
    for i, name in enumerate(WAYS):
        places = [group + (i - 1) * width for group in range(len(result.steps))]
        heights = [step.seconds[name] * 1e3 for step in result.steps]
        bars = axes.bar(places, heights, width, label=name, color=COLOURS[name])
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    for group, step in enumerate(result.steps):
        floor = step.weight_bytes / bandwidth * 1e3
        label = "reading the weights once" if group == 0 else None
        axes.hlines(floor, group - 1.6 * width, group + 1.6 * width, color="#c0392b", linestyle="--", label=label)
    groups = [f"{step.context} tokens\n{dtype_name(step.dtype)}" for step in result.steps]
    axes.set_xticks(range(len(groups)), groups)
    axes.set_yscale("log")
    axes.set_ylabel("ms per decode step (log scale)")
    axes.set_title("One decode step, DeepSeek-V2-Lite's geometry, 2 layers, batch 1, CPU")
    axes.legend(frameon=False)
    _save(figure, axes, path)


def draw_chat(result: TextResult, path: Path) -> None:
    """Tokens a second of each way as bars."""
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    names = list(result.generations)
    speeds = [speed(result.generations[name]) for name in names]
    bars = axes.barh(names, speeds, color=[COLOURS[name] for name in names])
    axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second, prompts included")
    axes.set_title("SmolLM2-135M-Instruct, fp32, batch 1, CPU")
    _save(figure, axes, path)


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
