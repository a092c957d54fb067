"""Results of a verification: as JSON, and the tables that are made from it: docs/cuda.md and docs/cuda_verify.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cutlass_kernels.tables import markdown, place

#: The summary lies between the marks of this name.
MARK = "cutlass:verify"
#: Beside the document with the summary.
PAGE = Path("cuda_verify.md")
#: Why a kernel does not miss a synchronising instruction: the first of these that its text begins with.
REASONS = {
    "bar.sync 0": "nothing has been shared before it, or another barrier follows before shared memory is touched again",
    "bar.sync %": "another named barrier stands between the same accesses of the epilogue",
    "cp.async.wait_all": "no copy is in flight: past the last tile of k all are predicated off",
    "cp.async.bulk.wait_group": "an earlier wait has released the buffer that is written next",
    "wgmma.fence": "no register of the next product has been written since the fence before",
    "wgmma.wait_group": "fp8 sums are added to float32 ones every few steps, which has waited for all products",
    "mbarrier.arrive": "nobody waits for it: it is for the warp that loads c, and there is no c",
    "mbarrier.try_wait": "the buffer is not filled again (a producer's last waits keep a cluster's blocks alive), or"
    " the wait only keeps two warp groups in turn, which have buffers of their own",
}


@dataclass(frozen=True)
class KernelResult:
    """A kernel. ``state``: "verified", "wrong", "hazards" or "not run", and ``why`` for the last three."""

    name: str
    arch: str
    state: str
    why: str = ""
    cases: int = 0
    exact: int = 0  # cases of small integers without a single mismatch
    error_over_bound: float = 0.0
    hazards: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    registers: int = 0
    counters: dict[str, Any] = field(default_factory=dict)  # of the last case
    mutants: int | None = None
    detected: int | None = None
    undetected: list[str] = field(default_factory=list)
    without_undetected: int = 0  # runs of cases that passed with all of these left out at once


def write(path: Path, results: Iterable[KernelResult], facts: Mapping[str, Any]) -> None:
    """Results by name into a file; those of kernels that were not verified this time stay."""
    known = {row["name"]: row for row in json.loads(path.read_text())["kernels"]} if path.exists() else {}
    known |= {result.name: asdict(result) for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "kernels": [known[name] for name in sorted(known)]}, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def reason(undetected: str) -> str | None:
    """Why a kernel does not miss an instruction, "line N: TEXT"; None if no reason is known."""
    text = undetected.partition(": ")[2]
    return next((why for start, why in REASONS.items() if text.startswith(start)), None)


def mutants(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many instructions were left out, and how many of those verification noticed."""
    surveyed = [row for row in rows if row["mutants"]]
    found, all_of_them = (sum(row[name] for row in surveyed) for name in ("detected", "mutants"))
    return f"{found}/{all_of_them} ({len(surveyed)} kernels)" if surveyed else "–"


def summary(results: Mapping[str, Any]) -> str:
    """Markdown: a row an architecture, family and types."""
    rows = results["kernels"]
    verified = sum(row["state"] == "verified" for row in rows)
    lines = [
        f"{verified} of {len(rows)} kernels verified **in the emulator, not on hardware**: nvcc {results['nvcc']},"
        f" CUTLASS {results['cutlass']}; each alone: [{PAGE}]({PAGE}). Made by `python -m cutlass_kernels verify`.",
        "",
    ]
    header = ["kernels", "verified", "runs", "exact integers", "largest error", "hazards", "mutants found"]
    table = []
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        family = "stream-K" if "_streamk_" in row["name"] else row["name"].split("_")[1]
        kinds.setdefault(f"{row['arch']} {family}", []).append(row)
    for kind, members in kinds.items():
        good = sum(row["state"] == "verified" for row in members)
        cases, exact, hazards = (sum(row[name] for row in members) for name in ("cases", "exact", "hazards"))
        error = max(row["error_over_bound"] for row in members)
        cells = (kind, f"{good} of {len(members)}", cases, exact, f"{error:.2f} of the bound", hazards)
        table.append([*cells, mutants(members)])
    return "\n".join([*lines, markdown(header, table)])


def page(results: Mapping[str, Any]) -> str:
    """docs/cuda_verify.md."""
    rows = results["kernels"]
    lines = [
        "# CUDA kernels, verified in the emulator",
        "",
        "Nothing of this page ran on hardware; [cuda.md](cuda.md#on-a-gpu) says what did. Each case of a kernel runs"
        " with copies landing as early and as late as they"
        ' may; "exact integers" are runs whose result has not one wrong bit. "error" is the largest one over its bound,'
        " 1 ulp of the output + 2^-23 sqrt(k) (\\|A\\| \\|B\\|) for a plain epilogue; what is more for the others, and"
        " for split-K, is in [`problem.py`](../cutlass_kernels/verify/problem.py). Made by"
        f" `python -m cutlass_kernels verify` with nvcc {results['nvcc']} and CUTLASS {results['cutlass']}.",
        "",
    ]
    header = ["kernel", "state", "runs", "exact integers", "error", "hazards", "registers", "mutants found"]
    table = []
    for row in rows:
        found = "–" if row["mutants"] is None else f"{row['detected']}/{row['mutants']}"
        state = row["state"] + (f": {_one_line(row['why'])}" if row["why"] else "")
        counts = (row["cases"], row["exact"], f"{row['error_over_bound']:.2f}", row["hazards"], row["registers"])
        table.append([f"`{row['name']}`", state, *counts, found])
    return "\n".join([*lines, markdown(header, table, texts=2), "", *_undetected(rows)]) + "\n"


def _undetected(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    by_arch: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_arch.setdefault(row["arch"], []).append(row)
    found = ", ".join(f"{mutants(members)} on {arch}" for arch, members in by_arch.items())
    lines = [
        "## Mutants that nothing notices",
        "",
        f"Each wait, barrier, arrival and fence that a kernel executes was left out in turn. Noticed: {found}. The"
        " others of a kernel were then left out all at once, in every one of its cases: results stay right, and the"
        " vector clocks order every two accesses without them: they are redundant there. Why, by the instruction:",
        "",
    ]
    table = []
    for start, why in REASONS.items():
        having = [row for row in rows if any(reason(each) == why for each in row["undetected"])]
        if having:
            runs = sum(row["without_undetected"] for row in having)
            table.append([f"`{start.rstrip(' %')}`", why, len(having), runs])
    header = ["instruction", "reason", "of how many kernels", "runs that passed without all of them"]
    return [*lines, markdown(header, table, texts=2)]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:120]


def update(document: Path, results: Mapping[str, Any]) -> None:
    """Put the summary between the marks of a document, and write the page. Raises `ValueError` without marks."""
    place(document, MARK, summary(results))
    (document.parent / PAGE).write_text(page(results))
