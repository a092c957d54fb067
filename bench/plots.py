"""Pictures of results, as SVG and PNG: the roofline with our points and the peers', and bars for every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from bench.report import PICTURES, RESULTS, Row, bars_of, groups, limit_of, load, peers_of, picture, split_keys
from bench.runner import OURS

#: The same results give the same bytes.
matplotlib.rcParams["svg.hashsalt"] = "flashmla"
matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
OUR_COLOUR = "#c1272d"
PEER_COLOURS = ("#4472a8", "#5aa469", "#8d6cab", "#d08c3f", "#5b9ea6", "#8c8c8c")
BAR_INCHES = 0.09


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for every implementation, ours first."""
    peers = peers_of(rows)
    return {OURS: OUR_COLOUR} | {name: PEER_COLOURS[i % len(PEER_COLOURS)] for i, name in enumerate(peers)}


def shown(row: Row, name: str) -> float | None:
    """Seconds of an implementation that ran and was right."""
    timing = row["timings"].get(name)
    return timing["median"] if timing is not None and timing["correct"] else None


def roofline(results: Mapping[str, Any]) -> Any:
    """FLOP/s over FLOPs a byte: the roofs measured in the run, and a point for each case and implementation."""
    rows, dram = results["results"], results["limits"]["dram_read"]
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    peaks = [row["peak_flops"] for row in rows]
    left, right = min(*intensities, min(peaks) / dram / 2) / 2, max(*intensities, max(peaks) / dram) * 2
    for name, peak in dict.fromkeys((row["peak"], row["peak_flops"]) for row in rows):
        ridge = min(max(peak / dram, left), right)
        axes.plot([left, ridge, right], [left * dram / 1e9, min(peak, ridge * dram) / 1e9, peak / 1e9], "k-", lw=1)
        axes.annotate(name, (right, peak / 1e9), ha="right", va="bottom")
    axes.annotate(f"DRAM read {dram / 1e9:.0f} GB/s", (left, left * dram / 1e9), ha="left", va="top")
    for name, colour in reversed(colours(rows).items()):
        points = [
            (x, row["flops"] / s / 1e9) for x, row in zip(intensities, rows, strict=True) if (s := shown(row, name))
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, color=colour, label=name, alpha=0.8, linewidths=0)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs a byte that must be read", ylabel="GFLOP/s", title=title(results)
    )
    axes.legend(frameon=False)
    return figure


def speed(row: Row, name: str) -> float | None:
    """The limit's time over an implementation's, or ours over it where nothing limits the case."""
    seconds = shown(row, name)
    return seconds and (limit_of(row) or row["timings"][OURS]["median"]) / seconds


def bars(rows: Sequence[Row], heading: str) -> Any:
    """How near the cases of a group come to their limits, from 0, a panel for each dtype: longer is faster."""
    names, dtypes = colours(rows), list(dict.fromkeys(row["case"].get("dtype") for row in rows))
    panels = [[row for row in rows if row["case"].get("dtype") == dtype] for dtype in dtypes]
    step = len(names) + 1  # bars of a case and a gap
    height = 1.2 + BAR_INCHES * step * max(len(panel) for panel in panels)
    size = (5.5 * len(panels), height)
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False, sharex=True)
    keys = [key for key in split_keys(rows)[0] if key != "dtype"]
    unit = "of the limit" if any(limit_of(row) for row in rows) else f"speed, {OURS} = 1"
    for axes, panel, dtype in zip(all_axes[0], panels, dtypes, strict=True):
        for i, (name, colour) in enumerate(names.items()):
            drawn = [(at * step + i, length) for at, row in enumerate(panel) if (length := speed(row, name))]
            if drawn:
                axes.barh(*zip(*drawn, strict=True), height=0.9, color=colour, label=name)
        axes.axvline(1, color="black", lw=1)
        labels = [", ".join(f"{key} {row['case'].get(key)}" for key in keys) for row in panel]
        axes.set_yticks([at * step + len(names) / 2 - 0.5 for at in range(len(panel))], labels, fontsize=7)
        axes.set(xlabel=unit, ylim=(len(panel) * step - 0.5, -1), title=dtype)
    entries: dict[str, Any] = {}
    for axes in all_axes[0]:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), frameon=False, loc="outside upper center", ncols=6, title=heading)
    return figure


def title(results: Mapping[str, Any]) -> str:
    host = results["host"]
    return f"{results['suite']}: {host['cpu']}, {host['instruction_set']}, {host['threads']} threads"


def draw(results: Mapping[str, Any], folder: Path = PICTURES) -> list[Path]:
    """Write the pictures of one run. A roofline needs FLOPs and bytes in every case."""
    figures = {}
    if all(row["flops"] and row["bytes"] for row in results["results"]):
        figures["roofline"] = roofline(results)
    for group, rows in groups(results).items():
        heading = title(results) + (f", {group}" if group else "")
        figures[bars_of(group)] = bars(rows, heading)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, figure in figures.items():
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            written.append(picture(results, kind, folder).with_suffix(f".{suffix}"))
            figure.savefig(written[-1], dpi=120, metadata=metadata)
        pyplot.close(figure)
    return written


def draw_all(results: Path = RESULTS, folder: Path = PICTURES) -> None:
    """Write the pictures of all committed results."""
    for run in load(results):
        for path in draw(run, folder):
            print(f"wrote {path}")
