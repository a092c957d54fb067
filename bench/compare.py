"""The changes between two results of one suite: differences beyond noise, as far as the quartiles tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.runner import OURS
from cutlass_kernels.tables import markdown

#: Less than this is no change, however quiet both runs were.
SMALLEST_CHANGE = 0.02


@dataclass(frozen=True)
class Change:
    case: Mapping[str, Any]
    name: str  # the implementation
    old: Mapping[str, Any]  # timings
    new: Mapping[str, Any]

    @property
    def ratio(self) -> float:
        """New time over old time."""
        return float(self.new["median"] / self.old["median"])

    @property
    def beyond_noise(self) -> bool:
        """Whether the two interquartile ranges lie apart, and that by more than `SMALLEST_CHANGE`."""
        apart = self.new["q1"] > self.old["q3"] or self.new["q3"] < self.old["q1"]
        return apart and abs(self.ratio - 1) > SMALLEST_CHANGE

    @property
    def broken(self) -> bool:
        return bool(self.old["correct"] and not self.new["correct"])

    @property
    def verdict(self) -> str:
        if self.broken:
            return "wrong now"
        if not self.beyond_noise:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every implementation of every case that both have. Raises ValueError if the runs cannot be compared."""
    for key, both in (
        ("suite", (old["suite"], new["suite"])),
        *((key, (old["host"][key], new["host"][key])) for key in ("microarchitecture", "instruction_set", "threads")),
    ):
        if both[0] != both[1]:
            raise ValueError(f"results of different {key} cannot be compared: {both[0]} and {both[1]}")
    before = {case_key(row): row["timings"] for row in old["results"]}
    return [
        Change(row["case"], name, before[case_key(row)][name], timing)
        for row in new["results"]
        for name, timing in row["timings"].items()
        if name in before.get(case_key(row), {})
    ]


def case_key(row: Mapping[str, Any]) -> str:
    return json.dumps(row["case"], sort_keys=True)


def regressions(changes: Sequence[Change]) -> list[Change]:
    """Ours that are slower or wrong now. Peers are shown, and tell how alike the two runs' machines were."""
    return [change for change in changes if change.name == OURS and change.verdict in ("slower", "wrong now")]


def table(changes: Sequence[Change]) -> str:
    """Markdown: what changed, with a count of what did not."""
    header = ["case", "implementation", "old ms", "new ms", "new / old", "verdict"]
    rows = []
    changed = [change for change in changes if change.verdict != "same"]
    for change in sorted(changed, key=lambda change: (change.name != OURS, -change.ratio)):
        marks = ["" if timing["clean"] else "~" for timing in (change.old, change.new)]
        cells = [
            ", ".join(f"{key} {value}" for key, value in change.case.items()),
            change.name,
            f"{marks[0]}{change.old['median'] * 1e3:.4g}",
            f"{marks[1]}{change.new['median'] * 1e3:.4g}",
            f"{change.ratio:.2f}",
            change.verdict,
        ]
        rows.append(cells)
    count = f"{len(changes)} timings compared, {len(changes) - len(changed)} the same."
    return f"{markdown(header, rows, texts=2)}\n\n{count}" if changed else count
