"""What ranks say to each other, with an error of ours where one of them no longer answers.

Gloo hands a collective to threads of its own, which takes it ten times as long as a message. So small tensors go as
messages between all ranks there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flashmla_ops.errors import RankError

#: The tag of a message that is a part of an exchange; those of `flashmla_ops.parallel.line` have others.
EXCHANGE = 3
#: Bytes of all ranks together up to which each is sent to every other.
SMALL = 1 << 20


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
        if _goes_as_messages(tensor, group):
            _exchange(tensor.contiguous(), parts, group)
        else:
            dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def added(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the tensors of all ranks, the same bits on each."""
    if _goes_as_messages(tensor, group):
        total, *others = gathered(tensor, group)
        for part in others:
            total += part
        return total
    total = tensor.clone(memory_format=torch.contiguous_format)
    with answered("all_reduce", group):
        dist.all_reduce(total, group=group)
    return total


def _goes_as_messages(tensor: Tensor, group: dist.ProcessGroup | None) -> bool:
    return dist.get_backend(group) == "gloo" and tensor.nbytes * dist.get_world_size(group) <= SMALL


def _exchange(tensor: Tensor, parts: list[Tensor], group: dist.ProcessGroup | None) -> None:
    own = dist.get_rank(group)
    others = [rank for rank in range(len(parts)) if rank != own]
    work = [dist.isend(tensor, group=group, group_dst=rank, tag=EXCHANGE) for rank in others]
    work += [dist.irecv(parts[rank], group=group, group_src=rank, tag=EXCHANGE) for rank in others]
    parts[own].copy_(tensor)
    for each in work:
        if each is not None:
            each.wait()
