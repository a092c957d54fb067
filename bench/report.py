"""Tables from results: Markdown, written between markers, never typed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.runner import OURS, ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
NO_RESULTS = "No results yet: `make bench` writes them."


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All committed results, quick ones left out, in the order of their file names."""
    files = sorted(path for path in folder.glob("*.json") if not path.stem.endswith("-quick"))
    return [json.loads(path.read_text()) for path in files]


def disturbed(*timings: Mapping[str, Any]) -> str:
    """``~`` if other load disturbed any of these, so that CPU time stands in for wall time."""
    return "" if all(timing["clean"] for timing in timings) else "~"


def milliseconds(timing: Mapping[str, Any] | None) -> str:
    """``1.23 ± 0.04``: the median and half the interquartile range, in milliseconds."""
    if timing is None:
        return "absent"
    if not timing["correct"]:
        return "wrong"
    return f"{disturbed(timing)}{timing['median'] * 1e3:.3g} ± {(timing['q3'] - timing['q1']) / 2 * 1e3:.1g}"


def table(results: Mapping[str, Any]) -> str:
    """One run as Markdown: where it ran, its limits, and a row for each case."""
    rows: Sequence[Mapping[str, Any]] = results["results"]
    peers = [
        name for name in dict.fromkeys(n for row in rows for n in (*row["timings"], *row["skipped"])) if name != OURS
    ]
    header = ["b", "h_q", "s_kv", "dtype", "limit", OURS, "of peak", *peers, "faster than the best peer"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    for row in rows:
        timings, case = row["timings"], row["case"]
        ours = timings[OURS]
        best = min(
            (timings[p] for p in peers if p in timings and timings[p]["correct"]),
            key=lambda timing: timing["median"],
            default=None,
        )
        cells = [
            *(str(case[name]) for name in ("b", "h_q", "s_kv", "dtype")),
            f"{max(row['compute_limit'], row['memory_limit']) * 1e3:.3g}",
            milliseconds(ours),
            disturbed(ours) + f"{ours['fraction_of_peak']:.0%}",
            *(milliseconds(timings.get(peer)) for peer in peers),
            "" if best is None else disturbed(ours, best) + f"{best['median'] / ours['median']:.2f}x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return heading(results) + "\n\n" + "\n".join(lines)


def heading(results: Mapping[str, Any]) -> str:
    host, limits, versions = results["host"], results["limits"], results["versions"]
    peaks = f"fp32 multiply-add {limits['fp32_flops'] / 1e9:.0f} GFLOP/s ({limits['instruction_set']})"
    if limits["bf16_flops"] is not None:
        peaks += f", vdpbf16ps {limits['bf16_flops'] / 1e9:.0f} GFLOP/s"
    return (
        f"`{results['suite']}`, ms a call (median ± half the interquartile range; `~`: CPU time of the busiest thread,"
        f" where other load disturbed the wall time). {host['cpu']}, {host['threads']} threads,"
        f" torch {versions['torch']}, commit {results['commit'][:12]}, {results['date'][:10]}."
        f" Limits measured in the same run: {peaks}, DRAM read {limits['dram_read'] / 1e9:.0f} GB/s."
        ' "limit" is the larger of FLOPs over peak and cache bytes over DRAM bandwidth; "of peak" is of peak FLOP/s.'
        f" Made by `{results['command']}`."
    )


def markers(suite: str) -> tuple[str, str]:
    return f"<!-- bench:{suite} begin -->", f"<!-- bench:{suite} end -->"


def between_markers(text: str, suite: str, content: str) -> str:
    """``text`` with ``content`` between the suite's markers; raises ValueError if the markers are not there."""
    begin, end = markers(suite)
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"no {begin} ... {end} to write between")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def write_tables(path: Path = README, folder: Path = RESULTS, suites: Sequence[str] = ("decode",)) -> None:
    """Bring the tables of ``path`` up to date with the results."""
    text, runs = path.read_text(), load(folder)
    for suite in suites:
        tables = [table(run) for run in runs if run["suite"] == suite]
        text = between_markers(text, suite, "\n\n".join(tables) or NO_RESULTS)
    path.write_text(text)
