"""The report of a check: sections of rows, in a JSON file that is whole at any moment, and a table of it."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]


@dataclass
class Report:
    """``deadline``: when the check must have ended, on the clock of `time.monotonic`. ``path``: None writes nothing."""

    path: Path | None
    deadline: float
    facts: Row = field(default_factory=dict)
    sections: dict[str, list[Row]] = field(default_factory=dict)

    def late(self, reserve: float = 0.0) -> bool:
        """Whether less than ``reserve`` seconds are left."""
        return time.monotonic() + reserve >= self.deadline

    def add(self, section: str, row: Row) -> None:
        self.sections.setdefault(section, []).append(row)
        print(f"{section}: {one_line(row)}", flush=True)
        self.write()

    def write(self) -> None:
        """Replace the file by one rename."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as handle:
            json.dump(self.facts | {"sections": self.sections}, handle, indent=1)
            handle.write("\n")
        Path(handle.name).chmod(0o644)
        Path(handle.name).replace(self.path)

    def until_late(self, section: str, items: Iterable[Any], reserve: float) -> Iterator[Any]:
        """The items, as long as there is time; a last row counts those that are left out."""
        left = list(items)
        while left:
            if self.late(reserve):
                self.add(section, {"name": f"{len(left)} more", "state": "left out", "why": "the time was up"})
                return
            yield left.pop(0)

    @property
    def failures(self) -> list[Row]:
        return [row for rows in self.sections.values() for row in rows if row.get("state") == "failed"]


def one_line(row: Row) -> str:
    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    name = str(row.get("name", ""))
    rest = (f"{key} {short(value)}" for key, value in row.items() if key != "name" and value not in (None, ""))
    return "  ".join([name, *rest])


def one_paragraph(error: Exception) -> str:
    """The beginning of an error's message: torch's often says what happened in its third line."""
    return " ".join(str(error).split())[:300]


def table(report: Report) -> str:
    """A line a section: how many rows passed, failed, were left out or have no verdict."""
    lines = []
    for section, rows in report.sections.items():
        states = [row.get("state", "measured") for row in rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        lines.append((section, counts))
    return tabulate(lines, tablefmt="plain")


def file_name(device: str) -> str:
    """``gpu-check-nvidia-h100-80gb-hbm3.json``: a file a device."""
    return f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
