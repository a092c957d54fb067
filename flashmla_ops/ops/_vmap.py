"""What the operators' rules for ``torch.vmap`` share. A rule gets ``dims``: each argument's mapped dimension by name.

It is an int, or None where nothing is mapped; a list of them for a list of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashmla_ops.ops.operator import Arguments


def front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[size, ...]: the mapped dimension comes first; what is not mapped is the same for all."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def folded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[n, ...] of each -> [size * n, ...]. What is not mapped is copied."""
    return front(tensor, dim, size).flatten(0, 1)


def each(op: torch._ops.OpOverload, size: int, dims: dict[str, Any], a: Arguments) -> tuple[Any, Any]:
    """One call for each entry: where every entry reads weights of its own, one call for all would gain nothing."""
    results = [op(*(_entry(value, dims[name], i) for name, value in vars(a).items())) for i in range(size)]
    if not op._schema.returns:
        return None, None
    if len(op._schema.returns) == 1:
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(op._schema.returns)


def loop(operator: Callable[[], torch._ops.OpOverload]) -> Callable[[int, dict[str, Any], Any], tuple[Any, Any]]:
    """The rule that is `each`, whatever is mapped."""

    def rule(size: int, dims: dict[str, Any], a: Arguments) -> tuple[Any, Any]:
        return each(operator(), size, dims, a)

    return rule


def _entry(value: Any, dim: Any, i: int) -> Any:
    if isinstance(dim, list | tuple):
        return [_entry(x, d, i) for x, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, i)
