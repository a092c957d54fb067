"""All runs of a machine in one table: how near each suite comes to the limit, and how far the best peer is behind."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.runner import OURS
from cutlass_kernels.tables import markdown

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """Cases of one suite, group and dtype."""

    suite: str
    group: str
    dtype: str
    shares: Sequence[float]  # of the limit, reached by ours; empty where nothing limits the cases
    peers: Sequence[float]  # the same, by the fastest peer of each case
    gains: Sequence[float]  # the fastest peer's time over ours
    cases: int

    @property
    def name(self) -> str:
        return ", ".join(
            filter(None, (self.suite, self.group if self.group not in ("grid", self.dtype) else "", self.dtype))
        )


def limit_of(row: Row) -> float:
    """Seconds that the machine needs at least."""
    return float(max(row["compute_limit"], row["memory_limit"]))


def best_peer(row: Row) -> Mapping[str, Any] | None:
    """The fastest peer with a correct result."""
    correct = (timing for name, timing in row["timings"].items() if name != OURS and timing["correct"])
    return min(correct, key=lambda timing: timing["median"], default=None)


def lines_of(results: Mapping[str, Any]) -> list[Line]:
    """The lines of one run; cases that are wrong are left out."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in results["results"]:
        if row["timings"][OURS]["correct"]:
            # Eager and compiled steps of a whole model are two matters.
            group = str(row["case"].get("group") or row["case"].get("mode", ""))
            grouped.setdefault((group, str(row["case"].get("dtype", ""))), []).append(row)
    lines = []
    for (group, dtype), rows in grouped.items():
        ours = [row["timings"][OURS]["median"] for row in rows]
        best = [best_peer(row) for row in rows]
        limited = all(limit_of(row) for row in rows)
        pairs = [(row, peer) for row, peer in zip(rows, best, strict=True) if peer is not None]
        lines.append(
            Line(
                results["suite"],
                group,
                dtype,
                [limit_of(row) / seconds for row, seconds in zip(rows, ours, strict=True)] if limited else [],
                [limit_of(row) / peer["median"] for row, peer in pairs] if limited else [],
                [peer["median"] / row["timings"][OURS]["median"] for row, peer in pairs],
                len(rows),
            )
        )
    return lines


def machine_of(results: Mapping[str, Any]) -> str:
    host = results["host"]
    return f"{host['microarchitecture']}, {host['instruction_set']}, {host['threads']} threads"


def by_machine(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each machine, the machine with the most suites first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault(machine_of(run), []).append(run)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def spread(values: Sequence[float], form: str) -> str:
    """``median (least to most)``, or a dash for nothing."""
    if not values:
        return "–"
    if len(values) == 1:
        return form.format(values[0])
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.median(values))} ({low} to {high})"


def table(runs: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """Markdown: one machine's suites, or of their lines those of these ``names``."""
    header = ["suite", "cases", "share of the limit", "the best peer's share", "best peer's time over ours"]
    rows = []
    for line in (line for run in runs for line in lines_of(run) if not names or line.name in names):
        cells = [
            line.name,
            str(line.cases),
            spread(line.shares, "{:.0%}"),
            spread(line.peers, "{:.0%}"),
            spread(line.gains, "{:.1f}x"),
        ]
        rows.append(cells)
    return markdown(header, rows)
