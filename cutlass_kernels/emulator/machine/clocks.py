"""Who is ordered after whom: vector clocks of warps, and of what completes on mbarriers.

The method is that of FastTrack (Flanagan and Freund, PLDI 2009) for warps in place of threads. The warps of a cluster
form a domain. An agent is a warp, or the asynchronous work that completes on one mbarrier. ``know[0][domain, warp,
agent]`` is the latest clock of the agent that the warp is ordered after; ``know[1]`` the same for what the
asynchronous proxy may see, which only fence.proxy.async brings up to date (PTX ISA, "Proxies" in the memory
consistency model). Where several clusters run at once, a warp also knows the clocks of all warps, for what they write
to global memory: those follow the agents of its own domain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Agents of asynchronous work in a domain. mbarriers beyond that number share them, which may hide a race.
ASYNC_AGENTS = 48
#: Warps that may run at once for each to know of all; beyond that, nobody looks for races in global memory.
MOST_WARPS = 512

Ints = NDArray[np.int64]
#: The knowledge about every agent, generic and through the asynchronous proxy: [2, agents].
Knowledge = NDArray[np.int32]


class Clocks:
    """The clocks of ``domains`` clusters of ``warps`` warps each."""

    def __init__(self, domains: int, warps: int) -> None:
        self.domains, self.warps, self.near = domains, warps, warps + ASYNC_AGENTS
        self.far = domains * warps if 1 < domains * warps <= MOST_WARPS else 0
        self.agents = self.near + self.far
        self.know = np.zeros((2, domains, warps, self.agents), np.int32)
        self._tick(np.arange(domains)[:, None], np.arange(warps)[None])
        self.async_clock = np.zeros((domains, ASYNC_AGENTS), np.int32)

    def nothing(self, *shape: int) -> NDArray[np.int32]:
        """Knowledge of nothing, for a barrier: [2, *shape, agents]."""
        return np.zeros((2, *shape, self.agents), np.int32)

    def own(self, domain: Ints, warp: Ints) -> NDArray[np.int32]:
        """The present clock of each warp."""
        return np.asarray(self.know[0][domain, warp, warp])

    def release(self, domain: Ints, warp: Ints) -> NDArray[np.int32]:
        """The knowledge of the warps, for others to acquire; their work from now on is later: [2, warps, agents]."""
        given = self.know[:, domain, warp]
        self._tick(domain, warp)
        return np.asarray(given)

    def _tick(self, domain: Ints, warp: Ints) -> None:
        self.know[0][domain, warp, warp] += 1
        if self.far:
            self.know[0][domain, warp, self.near + domain * self.warps + warp] += 1

    def of_all(self, domain: Ints, warp: Ints, other: Ints) -> NDArray[np.int32]:
        """The knowledge of warps about others, numbered among all."""
        return np.asarray(self.know[0][domain, warp, self.near + other])

    def acquire_far(self, domain: Ints, warp: Ints, knowledge: NDArray[np.int32]) -> None:
        """The warps are from now on ordered after the ``knowledge`` of all warps, [warps, far]."""
        known = self.know[0]
        known[domain, warp, self.near :] = np.maximum(known[domain, warp, self.near :], knowledge)
        own = self.near + domain[:, None] * self.warps + np.arange(self.warps)
        mine = known[domain[:, None], warp[:, None], own]
        known[domain, warp, : self.warps] = np.maximum(known[domain, warp, : self.warps], mine)

    def acquire(self, domain: Ints, warp: Ints, knowledge: NDArray[np.int32]) -> None:
        """The warps are from now on ordered after ``knowledge`` [2, agents] or [2, warps, agents]."""
        if knowledge.ndim == 2:
            knowledge = knowledge[:, None]
        self.know[:, domain, warp] = np.maximum(self.know[:, domain, warp], knowledge)

    def proxy_fence(self, domain: Ints, warp: Ints) -> None:
        """fence.proxy.async: the asynchronous proxy may see all that each warp knows up to here."""
        self.know[1][domain, warp] = np.maximum(self.know[1][domain, warp], self.know[0][domain, warp])
        self._tick(domain, warp)

    def complete(self, domain: int, agent: int) -> int:
        """The clock of the next completion by an agent of asynchronous work (numbered from 0)."""
        self.async_clock[domain, agent] += 1
        return int(self.async_clock[domain, agent])

    def share(self, domain: int, warps: Ints) -> int:
        """A warpgroup completes an operation together: all its warps know the clock of the first, which is returned."""
        first = int(warps[0])
        clock = int(self.know[0][domain, first, first])
        self.know[0][domain, warps, first] = np.maximum(self.know[0][domain, warps, first], clock)
        self._tick(np.array(domain), np.array(first))
        return clock


def join(table: NDArray[np.int32], index: Ints, given: NDArray[np.int32]) -> None:
    """Add what several warps know, [2, warps, agents], to the entries of a table [2, entries, agents], in place."""
    np.maximum.at(table.swapaxes(0, 1), index, given.swapaxes(0, 1))
