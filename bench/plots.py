"""Pictures of results, as SVG and PNG: the roofline with our points and the peers', bars for every case, and lines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from bench import report
from bench.report import DRAWN, PICTURES, RESULTS, Row, bars_of, groups, load, peers_of, picture, split_keys
from bench.runner import OURS
from bench.suites import scaling
from bench.summary import limit_of, machine_of

#: The same results give the same bytes.
matplotlib.rcParams["svg.hashsalt"] = "flashmla"
matplotlib.rcParams |= {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
OUR_COLOUR = "#c1272d"
PEER_COLOURS = ("#4472a8", "#5aa469", "#8d6cab", "#d08c3f", "#5b9ea6", "#8c8c8c", "#b0a160")
BAR_INCHES = 0.1
LEGEND_INCHES = 1.35  # of one entry
#: How far apart the points of two implementations of one case stand, as a factor.
DODGE = 1.06


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for every implementation, ours first."""
    peers = peers_of(rows)
    return {OURS: OUR_COLOUR} | {name: PEER_COLOURS[i % len(PEER_COLOURS)] for i, name in enumerate(peers)}


def shown(row: Row, name: str) -> float | None:
    """Seconds of an implementation that ran and was right."""
    timing = row["timings"].get(name)
    return timing["median"] if timing is not None and timing["correct"] else None


def panels_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by dtype."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["case"].get("dtype", "")), []).append(row)
    return found


def roofline(results: Mapping[str, Any]) -> Any:
    """FLOP/s over FLOPs a byte, a panel for each dtype: the roof measured in the run, a point for each timing."""
    rows, dram, names = results["results"], results["limits"]["dram_read"], colours(results["results"])
    panels = panels_of(rows)
    size = (max(5.0, 3.6 * len(panels)), 4.4)
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False, sharey=True)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ridges = [row["peak_flops"] / dram for row in rows]
    left, right = min(*intensities, min(ridges) / 2) / 1.6, max(*intensities, *ridges) * 1.6
    for axes, (dtype, panel) in zip(all_axes[0], panels.items(), strict=True):
        peak, peak_name = panel[0]["peak_flops"], panel[0]["peak"]
        ridge = min(max(peak / dram, left), right)
        axes.plot([left, ridge, right], [left * dram / 1e9, min(peak, ridge * dram) / 1e9, peak / 1e9], "k-", lw=1.2)
        for i, (name, colour) in enumerate(names.items()):
            shift = DODGE ** (i - (len(names) - 1) / 2)
            points = [
                (row["flops"] / row["bytes"] * shift, row["flops"] / s / 1e9)
                for row in panel
                if (s := shown(row, name))
            ]
            if points:
                size_of = 26 if name == OURS else 15
                axes.scatter(*zip(*points, strict=True), s=size_of, color=colour, label=name, alpha=0.75, linewidths=0)
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must be read")
        axes.set_title(f"{dtype}: {peak_name}\n{peak / 1e9:.0f} GFLOP/s, DRAM {dram / 1e9:.0f} GB/s", fontsize=8)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(which="major")
    all_axes[0][0].set_ylabel("GFLOP/s")
    add_legend(figure, all_axes[0], title(results))
    return figure


def add_legend(figure: Any, all_axes: Sequence[Any], heading: str, inches: float = LEGEND_INCHES) -> None:
    """One legend of all panels, below the heading, as wide as the figure allows."""
    columns = max(1, int(figure.get_size_inches()[0] / inches))
    entries: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), frameon=False, loc="outside upper center", ncols=columns, title=heading
    )


