"""Pages of cache rows: who owns which, and where a sequence's tokens lie.

`PageAllocator` counts references to page numbers, `BlockTables` maps sequences to pages and shares them copy-on-write,
and `slab` makes the tensors whose rows the pages are. The first two hold no tensor of rows, so one block table serves
every layer of a model. `Arena` and `DeviceArena` are memory for torch's own allocations. A pool that releases pages
asynchronously, behind the readers still in flight, belongs here too, behind the methods of `PageAllocator`.
"""

from flashmla_ops.kv_cache.allocator import PageAllocator
from flashmla_ops.kv_cache.arena import Arena, ArenaStats
from flashmla_ops.kv_cache.block_tables import BlockTables, PageCopy, slot_mapping
from flashmla_ops.kv_cache.device_arena import DeviceArena, DeviceArenaStats
from flashmla_ops.kv_cache.slab import as_cache, copy_pages, new_slab

__all__ = [
    "Arena",
    "ArenaStats",
    "BlockTables",
    "DeviceArena",
    "DeviceArenaStats",
    "PageAllocator",
    "PageCopy",
    "as_cache",
    "copy_pages",
    "new_slab",
    "slot_mapping",
]
