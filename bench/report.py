"""Tables from results: Markdown, generated, never typed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import footprints, occupancy, programs, summary
from bench.runner import OURS, ROOT, file_name
from bench.summary import best_peer, limit_of
from cutlass_kernels.tables import markdown, place

README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "bench.md"
#: All pictures, which git ignores, and those of them that documents show.
DRAWN = ROOT / "bench" / "pictures"
PICTURES = ROOT / "docs" / "bench"
RESULTS = ROOT / "bench" / "results"
#: The table in the README lies between the marks of this name.
MARK = "bench"
NO_RESULTS = "No results yet: `make bench` writes them."
#: The pictures that documents show, of the machine with the most suites.
SHOWN = (("decode", "roofline"), ("scaling", "lines"), ("end_to_end", "bars"))
#: The README's lines, by the names of `bench.summary.Line`, of the machine with the most suites.
HEADLINES = (
    "decode, bf16",
    "decode, fp32",
    "prefill, bf16",
    "gqa_decode, bf16",
    "small_gemm, gemm, bf16",
    "end_to_end, compiled, bf16",
)
INTRODUCTION = """# The bench

Written by `make bench` from [`bench/results`](../bench/results); nothing here is typed. Every timed result was checked
against float64. [CONTRIBUTING.md](../CONTRIBUTING.md) says how we time."""

SHARES = """"Share of the limit" is the time that the machine needs at least, by limits measured in the same run, over
the time of a call: median over the cases of a suite (least to most). The best peer is, in each case, the fastest of
those that `make bench-peers` installs and that computed the right result, on the same pages through the same table; in
`decode_up`, `decode_shapes`, `scaling` and `dist` it is our own kernels instead, as two calls, in the usual shape, on
fewer threads and in one process."""

Row = Mapping[str, Any]


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All committed results of suites, quick ones left out, in the order of their file names."""
    files = sorted(path for path in folder.glob("*.json") if not path.stem.endswith("-quick"))
    found = [json.loads(path.read_text()) for path in files]
    # Verifications, checks of a GPU and servers under load are no suites of a machine.
    return [results for results in found if "suite" in results and "host" in results]


def group_of(row: Row) -> str:
    return str(row["case"].get("group", ""))


