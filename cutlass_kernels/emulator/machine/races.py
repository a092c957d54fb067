"""Shared-memory accesses that nothing orders, word by word.

A word is four bytes. Two accesses narrower than a word by different warps are not compared with each other, as they may
touch different halves; accesses within one warp are taken to be ordered. Both are among the limits that the package
names.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator.machine.clocks import Clocks, Ints
from cutlass_kernels.emulator.machine.hazards import Hazards
from cutlass_kernels.emulator.ptx.types import Array

#: How a word was written. cp.async writes through the generic proxy, whoever says that it is done.
_ATOMIC, _NARROW, _GENERIC_COPY = 1, 2, 4


class Races:
    """Stamps of the last accesses to each of ``words`` shared words, checked against `Clocks`."""

    def __init__(self, words: int, clocks: Clocks, hazards: Hazards) -> None:
        self.clocks, self.hazards = clocks, hazards
        # The last writer's agent + 1 (0: nobody) and its clock then; how it wrote.
        self.writer = np.zeros(words, np.int16)
        self.written_at = np.zeros(words, np.int32)
        self.manner = np.zeros(words, np.uint8)
        self.read_at = np.zeros((words, clocks.warps), np.int32)
        # Unfinished copies that write a word; unfinished matrix products and stores that read it.
        self.landing = np.zeros(words, np.int16)
        self.pinned = np.zeros(words, np.int16)
        self._copies = self._pins = 0

    def read(self, words: Ints, domain: Ints, warp: Ints) -> None:
        """Warps read [accesses, k] words; ``domain`` and ``warp`` are [accesses, 1]."""
        self._against_writes(words, domain, warp, "read")
        self._against_copies(words, "read")
        self.read_at[words, warp] = self.clocks.own(domain, warp)

    def write(self, words: Ints, domain: Ints, warp: Ints, *, narrow: bool = False, atomic: bool = False) -> None:
        """Warps write [accesses, k] words; ``narrow``: less than a word each; ``atomic``: a read-modify-write."""
        manner = (_ATOMIC if atomic else 0) | (_NARROW if narrow else 0)
        excused = (self.manner[words] & manner) != 0 if manner else None
        self._against_writes(words, domain, warp, "write", excused)
        self._against_reads(words, domain, warp)
        self._against_copies(words, "write")
        if self._pins and (hit := self.pinned[words] > 0).any():
            self.hazards.add("in flight", "a write to shared memory that an unfinished operation reads", int(hit.sum()))
        self.writer[words] = warp + 1
        self.written_at[words] = self.clocks.own(domain, warp)
        self.manner[words] = manner
        if not manner and (others := self.writer[words] != warp + 1).any():
            self.hazards.add("race", "two warps write one word of shared memory", int(others.sum()))

    def async_read(self, words: Ints, domain: int, warps: Ints) -> None:
        """The asynchronous proxy is asked by ``warps`` to read ``words`` now or later."""
        know = self.clocks.know[:, domain, warps].min(axis=1)
        agent = self.writer[words].astype(np.int64) - 1
        written, clock = agent >= 0, self.written_at[words]
        unordered = written & (know[0][agent] < clock)
        if unordered.any():
            self.hazards.add("race", "an asynchronous read of a word that another agent writes", int(unordered.sum()))
        generic = (agent < self.clocks.warps) | (self.manner[words] == _GENERIC_COPY)
        unfenced = written & ~unordered & generic & (know[1][agent] < clock)
        if unfenced.any():
            self.hazards.add(
                "proxy", "asynchronous read of a generic write without fence.proxy.async", int(unfenced.sum())
            )
        self._against_copies(words, "asynchronous read")
        self.pinned[words] += 1
        self._pins += 1

    def async_read_done(self, words: Ints, domain: int, warps: Ints) -> None:
        """The read that `async_read` announced is over, and ``warps`` know it."""
        self.pinned[words] -= 1
        self._pins -= 1
        self.read_at[words, warps[0]] = self.clocks.share(domain, warps)

    def async_write(self, words: Ints, domain: Ints, warp: Ints) -> None:
        """Copies that will write [accesses, k] words start; each is ordered where its warp is."""
        self._against_writes(words, domain, warp, "asynchronous write")
        self._against_reads(words, domain, warp)
        self._against_copies(words, "asynchronous write")
        if self._pins and (hit := self.pinned[words] > 0).any():
            self.hazards.add(
                "in flight", "a copy into shared memory that an unfinished operation reads", int(hit.sum())
            )
        self.landing[words] += 1
        self._copies += words.size

    def async_write_done(self, words: Ints, agent: Ints | int, clock: Array | int, *, generic: bool = False) -> None:
        """Copies are over: from now on the words were written by ``agent`` at ``clock``; ``generic``: by cp.async."""
        self.landing[words] = 0
        self._copies -= words.size
        self.writer[words] = agent + 1
        self.written_at[words] = clock
        self.manner[words] = _GENERIC_COPY if generic else 0

    def _against_writes(
        self, words: Ints, domain: Ints, warp: Ints, what: str, excused: NDArray[np.bool_] | None = None
    ) -> None:
        agent = self.writer[words].astype(np.int64) - 1
        unordered = (agent >= 0) & (self.clocks.know[0][domain, warp, agent] < self.written_at[words])
        if excused is not None:
            unordered &= ~excused
        if unordered.any():
            self.hazards.add("race", f"a {what} of a word that another agent writes", int(unordered.sum()))

    def _against_reads(self, words: Ints, domain: Ints, warp: Ints) -> None:
        known = self.clocks.know[0][domain, warp, : self.clocks.warps]
        unordered = (self.read_at[words] > known).any(axis=-1)
        if unordered.any():
            self.hazards.add("race", "a write of a word that another warp reads", int(unordered.sum()))

    def _against_copies(self, words: Ints, what: str) -> None:
        if self._copies and (hit := self.landing[words] > 0).any():
            self.hazards.add("in flight", f"a {what} of shared memory that an unfinished copy writes", int(hit.sum()))
