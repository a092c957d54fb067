"""How a launch is executed: what asynchronous work does, what is checked, and which instruction is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: When asynchronous copies and matrix products take effect. All three are timings that a device may show.
Landing = Literal["late", "early", "reversed"]


@dataclass(frozen=True, order=True)
class Site:
    """One synchronising instruction: the kernel's name, the 1-based line of its PTX text, and the text itself."""

    kernel: str
    line: int
    text: str


@dataclass(frozen=True)
class Options:
    """Options of a `Device`.

    ``landing``: "late" lets cp.async, TMA and wgmma take effect only where the program waits for them, and TMA only
    once nothing else can run; "early" at their issue; "reversed" is "late" with the youngest transfer first. A correct
    kernel gives one result under all three.

    ``races``, ``counters``: follow shared-memory ordering with vector clocks; count memory transactions. Both cost
    time.

    ``drop``: synchronising instructions that are left out (a wait that never waits, a barrier that nobody meets, an
    arrival or fence that does not happen); see `mutate`.

    ``max_steps``: basic blocks that one launch may execute before it counts as hung.

    ``max_hazards``: instructions that a kind of hazard is kept for, of those CTAs that run at once.
    """

    landing: Landing = "late"
    races: bool = True
    counters: bool = True
    drop: frozenset[Site] = frozenset()
    max_steps: int = 500_000
    max_hazards: int = 8
