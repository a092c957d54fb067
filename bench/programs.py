"""The programs that the suite ``v41_block`` times: their kernels, calls and bytes, as a table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.blocks import QUICK, make_inputs
from bench.occupancy import OURS
from cutlass_kernels.tables import markdown


class Allocations(TorchDispatchMode):
    """Counts the operators that compute something, and the bytes of their results. Views are neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        new = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and storage(x) not in known]
        self.calls += bool(new)
        self.bytes += sum(x.nbytes for x in new)
        return result


def storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def of_suite(suite: str) -> list[dict[str, Any]]:
    """A row for each program, of the suite's quick case; none for other suites."""
    if suite != "v41_block":
        return []
    import lowering

    inputs = make_inputs(QUICK)
    explained, peer = (lowering.explain(block, *inputs.caches) for block in (inputs.block, inputs.plain))
    programs = {OURS: explained.after, f"{OURS} under stock Inductor": explained.before, "torch.compile": peer.before}
    rows = [
        {"program": name, "kernels": program.kernels, "calls": program.calls, "bytes": program.nbytes}
        for name, program in programs.items()
    ]
    with Allocations() as eager:
        inputs.block(*inputs.caches)
    return [*rows, {"program": f"{OURS} eager", "kernels": 0, "calls": eager.calls, "bytes": eager.bytes}]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    header = ["program", "generated kernels", "calls of libraries", "KiB allocated"]
    lines = [[row["program"], row["kernels"], row["calls"], f"{row['bytes'] / 1024:.0f}"] for row in rows]
    return "The programs of the quick case; in eager mode each operator is a call.\n\n" + markdown(
        header, lines, texts=1
    )
