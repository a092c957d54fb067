"""Global memory between warps: which writes a read is ordered after, through flags that somebody released.

A write by one warp may be read by another only after an order between them: a barrier of their CTA, or a flag in global
memory that the first one releases after the write and the second one acquires before the read (PTX ISA, "Memory
consistency model"). A release is an operation with .release, or a strong write after a fence of scope gpu or sys; an
acquire is one with .acquire, or a strong read before such a fence. A relaxed read-modify-write acquires too: CUTLASS's
stream-K takes its flags with atomicCAS, and devices perform it where the flag's writes have been performed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator.machine.clocks import Clocks, Ints
from cutlass_kernels.emulator.machine.hazards import Hazards

#: How an access to memory is ordered: "weak" is an ordinary one, the others are strong.
Order = Literal["weak", "relaxed", "acquire", "release", "acq_rel"]
_NEVER = np.iinfo(np.int32).max
_STRONG, _NARROW = 1, 2


class Visibility:
    """Stamps of the last write to each of ``words`` words of global memory, checked against what warps know."""

    def __init__(self, words: int, clocks: Clocks, hazards: Hazards) -> None:
        self.clocks, self.hazards = clocks, hazards
        # The last writer + 1 among all warps (0: nobody), its clock then, and how it wrote.
        self.writer = np.zeros(words, np.int32)
        self.written_at = np.zeros(words, np.int32)
        self.manner = np.zeros(words, np.uint8)
        #: The knowledge that an acquire of each word gives.
        self._published: dict[int, NDArray[np.int32]] = {}
        domains, warps = clocks.domains, clocks.warps
        # The knowledge that each warp's later strong writes publish since its last fence, and its clock at that fence.
        self._fenced = np.zeros((domains, warps, clocks.far), np.int32)
        self._fenced_at = np.full((domains, warps), _NEVER, np.int32)
        # The knowledge that each warp has read strongly, and has from its next fence on.
        self._seen = np.zeros((domains, warps, clocks.far), np.int32)

    def access(
        self, words: Ints, domain: Ints, warp: Ints, order: Order, *, reads: bool, writes: bool, narrow: bool
    ) -> None:
        """Accesses to [accesses, k] words by warps [accesses]; both ``reads`` and ``writes``: a read-modify-write.

        ``narrow``: to less than a word each. Two strong accesses never race, two narrow ones are not compared.
        """
        if order != "weak":
            self._synchronise(words[:, 0], domain, warp, order, reads=reads, writes=writes)
        last = self.writer[words].astype(np.int64) - 1
        known = self.clocks.of_all(domain[:, None], warp[:, None], last)
        manner = (_STRONG if order != "weak" else 0) | (_NARROW if narrow else 0)
        unordered = (last >= 0) & (known < self.written_at[words]) & (self.manner[words] & manner == 0)
        if unordered.any():
            what = "write" if writes else "read"
            self.hazards.add("race", f"a {what} of global memory that another warp writes", int(unordered.sum()))
        if writes:
            agent = (domain * self.clocks.warps + warp)[:, None] + 1
            self.writer[words] = agent
            self.written_at[words] = self.clocks.own(domain, warp)[:, None]
            self.manner[words] = manner
            if not manner and (others := self.writer[words] != agent).any():
                self.hazards.add("race", "two warps write one word of global memory", int(others.sum()))

    def fence(self, domain: Ints, warp: Ints) -> None:
        """A fence by warps: what they have read strongly is acquired, and what they know may be published."""
        self.clocks.acquire_far(domain, warp, self._seen[domain, warp])
        self._fenced_at[domain, warp] = self.clocks.own(domain, warp)
        self._fenced[domain, warp] = self.clocks.release(domain, warp)[0][:, self.clocks.near :]

    def _synchronise(self, words: Ints, domain: Ints, warp: Ints, order: Order, *, reads: bool, writes: bool) -> None:
        for word, d, w in zip(words.tolist(), domain.tolist(), warp.tolist(), strict=True):
            published = self._published.get(word)
            if reads and published is not None:
                if order in ("acquire", "acq_rel") or writes:
                    self.clocks.acquire_far(np.array([d]), np.array([w]), published[None])
                else:
                    self._seen[d, w] = np.maximum(self._seen[d, w], published)
            if writes:
                given = self._given(d, w, order)
                # A read-modify-write continues what was released on the word before it.
                self._published[word] = np.maximum(given, published) if reads and published is not None else given

    def _given(self, domain: int, warp: int, order: Order) -> NDArray[np.int32]:
        """The knowledge that a strong write publishes: all of it with .release, else that of fences before it."""
        clocks = self.clocks
        if order in ("release", "acq_rel"):
            return np.asarray(clocks.release(np.array([domain]), np.array([warp]))[0][0, clocks.near :])
        before = clocks.know[0][domain, warp, : clocks.warps] >= self._fenced_at[domain]
        return np.asarray(self._fenced[domain][before].max(axis=0, initial=0))