def lines(results: Mapping[str, Any]) -> Any:
    """The suite ``scaling``: time per token over the length, and the speed of more threads over that of one."""
    by_group = groups(results)
    figure, (lengths, threads) = pyplot.subplots(
        1, 2, figsize=(9, 3.6), layout="constrained", gridspec_kw={"width_ratios": [1.7, 1]}
    )
    operators = list(dict.fromkeys(row["case"]["operator"] for row in results["results"]))
    palette = dict(zip(operators, (OUR_COLOUR, *PEER_COLOURS), strict=False))
    for operator in operators:
        points = [
            (row["case"]["s_kv"], seconds / row["case"]["s_kv"] * 1e9)
            for row in by_group.get(scaling.LENGTHS, [])
            if row["case"]["operator"] == operator and (seconds := shown(row, OURS))
        ]
        if points:
            lengths.plot(*zip(*points, strict=True), "o-", color=palette[operator], label=operator, lw=1.6, ms=4)
    lengths.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ns per token", title="time per token")
    marks = sorted({row["case"]["s_kv"] for row in by_group.get(scaling.LENGTHS, [])})
    lengths.set_xticks(marks, [f"{mark // 1024}k" for mark in marks])
    lengths.xaxis.set_minor_formatter(NullFormatter())
    lengths.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lengths.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else ""))
    lengths.grid(which="both")
    most = 1
    for operator in operators:
        rows = [row for row in by_group.get(scaling.THREADS, []) if row["case"]["operator"] == operator]
        counts = ((row, *count) for row in rows for count in scaling.thread_counts(row["case"]["threads"]).items())
        seconds_of = {n: seconds for row, name, n in counts if (seconds := shown(row, name))}
        if 1 in seconds_of:
            speeds = [(n, seconds_of[1] / seconds) for n, seconds in seconds_of.items()]
            threads.plot(*zip(*speeds, strict=True), "o-", color=palette[operator], label=operator, lw=1.6, ms=4)
            most = max(most, *seconds_of)
    threads.plot([1, most], [1, most], "k--", lw=1, label="as many times the speed")
    threads.set(
        xlabel="threads", ylabel="speed, one thread = 1", title="threads, 4096 tokens", xticks=range(1, most + 1)
    )
    threads.grid()
    add_legend(figure, (lengths, threads), title(results), inches=2 * LEGEND_INCHES)
    return figure


def speed(row: Row, name: str) -> float | None:
    """The limit's time over an implementation's, or ours over it where nothing limits the case."""
    seconds = shown(row, name)
    return seconds and (limit_of(row) or row["timings"][OURS]["median"]) / seconds


def telling(keys: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The keys without those whose value follows from that of a key before them."""
    kept: list[str] = []
    for key in keys:
        pairs = [{(str(row["case"].get(each)), str(row["case"].get(key))) for row in rows} for each in kept]
        if not any(len(found) == len({first for first, _ in found}) for found in pairs):
            kept.append(key)
    return kept


def bars(rows: Sequence[Row], heading: str) -> Any:
    """How near the cases of a group come to their limits, from 0, a panel for each dtype: longer is faster."""
    names, panels = colours(rows), panels_of(rows)
    step = len(names) + 1  # bars of a case and a gap
    height = 1.2 + BAR_INCHES * step * max(len(panel) for panel in panels.values())
    size = (max(7.5, 5.0 * len(panels)), height)
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False, sharex=True)
    keys = telling([key for key in split_keys(rows)[0] if key != "dtype"], rows)
    limited = any(limit_of(row) for row in rows)
    for axes, (dtype, panel) in zip(all_axes[0], panels.items(), strict=True):
        for i, (name, colour) in enumerate(names.items()):
            drawn = [(at * step + i, length) for at, row in enumerate(panel) if (length := speed(row, name))]
            if drawn:
                axes.barh(*zip(*drawn, strict=True), height=0.92, color=colour, label=name)
            for at, length in drawn if limited and name == OURS else ():
                axes.annotate(f" {length:.0%}", (length, at), va="center", fontsize=6.5, color=colour)
        axes.axvline(1, color="black", lw=1)
        labels = [", ".join(f"{key} {row['case'].get(key)}" for key in keys) for row in panel]
        axes.set_yticks([at * step + len(names) / 2 - 0.5 for at in range(len(panel))], labels, fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="share of the limit" if limited else f"speed, {OURS} = 1", title=dtype)
        axes.set_ylim(len(panel) * step - 0.5, -1)
        if limited:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="x")
    add_legend(figure, all_axes[0], heading)
    return figure


def title(results: Mapping[str, Any]) -> str:
    return f"{results['suite']}: {machine_of(results)}"


def draw(results: Mapping[str, Any], folder: Path = DRAWN) -> list[Path]:
    """Write the pictures of one run. A roofline needs FLOPs and bytes in every case."""
    figures = {}
    if results["suite"] == scaling.NAME:
        figures["lines"] = lines(results)
    elif all(row["flops"] and row["bytes"] for row in results["results"]):
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


def draw_all(results: Path = RESULTS, folder: Path = DRAWN, kept: Path = PICTURES) -> None:
    """Write the pictures of all committed results; those that documents show also to the folder ``kept``."""
    runs = load(results)
    for run in runs:
        for path in draw(run, folder):
            print(f"wrote {path}")
    kept.mkdir(parents=True, exist_ok=True)
    for path in report.shown(runs, folder):
        shutil.copy(path, kept)
