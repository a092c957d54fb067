"""What ranks say to each other, with an error of ours where one of them no longer answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flashmla_ops.errors import RankError


@contextmanager
def answered(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise `RankError` where a collective fails: at once if a connection is closed, else after the group's timeout."""
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_world_size(group)
        raise RankError(f"{what} among {ranks} ranks failed on rank {dist.get_rank(group)}: {error}") from error


def gathered(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensor of each rank, in order; all have one shape and type."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    with answered("all_gather", group):
        dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def added(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the tensors of all ranks, the same bits on each."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    with answered("all_reduce", group):
        dist.all_reduce(total, group=group)
    return total