def groups(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows by their group, in the order in which they ran."""
    found: dict[str, list[Row]] = {}
    for row in results["results"]:
        found.setdefault(group_of(row), []).append(row)
    return found


def peers_of(rows: Iterable[Row]) -> list[str]:
    """The peers that ran in any of these rows."""
    return [name for name in dict.fromkeys(name for row in rows for name in row["timings"]) if name != OURS]


def limited_by(row: Row) -> str:
    return "compute" if row["compute_limit"] >= row["memory_limit"] else "memory"


def split_keys(rows: Sequence[Row]) -> tuple[list[str], dict[str, Any]]:
    """The keys of the cases whose values differ, and the others with the value that they have everywhere."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row["case"]) if key != "group"]
    values = {key: [row["case"].get(key) for row in rows] for key in keys}
    differing = [key for key in keys if any(value != values[key][0] for value in values[key])]
    return differing, {key: values[key][0] for key in keys if key not in differing}


@dataclass(frozen=True)
class Unit:
    name: str
    seconds: float

    def show(self, seconds: float, digits: int = 3) -> str:
        """With so many digits that count, and never with an exponent for being large."""
        value = seconds / self.seconds
        return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def unit_of(rows: Sequence[Row]) -> Unit:
    """Milliseconds, or microseconds where none of ours takes as much as one."""
    longest = max(row["timings"][OURS]["median"] for row in rows)
    return Unit("ms", 1e-3) if longest >= 1e-3 else Unit("µs", 1e-6)


def disturbed(*timings: Mapping[str, Any]) -> str:
    """``~`` if other load disturbed any of these, so that CPU time stands in for wall time."""
    return "" if all(timing["clean"] for timing in timings) else "~"


def duration(timing: Mapping[str, Any] | None, unit: Unit) -> str:
    """``1.23 ± 0.04``: the median and half the interquartile range."""
    if timing is None:
        return "–"
    if not timing["correct"]:
        return "wrong"
    half = (timing["q3"] - timing["q1"]) / 2
    return f"{disturbed(timing)}{unit.show(timing['median'])} ± {unit.show(half, 1)}"


def table(rows: Sequence[Row]) -> str:
    """Cases of one group as Markdown: a row for each, columns for what differs between them."""
    differing, constant = split_keys(rows)
    unit, peers = unit_of(rows), peers_of(rows)
    limited, computes = any(limit_of(row) for row in rows), any(row["flops"] for row in rows)
    header = [*differing, *(["limit", "limited by"] if limited else []), OURS]
    header += [*(["of peak"] if computes else []), *(["of DRAM"] if limited else []), *peers]
    header += [f"best peer / {OURS}"] if peers else []
    lines = []
    for row in rows:
        ours, best = row["timings"][OURS], best_peer(row)
        mark = disturbed(ours)
        cells = [str(row["case"].get(name)) for name in differing]
        cells += [unit.show(limit_of(row)), limited_by(row)] if limited else []
        cells += [duration(ours, unit)]
        cells += [f"{mark}{ours['fraction_of_peak']:.0%}"] if computes else []
        cells += [f"{mark}{row['memory_limit'] / ours['median']:.0%}"] if limited else []
        cells += [duration(row["timings"].get(peer), unit) for peer in peers]
        if peers:
            cells.append("" if best is None else disturbed(ours, best) + f"{best['median'] / ours['median']:.2f}x")
        lines.append(cells)
    notes = [f"Times in {unit.name}."]
    if constant:
        notes.append("In all cases: " + ", ".join(f"{key} {value}" for key, value in constant.items()) + ".")
    notes += [f"{name}: {reason}." for name, reason in reasons(rows)]
    return " ".join(notes) + "\n\n" + markdown(header, lines, texts=0)


def reasons(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Why peers are missing, each reason once."""
    return list(dict.fromkeys((name, reason) for row in rows for name, reason in row["skipped"].items()))


def peaks(limits: Mapping[str, Any]) -> str:
    """The measured limits in words."""
    words = f"fp32 multiply-add {limits['fp32_flops'] / 1e9:.0f} GFLOP/s ({limits['instruction_set']})"
    if limits["bf16_flops"] is not None:
        words += f", vdpbf16ps {limits['bf16_flops'] / 1e9:.0f} GFLOP/s"
    for name, key in (("L2", "l2_read"), ("L3", "l3_read"), ("DRAM", "dram_read")):
        if limits.get(key) is not None:
            words += f", {name} read {limits[key] / 1e9:.0f} GB/s"
    return words


def heading(results: Mapping[str, Any]) -> str:
    host, versions = results["host"], results["versions"]
    # Older results have one DRAM bandwidth, that of the run.
    beside = " measured beside the case" if all("dram_read" in row for row in results["results"]) else ""
    return (
        f"`{results['suite']}`: time of a call, median ± half the interquartile range (`~`: CPU time of the busiest"
        f" thread, where other load disturbed the wall time). {host['microarchitecture']} ({host['cpu']}),"
        f" {host['threads']} threads,"
        f" torch {versions['torch']}, commit {results['commit'][:12]}, {results['date'][:10]}."
        f" Limits measured in the same run: {peaks(results['limits'])}."
        f' "limit" is the larger of FLOPs over peak and bytes over DRAM bandwidth{beside}, where bytes are what must be'
        ' read once; "of peak" is of peak FLOP/s, "of DRAM" of its bandwidth.'
        f" Made by `{results['command']}`."
    )


def picture(results: Mapping[str, Any], kind: str, folder: Path = PICTURES) -> Path:
    """Where a picture of a run lies."""
    return folder / f"{Path(file_name(results, quick=False)).stem}-{kind}.svg"


def shown(runs: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Where the pictures that documents show lie in a folder."""
    for of_machine in summary.by_machine(runs).values():
        return [picture(run, kind, folder) for suite, kind in SHOWN for run in of_machine if run["suite"] == suite]
    return []


def bars_of(group: str) -> str:
    """The kind of picture that shows the cases of a group."""
    return "-".join(["bars", *re.findall(r"[a-z0-9]+", group.lower())])


def link(path: Path, beside: Path) -> list[str]:
    """Markdown of a picture for a document in the folder ``beside``; nothing if it is not there."""
    return [f"![{path.stem}]({os.path.relpath(path, beside)})"] if path.exists() else []


def chapter(results: Mapping[str, Any], beside: Path, pictures: Path = PICTURES) -> str:
    """One run: where it ran, its limits, and a table for each group, with the pictures that there are."""
    parts = [heading(results)]
    for kind in ("roofline", "lines"):
        parts += link(picture(results, kind, pictures), beside)
    for name, rows in groups(results).items():
        parts += [f"**{name}**"] if name else []
        parts.append(table(rows))
        parts += link(picture(results, bars_of(name), pictures), beside)
    if results.get("footprints"):
        parts.append(footprints.table(results["footprints"]))
    if results.get("occupancy"):
        parts.append(occupancy.table(results["occupancy"]))
    if results.get("programs"):
        parts.append(programs.table(results["programs"]))
    return "\n\n".join(parts)


def headlines(runs: Sequence[Mapping[str, Any]]) -> str:
    """A few lines of the machine with the most suites."""
    for machine, of_machine in summary.by_machine(runs).items():
        return f"**{machine}**, torch {of_machine[-1]['versions']['torch']}\n\n{summary.table(of_machine, HEADLINES)}"
    return NO_RESULTS


def overview(runs: Sequence[Mapping[str, Any]], beside: Path, pictures: Path = PICTURES) -> str:
    """All runs in short: a table for each machine, and pictures of the one with the most suites."""
    parts = [SHARES]
    for machine, of_machine in summary.by_machine(runs).items():
        commits = sorted({run["commit"][:12] for run in of_machine})
        dates = sorted({run["date"][:10] for run in of_machine})
        limits = of_machine[-1]["limits"]
        about = f"torch {of_machine[-1]['versions']['torch']}, {' and '.join(dates)}, commit {' and '.join(commits)}"
        parts.append(f"**{machine}** ({about}; {peaks(limits)}).")
        parts.append(summary.table(of_machine))
    parts[3:3] = [line for path in shown(runs, pictures) for line in link(path, beside)]
    return "\n\n".join(parts)


def write_tables(readme: Path = README, document: Path = DOCUMENT, folder: Path = RESULTS) -> None:
    """Bring the README's table and the whole of ``document`` up to date with the results."""
    runs = load(folder)
    place(readme, MARK, headlines(runs))
    chapters = [f"## {run['suite']}\n\n{chapter(run, document.parent)}" for run in runs]
    parts = [INTRODUCTION, overview(runs, document.parent), *chapters] if chapters else [INTRODUCTION, NO_RESULTS]
    document.write_text("\n\n".join(parts) + "\n")
