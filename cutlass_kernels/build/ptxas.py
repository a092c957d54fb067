"""The report of ptxas on a compilation, and the faults in it that may not ship."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?used (\d+) barriers)?(?:.*?(\d+) bytes smem)?")
_SERIALISED = re.compile(r"\(?C7510\)?|wgmma\.mma_async instructions are serialized")


@dataclass(frozen=True)
class EntryReport:
    """One ``__global__`` function. Bytes are a thread's (stack, spills) and a block's (static shared memory)."""

    entry: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int = 0


@dataclass(frozen=True)
class Report:
    entries: tuple[EntryReport, ...]
    serialised_wgmma: int

    def faults(self) -> list[str]:
        """Why the kernel may not ship: each of these costs more than any choice of tile can win back."""
        found = ["no entry function in ptxas's report"] if not self.entries else []
        for entry in self.entries:
            if entry.spill_stores or entry.spill_loads:
                found.append(
                    f"spills {entry.spill_stores} bytes out, {entry.spill_loads} in ({entry.registers} registers)"
                )
            elif entry.stack:
                found.append(f"{entry.stack} bytes of local memory")
        if self.serialised_wgmma:
            found.append(f"serialised wgmma (C7510), {self.serialised_wgmma} times")
        return found


def parse(text: str) -> Report:
    """The report in what ``nvcc -Xptxas -v`` writes to stderr."""
    entries = []
    for block in re.split(r"(?=ptxas info\s+: Compiling entry function)", text):
        entry, stack, used = _ENTRY.search(block), _STACK.search(block), _USED.search(block)
        if entry and stack and used:
            sizes = [int(group) for group in stack.groups()]
            shared = int(used[3] or 0)
            entries.append(EntryReport(entry[1], entry[2], int(used[1]), sizes[0], sizes[1], sizes[2], shared))
    serialised = sum(1 for line in text.splitlines() if _SERIALISED.search(line))
    return Report(tuple(entries), serialised)
