"""The pool: pages of cached rows, who holds them, and where a sequence's tokens lie.

`KVPool` owns the slabs of all layers (`storage`, `slab`) and keeps the books of their pages (`pages`, in C++), which a
`Step` lays out as tensors; `prefix` finds pages of prompts that begin alike, `epochs` lets released pages wait for
their readers, `swap` moves sequences out and back, and `stats` and `plot` show it. `Arena` and `DeviceArena` are memory
for torch's own allocations.
"""

from flashmla_ops.kv_cache.arena import Arena, ArenaStats
from flashmla_ops.kv_cache.device_arena import DeviceArena, DeviceArenaStats
from flashmla_ops.kv_cache.pool import KVPool
from flashmla_ops.kv_cache.sequence import Sequence
from flashmla_ops.kv_cache.slab import as_cache, new_slab
from flashmla_ops.kv_cache.stats import PoolStats
from flashmla_ops.kv_cache.step import Step

__all__ = [
    "Arena",
    "ArenaStats",
    "DeviceArena",
    "DeviceArenaStats",
    "KVPool",
    "PoolStats",
    "Sequence",
    "Step",
    "as_cache",
    "new_slab",
]
