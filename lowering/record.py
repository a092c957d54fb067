"""The record of the passes over one graph: every rewrite made, and every one refused with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lowering.names import said
from lowering.settings import Settings


class Refusal(Exception):
    """Why a candidate is left alone."""


@dataclass(frozen=True)
class Decision:
    """One place where a pattern was recognised. ``reason`` says why it was refused; it is empty for a rewrite."""

    pattern: str
    node: str
    rewritten: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.pattern} at {self.node}: {'rewritten' if self.rewritten else f'left alone: {self.reason}'}"


@dataclass
class Record:
    """The decisions about one graph, in the order they were made, and the settings they were made under.

    ``names`` are what users call the graph's inputs: reasons say them in place of the graph's own.
    """

    settings: Settings = field(default_factory=Settings)
    decisions: list[Decision] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def rewrote(self, pattern: str, node: object) -> None:
        self.decisions.append(Decision(said(pattern, self.names), str(node), rewritten=True))

    def refused(self, pattern: str, node: object, reason: str) -> None:
        self.decisions.append(Decision(pattern, str(node), rewritten=False, reason=said(reason, self.names)))

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)
