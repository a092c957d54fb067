"""What the operators' rules for ``torch.vmap`` share. A rule gets ``in_dims``: each argument's mapped dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Dims = tuple[Any, ...]  # an int, or None where nothing is mapped; a list of them for a list of tensors


def front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[size, ...]: the mapped dimension comes first; what is not mapped is the same for all."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def folded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[n, ...] of each -> [size * n, ...]. What is not mapped is copied."""
    return front(tensor, dim, size).flatten(0, 1)


def each(op: torch._ops.OpOverload, info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    """One call for each entry: where every entry reads weights of its own, one call for all would gain nothing."""
    dims = (*in_dims, *[None] * (len(args) - len(in_dims)))
    results = [op(*_entry(args, dims, i)) for i in range(info.batch_size)]
    if not op._schema.returns:
        return None, None
    if len(op._schema.returns) == 1:
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(op._schema.returns)


def loop(operator: Callable[[], torch._ops.OpOverload]) -> Callable[..., tuple[Any, Any]]:
    """The rule that is `each`, whatever is mapped."""

    def rule(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        return each(operator(), info, in_dims, *args)

    return rule


def _entry(value: Any, dim: Any, i: int) -> Any:
    if isinstance(dim, list | tuple):
        return [_entry(x, d, i) for x, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, i)
