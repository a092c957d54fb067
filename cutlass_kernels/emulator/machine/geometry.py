"""Grid, CTAs, clusters and warps of the threads that run at once, and the special registers that tell them."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.scheduler import WARP
from cutlass_kernels.emulator.ptx.types import Array

Triple = tuple[int, int, int]
WARPGROUP = 128
_AXES = "xyz"


def volume(size: Triple) -> int:
    """Elements of a three-dimensional size."""
    return size[0] * size[1] * size[2]


class Geometry:
    """CTAs ``first`` .. ``first + ctas`` of the launch order, in which the CTAs of a cluster follow one another."""

    def __init__(
        self, grid: Triple, block: Triple, cluster: Triple, dynamic_shared: int, first: int, ctas: int, sm_count: int
    ) -> None:
        self.grid, self.block, self.cluster, self.dynamic_shared = grid, block, cluster, dynamic_shared
        self.ctas, self.sm_count = ctas, sm_count
        self.threads = volume(block)
        self.cluster_ctas = volume(cluster)
        self.domains = ctas // self.cluster_ctas
        self.lanes = ctas * self.threads
        warps = -(-self.threads // WARP)
        self.warps_in_domain = warps * self.cluster_ctas
        lane = np.arange(self.lanes, dtype=np.int64)
        self.cta: Ints = lane // self.threads
        self.thread: Ints = lane % self.threads
        self.domain: Ints = self.cta // self.cluster_ctas
        #: The warp within its cluster.
        self.warp: Ints = self.cta % self.cluster_ctas * warps + self.thread // WARP
        #: The warp and the warpgroup of each thread among all that run, by their sizes.
        self.groups: dict[int, Ints] = {
            size: self.cta * -(-self.threads // size) + self.thread // size for size in (WARP, WARPGROUP)
        }
        self._order = first + np.arange(ctas, dtype=np.int64)

    @cached_property
    def _cta_index(self) -> tuple[Ints, ...]:
        """%ctaid of each resident CTA."""
        in_cluster = self._unravel(self._order % self.cluster_ctas, self.cluster)
        grid, each = self.grid, self.cluster
        clusters = (grid[0] // each[0], grid[1] // each[1], grid[2] // each[2])
        cluster = self._unravel(self._order // self.cluster_ctas, clusters)
        return tuple(c * size + i for c, size, i in zip(cluster, self.cluster, in_cluster, strict=True))

    @staticmethod
    def _unravel(index: Ints, size: Triple) -> tuple[Ints, Ints, Ints]:
        return index % size[0], index // size[0] % size[1], index // (size[0] * size[1])

    def describe(self, lane: int) -> str:
        """A thread, for messages."""
        x, y, z = (int(axis[self.cta[lane]]) for axis in self._cta_index)
        tx, ty, tz = (int(axis) for axis in self._unravel(self.thread[lane], self.block))
        return f"thread ({tx}, {ty}, {tz}) of CTA ({x}, {y}, {z})"

    def special(self, name: str) -> Array:
        """A special register, one uint32 a lane. Clocks read 0. Raises KeyError for one that is not modelled."""
        base, _, axis = name.lstrip("%").partition(".")
        values = self._vector(base, _AXES.index(axis)) if axis in tuple(_AXES) else self._scalar(base)
        return np.broadcast_to(np.asarray(values, np.int64), (self.lanes,)).astype(np.uint32)

    def _vector(self, base: str, axis: int) -> Ints | int:
        clusters = self.grid[axis] // self.cluster[axis]
        known: dict[str, Ints | int] = {"ntid": self.block[axis], "nctaid": self.grid[axis]}
        known |= {"cluster_nctaid": self.cluster[axis], "nclusterid": clusters}
        if base == "tid":
            return self._unravel(self.thread, self.block)[axis]
        index = self._cta_index[axis][self.cta]
        known |= {"ctaid": index, "clusterid": index // self.cluster[axis]}
        known["cluster_ctaid"] = index % self.cluster[axis]
        return known[base]

    def _scalar(self, base: str) -> Ints | int:
        lane = self.thread % WARP
        known: dict[str, Ints | int] = {
            "laneid": lane,
            "warpid": self.thread // WARP,
            "nwarpid": -(-self.threads // WARP),
            "smid": self.cta % self.sm_count,
            "nsmid": self.sm_count,
            "cluster_ctarank": self.cta % self.cluster_ctas,
            "cluster_nctarank": self.cluster_ctas,
            "is_explicit_cluster": int(self.cluster_ctas > 1),
            "dynamic_smem_size": self.dynamic_shared,
            "lanemask_eq": 1 << lane,
            "lanemask_lt": (1 << lane) - 1,
            "lanemask_le": (2 << lane) - 1,
            "lanemask_gt": 0xFFFFFFFF ^ ((2 << lane) - 1),
            "lanemask_ge": 0xFFFFFFFF ^ ((1 << lane) - 1),
            "clock": 0,
            "clock_hi": 0,
            "clock64": 0,
            "globaltimer": 0,
            "gridid": 0,
        }
        return known[base]
