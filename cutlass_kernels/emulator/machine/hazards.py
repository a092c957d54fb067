"""Collects hazards of one launch, one entry for each kind and PTX line."""

from __future__ import annotations

from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.report import Hazard


class Hazards:
    """``at`` is the instruction that runs now; memory and synchronising instructions set it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.at: Instruction | None = None
        self._counts: dict[tuple[str, str, int, str], int] = {}
        self._kinds: dict[str, int] = {}

    def add(self, kind: str, detail: str, count: int = 1) -> None:
        """Note a hazard at the present instruction."""
        line, text = (self.at.line, self.at.text) if self.at else (0, "")
        key = (kind, detail, line, text)
        if key not in self._counts:
            if self._kinds.get(kind, 0) >= self.most:
                return
            self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._counts[key] = self._counts.get(key, 0) + count

    def found(self) -> tuple[Hazard, ...]:
        """The hazards in the order they were met."""
        return tuple(
            Hazard(kind, detail, line, text, count) for (kind, detail, line, text), count in self._counts.items()
        )
