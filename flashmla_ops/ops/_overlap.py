"""Whether strided tensors share memory: what an operator writes must lie apart from itself and from what it reads.

`cpu/csrc/flashmla/overlap.h` has the same for the kernels. Sizes and strides that are symbolic are left to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError

#: Steps after which a search gives up, and memory counts as apart.
BUDGET = 10_000


def require_apart(op: str, argument: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise `ArgumentError` if ``tensor``, which is written, overlaps itself or one of ``others``."""
    if overlaps_itself(tensor):
        actual = f"sizes {list(tensor.shape)}, strides {list(tensor.stride())}"
        raise ArgumentError(op, argument, "elements that share no memory", actual)
    for name, other in others.items():
        if other is not None and overlap(tensor, other):
            raise ArgumentError(op, argument, f"memory apart from {name}", "an overlap")


def same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether the two are one: an operator may then write each element where it has read it."""
    return (
        a.dtype == b.dtype
        and _same_storage(a, b)
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of one tensor share memory: after ``expand``, or some ``as_strided``.

    Of symbolic strides only those of 0 are seen, which are never symbolic themselves.
    """
    if not _is_static(tensor):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes seconds; loaded by now

        return any(
            statically_known_true(size > 1) and isinstance(stride, int) and stride == 0
            for size, stride in _dims(tensor)
        )
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    dims = [(size, stride) for size, stride in _dims(tensor) if size > 1]
    strides = {stride for _, stride in dims}
    if 0 in strides or len(strides) < len(dims):
        return True
    return _solvable([(stride, 1 - size, size - 1) for size, stride in dims], 0, nonzero=True)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether an element of ``a`` and one of ``b`` share memory."""
    if not (_same_storage(a, b) and _is_static(a) and _is_static(b)) or a.numel() == 0 or b.numel() == 0:
        return False
    ranges = {1: (1 - b.itemsize, a.itemsize - 1)}  # bytes within an element
    for tensor, sign in ((a, 1), (b, -1)):
        for size, stride in _dims(tensor):
            step, reach = stride * tensor.itemsize, sign * (size - 1)
            if step:
                low, high = ranges.get(step, (0, 0))
                ranges[step] = (low + min(reach, 0), high + max(reach, 0))
    distance = int(b.storage_offset()) * b.itemsize - int(a.storage_offset()) * a.itemsize
    return _solvable([(step, *bounds) for step, bounds in ranges.items()], distance)


def _solvable(terms: list[tuple[int, int, int]], target: int, *, nonzero: bool = False) -> bool:
    """Whether sum(x_i * stride_i) == ``target`` for whole numbers x_i from low_i to high_i (not all 0 if ``nonzero``).

    ``terms``: (stride, low, high). With the largest stride first, what remains leaves few choices for the next.
    """
    terms = sorted(terms, reverse=True)
    budget = BUDGET

    def search(i: int, target: int, nonzero: bool) -> bool:
        nonlocal budget
        if i == len(terms):
            return target == 0 and not nonzero
        if (budget := budget - 1) < 0:
            return False
        stride, low, high = terms[i]
        rest_low = sum(least * step for step, least, _ in terms[i + 1 :])
        rest_high = sum(most * step for step, _, most in terms[i + 1 :])
        first, last = max(low, -((rest_high - target) // stride)), min(high, (target - rest_low) // stride)
        return any(search(i + 1, target - x * stride, nonzero and x == 0) for x in range(first, last + 1))

    return search(0, target, nonzero)


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.shape, tensor.stride(), strict=True))


def _is_static(tensor: Tensor) -> bool:
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return not any(isinstance(number, torch.SymInt) for number in numbers)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
