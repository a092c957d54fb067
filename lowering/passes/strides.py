"""Who can see how a tensor lies in memory, and how to lay one out as another.

A rewrite often computes a result in another order of dimensions than the graph was traced with. Most operators read
their inputs by index and do not care, though the layout of what they compute may follow. Others do: `as_strided`, a
custom operator, a branch of `torch.cond`, whoever gets the graph's outputs. So a new layout is either followed until
nothing behind it changes any more, or, if it would reach such a reader, undone by a copy where it arises.
"""

from __future__ import annotations

import functools
import heapq
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from lowering.passes.graph import Size, aten, known, prims

Values = dict[Node, Any]
Run = Callable[[Node, Values], Any]

#: Operators that read strides, or that are told them.
READERS = (
    aten.as_strided,
    aten.as_strided_copy,
    aten.as_strided_scatter,
    aten._reshape_alias,
    aten.set_,
    aten.resize,
    aten.resize_,
    aten.resize_as,
    aten.resize_as_,
    prims.as_strided,
    prims.as_strided_scatter,
    prims.copy_strided,
)


def changed_behind(old: Node, new: torch.Tensor, run: Run) -> Values | None:
    """The values of ``old`` and of all that changes behind it if it becomes ``new``, with the same elements.

    None if somebody would see that the strides are others. ``run`` gives what a call computes from changed values.
    """
    changed: Values = {old: new}
    moved = set() if same_strides(old.meta["val"], new) else {old}
    waiting = sorted(old.users)
    while waiting:
        node = heapq.heappop(waiting)
        is_moved = not moved.isdisjoint(node.all_input_nodes)
        if node in changed or not (is_moved or _is_view(node)):
            continue
        if is_moved and _sees_strides(node, moved):
            return None
        if node.meta.get("unbacked_bindings"):
            continue  # another run would make other symbols
        try:
            after = run(node, changed)
        except Exception:  # a view that these strides do not allow; whoever cannot tell is taken to see them
            return None
        if not same_strides(node.meta["val"], after):
            moved.add(node)
        elif not _is_view(node):
            continue
        changed[node] = after
        for user in node.users:
            heapq.heappush(waiting, user)
    return changed


def _sees_strides(node: Node, moved: set[Node]) -> bool:
    """Whether a reader of a moved tensor is, or may be, one that its strides make a difference to."""
    if node.target is operator.getitem:
        return False
    if (
        not isinstance(node.target, torch._ops.OpOverload)
        or "val" not in node.meta
        or node.meta.get("unbacked_bindings")
    ):
        return True
    if node.target.namespace not in ("aten", "prims", "flashmla") or node.target.overloadpacket in READERS:
        return True
    if node.target == aten.copy_.default:
        return node.args[0] in moved
    if node.target == aten.sym_size.int:
        return False
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return True
    return not all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta["val"]))


def _is_view(node: Node) -> bool:
    """Whether a node shares the memory of what it reads."""
    return _viewed(node) is not None


def memory_of(node: Node) -> Node:
    """The node that computes what ``node`` is a view of."""
    return _views(node)[-1]


def is_returned_beside(node: Node) -> bool:
    """Whether the graph returns a view of ``node``, and something else in the same memory that is none."""
    memory = memory_of(node)
    views = [_views(x) for x in node.graph.output_node().all_input_nodes]
    return len({node in each for each in views if each[-1] is memory}) == 2


def _views(node: Node) -> list[Node]:
    """The node, what it is a view of, what that is a view of, and so on."""
    nodes = [node]
    while (source := _viewed(nodes[-1])) is not None:
        nodes.append(source)
    return nodes


def _viewed(node: Node) -> Node | None:
    memory = {_memory(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))} - {None}
    return next((source for source in node.all_input_nodes if _memory(source.meta.get("val")) in memory), None)


def _memory(val: Any) -> int | None:
    stored = isinstance(val, torch.Tensor) and torch._C._has_storage(val)
    return val.untyped_storage()._cdata if stored else None


def same_strides(before: Any, after: Any) -> bool:
    """Whether the tensors of two values have the same strides, and begin at the same place of their memory."""
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    return all(
        not isinstance(x, torch.Tensor) or all(known(n == m) for n, m in zip(_layout(x), _layout(y), strict=True))
        for x, y in pairs
    )


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the elements of two tensors of one shape lie alike in as much memory, strides that mean nothing aside."""
    if not known(one.untyped_storage().nbytes() == other.untyped_storage().nbytes()):
        return False  # a part of a larger tensor
    sizes = [*one.shape, 0]
    return all(
        known(n == m) or known(size == 1) for size, n, m in zip(sizes, _layout(one), _layout(other), strict=True)
    )


def in_order(x: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie in their order, for every size the graph accepts. Adds no guard."""
    stride: Size = 1
    for size, n in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not known(n == stride) and not known(size == 1):
            return False
        stride = stride * size
    return True


def viewed_strides(x: torch.Tensor, shape: Sequence[Size]) -> list[Size] | None:
    """The strides of ``x.view(shape)``, or None if not known to exist for every size the graph accepts."""
    strides: list[Size] = []
    place = len(shape) - 1
    #: Elements of a run of dimensions that lie as one, from the innermost, and how far apart they lie.
    run, apart = 1, x.stride(-1) if x.dim() else 1
    for dim in reversed(range(x.dim())):
        run = run * x.shape[dim]
        if dim and (known(x.stride(dim - 1) == run * apart) or known(x.shape[dim - 1] == 1)):
            continue
        seen: Size = 1
        while place >= 0 and (not known(seen == run) or known(shape[place] == 1)):
            strides.insert(0, seen * apart)
            seen = seen * shape[place]
            place -= 1
        if not known(seen == run):
            return None
        run, apart = 1, x.stride(dim - 1) if dim else 1
    # Dimensions of size 1 in front of a tensor without any.
    return [1] * (place + 1) + strides if all(known(size == 1) for size in shape[: place + 1]) else None


def _layout(x: torch.Tensor) -> list[Size]:
    return [*x.stride(), x.storage_offset()]


def dims_in_memory(x: torch.Tensor) -> list[int]:
    """The dimensions from the outermost to the innermost. One of size 1 comes behind another of the same stride."""
    sizes, strides = x.shape, x.stride()

    def compare(a: int, b: int) -> int:
        if known(strides[a] == strides[b]):
            return int(known(sizes[a] == 1)) - int(known(sizes[b] == 1))
        return -1 if known(strides[a] > strides[b]) else 1

    return sorted(range(len(sizes)), key=functools.cmp_to_key(compare))
