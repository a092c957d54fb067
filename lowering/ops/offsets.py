"""Where a view begins whose sizes are symbolic: `aten.sym_storage_offset`, for which torch has no lowering.

An operator that writes to a view comes to Inductor as a write through ``as_strided`` of the view's base, at the view's
offset. Where that is symbolic, as in ``slab[1]`` with any number of pages, it is a node of the graph, and Inductor's
fallback takes it for 0 when compiling (torch 2.13 to 2.15): the write would go to the first layer of the slab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.virtualized import V

from lowering import versions
from lowering.session import session


def install() -> None:
    versions.enter_lowering(torch.ops.aten.sym_storage_offset.default, lower)


def lower(_: Any) -> Any:
    """The offset that the graph was traced with, in terms of its sizes; None: Inductor's own treatment follows."""
    if session() is None:
        return None
    offset = V.graph.current_node.meta["val"]
    return offset.node.expr if isinstance(offset, torch.SymInt) else offset
