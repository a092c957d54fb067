"""Results of a verification: as JSON, and as the table of the README, which is made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- cutlass:verify begin -->", "<!-- cutlass:verify end -->"


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


def table(results: Mapping[str, Any]) -> str:
    """Markdown."""
    rows = results["kernels"]
    verified = sum(row["state"] == "verified" for row in rows)
    lines = [
        f"{verified} of {len(rows)} kernels verified **in the emulator, not on hardware**: nvcc {results['nvcc']},"
        f" CUTLASS {results['cutlass']}. Each case runs with copies landing as early and as late as they may."
        ' "error" is the largest one over its bound: 1 ulp of the output + 2^-23 sqrt(k) (\\|A\\| \\|B\\|), see'
        " [`problem.py`](cutlass_kernels/verify/problem.py). Made by `python -m cutlass_kernels verify`.",
        "",
        "| kernel | state | cases | exact integers | error | hazards | registers | mutants found |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mutants = "–" if row["mutants"] is None else f"{row['detected']}/{row['mutants']}"
        state = row["state"] + (f": {_one_line(row['why'])}" if row["why"] else "")
        lines.append(
            f"| `{row['name']}` | {state} | {row['cases']} | {row['exact']} | {row['error_over_bound']:.2f} |"
            f" {row['hazards']} | {row['registers']} | {mutants} |"
        )
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:120]


def update(document: Path, results: Mapping[str, Any]) -> None:
    """Put the table between the markers of a document. Raises `ValueError` without them."""
    text = document.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{document}: expected one {BEGIN} and one {END}")
    pattern = re.escape(BEGIN) + r".*?" + re.escape(END)
    document.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n{table(results)}\n{END}", text, flags=re.DOTALL))
