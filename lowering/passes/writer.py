"""Write nodes into a graph, each with the fake tensor that the rest of the compiler expects of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import disable_fake_tensor_cache
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import has_free_symbols
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from lowering.passes.axes import Access, Axis, Digit, Entry, cut_digits
from lowering.passes.graph import VIEWS, Size, aten, inputs, known, prims, shape
from lowering.passes.strides import (
    Values,
    changed_behind,
    dims_in_memory,
    in_order,
    memory_of,
    same_memory,
    viewed_strides,
)
from lowering.record import Refusal

Group = Sequence[Axis]


class Mark(NamedTuple):
    """A point in time: how much a writer had written then."""

    written: int
    replaced: int
    shared: dict[tuple[str, ...], Node]


class Writer:
    """Writes before a node. What it writes for one attention, a later one of the same graph may use: see `shared`."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph
        self.before: Node | None = None
        self._written: list[Node] = []
        self._replaced = 0
        self._shared: dict[tuple[str, ...], Node] = {}
        values = [node.meta.get("val") for node in graph.nodes]
        self.fake_mode = detect_fake_mode([x for x in values if isinstance(x, torch.Tensor)])

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        assert self.before is not None
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self._written.append(node)
        node.meta.update({key: self.before.meta[key] for key in PROVENANCE if key in self.before.meta})
        _describe_inputs(node)
        _describe(node, self._run(node))
        return node

    def mark(self) -> Mark:
        return Mark(len(self._written), self._replaced, dict(self._shared))

    def has_replaced(self, mark: Mark) -> bool:
        """Whether users of an older node were changed since."""
        return self._replaced > mark.replaced

    def undo(self, mark: Mark) -> None:
        """Take back what was written since, of which nothing may have replaced an older node."""
        assert not self.has_replaced(mark)
        for node in reversed(self._written[mark.written :]):
            self.graph.erase_node(node)
        del self._written[mark.written :]
        self._shared = mark.shared

    def _run(self, node: Node, changed: Values | None = None) -> Any:
        """The result of a call for the fake values of its arguments."""
        others = changed or {}

        def value(n: Node) -> Any:
            return others[n] if n in others else n.meta["val"]

        args, kwargs = pytree.tree_map_only(Node, value, (node.args, node.kwargs))
        assert self.fake_mode is not None
        # Its cache asks whether symbolic strides are those of contiguous tensors, which fixes sizes of the graph.
        with disable_fake_tensor_cache(self.fake_mode), self.fake_mode:
            if node.target in VIEWS:
                return _view(args[0], node.meta["val"].shape if "val" in node.meta else args[1])
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def shared(self, *key: object) -> tuple[tuple[str, ...], Node | None]:
        """A key for something that all layers can use, and the node if it stands before what is written now."""
        text = tuple(str(part) for part in key)
        found = self._shared.get(text)
        assert self.before is not None
        return text, found if found is not None and found < self.before else None

    def share(self, key: tuple[str, ...], node: Node) -> Node:
        self._shared[key] = node
        return node

    def size(self, size: Any) -> Any:
        """An argument for a size: a number, or a node that computes the symbolic size."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        if expr.is_number:
            return int(expr)
        key, found = self.shared("size", expr)
        return found if found is not None else self.share(key, self._expression(expr))

    def _expression(self, expr: Any) -> Any:
        if expr.is_number:
            return int(expr)
        if expr.is_Symbol:
            return self._symbol(expr)
        if expr.is_Add or expr.is_Mul:
            function = operator.add if expr.is_Add else operator.mul
            first, *rest = (self._expression(arg) for arg in expr.args)
            for term in rest:
                first = (
                    function(first, term)
                    if isinstance(first, int) and isinstance(term, int)
                    else self.call(function, first, term)
                )
            return first
        if isinstance(expr, FloorDiv):
            return self.call(operator.floordiv, *map(self._expression, expr.args))
        for node in self._earlier():
            if isinstance(val := node.meta.get("val"), torch.SymInt) and val.node.expr == expr:
                return node
        raise Refusal(f"the size {expr} has no node in the graph")

    def _symbol(self, symbol: Any) -> Node:
        for node in self._earlier():
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt) and val.node.expr == symbol:
                return node
            if node.op == "placeholder" and isinstance(val, torch.Tensor):
                for dim, n in enumerate(val.shape):
                    if isinstance(n, torch.SymInt) and n.node.expr == symbol:
                        return self.call(aten.sym_size.int, node, dim)
        raise Refusal(f"the size {symbol} has no node in the graph")

    def _earlier(self) -> list[Node]:
        before = self.before
        assert before is not None
        return [node for node in self.graph.nodes if node < before]

    def view(self, node: Node, sizes: Sequence[Size]) -> Node:
        """The elements in another shape; copied only if their strides leave no other way."""
        if len(sizes) == len(shape(node)) and all(known(n == m) for n, m in zip(sizes, shape(node), strict=True)):
            return node
        target = [self.size(n) for n in sizes]
        if not viewable(node, sizes):
            node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten.view.default, node, target)

    def iota(self, length: Size, dtype: torch.dtype, device: torch.device) -> Node:
        options = {"start": 0, "step": 1, "dtype": dtype, "device": device, "requires_grad": False}
        return self.call(prims.iota.default, self.size(length), **options)

    def lay_out(self, element: Access, groups: Sequence[Group]) -> Node:
        """The tensor that has ``element`` at the index of ``groups``: one dimension for each, its axes in that order.

        Only views, except where axes from different places are merged into one dimension.
        """
        wanted = [tuple(leaf for axis in group for leaf in axis.leaves()) for group in groups]
        node, units = self._separate(element, wanted)
        order = [unit for group in wanted for unit in _units_of(group, units)]
        read = [axis for unit in units for axis in unit]
        if sorted(order) != list(range(len(units))) or sum(map(len, wanted)) != len(read):
            raise Refusal(f"{element.node} is read along {read}, not along {list(wanted)}")
        node = self._permuted(node, order)
        sizes: list[Size] = []
        for group in wanted:
            product: Size = 1
            for axis in group:
                product = product * axis.size
            sizes.append(product)
        return self.view(node, sizes)

    def _separate(self, element: Access, wanted: list[tuple[Axis, ...]]) -> tuple[Node, list[tuple[Axis, ...]]]:
        """The node with a dimension for each axis or whole group that its element depends on, and those."""
        node = element.node
        entries: list[Entry] = []
        sizes: list[Size] = []
        for entry, size in zip(element.index, shape(node), strict=True):
            digits = cut_digits(entry)
            if len(digits) <= 1 or (all(d.whole for d in digits) and tuple(d.axis for d in digits) in wanted):
                entries.append(digits)
                sizes.append(size)
            else:
                entries.extend((digit,) for digit in digits)
                sizes.extend(digit.size for digit in digits)
        node = self.view(node, sizes)
        units: list[tuple[Axis, ...]] = []
        for entry in entries:
            dim = len(units)
            if not entry or entry[0].axis is None:
                node = self.call(aten.select.int, node, dim, self.size(entry[0].offset) if entry else 0)
                continue
            node = self._narrow(node, dim, entry)
            units.append(tuple(digit.axis for digit in entry if digit.axis is not None))
        return node, units

    def _narrow(self, node: Node, dim: int, entry: Entry) -> Node:
        if len(entry) > 1 or entry[0].whole:
            return node
        digit: Digit = entry[0]
        return self.call(aten.slice.Tensor, node, dim, self.size(digit.offset), self.size(digit.stop))

    def replace(self, old: Node, new: Node) -> None:
        """Let all users of ``old`` use ``new``, in its strides where somebody could see that they are others.

        A call that ``old`` is a result of goes at once: SDPA has a dropout, for which it counts as impure, and no
        removal of dead code would touch it.
        """
        changed = changed_behind(old, new.meta["val"], self._run)
        if changed is None:
            new = self._laid_out_as(old, new)
            changed = changed_behind(old, new.meta["val"], self._run) or {}
        self._replaced += 1
        for node, val in changed.items():
            if node is not old:
                _describe(node, val)
        call = inputs(old)[0] if old.target is operator.getitem else old
        old.replace_all_uses_with(new)
        for reader in {user for node in (new, *changed) for user in node.users}:
            _describe_inputs(reader)
        for result in [user for user in call.users if not user.users]:
            self.graph.erase_node(result)
        if not call.users:
            self.graph.erase_node(call)

    def _laid_out_as(self, old: Node, new: Node) -> Node:
        """The elements of ``new`` with the strides of ``old``, those of dimensions of size 1 included.

        Inductor computes the copy together with who reads it by index. `as_strided` pins its layout, which Inductor
        would otherwise choose by what the copy reads, also where a branch of `torch.cond` relies on the traced one.
        """
        wanted = old.meta["val"]
        if not same_memory(wanted, new.meta["val"]):
            order = dims_in_memory(wanted)
            copy = self.call(aten.clone.default, self._permuted(new, order), memory_format=torch.contiguous_format)
            new = self._permuted(copy, [order.index(dim) for dim in range(len(order))])
        if not same_memory(wanted, new.meta["val"]):
            raise Refusal(f"{old} has strides {wanted.stride()}, a copy of it {new.meta['val'].stride()}")
        sizes, strides = ([self.size(n) for n in numbers] for numbers in (wanted.shape, wanted.stride()))
        return self.call(aten.as_strided.default, new, sizes, strides)

    def _permuted(self, node: Node, order: list[int]) -> Node:
        return node if order == sorted(order) else self.call(aten.permute.default, node, order)


def _units_of(group: tuple[Axis, ...], units: list[tuple[Axis, ...]]) -> list[int]:
    if group in units:
        return [units.index(group)]
    return [units.index((axis,)) for axis in group if (axis,) in units]


def is_copied(node: Node, source: Node) -> bool:
    """Whether a tensor is more than a view of ``source``, which its elements were resolved to."""
    while node is not source:
        if not node.all_input_nodes or node.target in (aten.clone.default, aten.cat.default):
            return True
        node = node.all_input_nodes[0]
    return False


def viewable(node: Node, sizes: Sequence[Size]) -> bool:
    """Whether a tensor can have these sizes without a copy."""
    try:
        _view(node.meta["val"], sizes)
    except (RuntimeError, ValueError):
        return False
    return True


def _view(x: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """``x.view(sizes)``, also where torch would think forever.

    For symbolic sizes torch asks whether an expression holds that grows with every dimension that becomes one with
    another: three take it a tenth of a second, four have not come to an end.
    """
    merged = sum(not known(size == 1) for size in x.shape) - len(sizes)
    if merged <= 2 or all(isinstance(n, int) for n in (*x.shape, *x.stride())) or in_order(x):
        return x.view(list(sizes))
    if (strides := viewed_strides(x, sizes)) is None:
        raise ValueError(f"a view of {tuple(x.shape)}, strides {x.stride()}, as {tuple(sizes)} is not known to exist")
    return x.as_strided(sizes, strides, x.storage_offset())


def _describe(node: Node, val: Any) -> None:
    """Enter the value of a node into its metadata, and what else the compiler keeps about values."""
    node.meta["val"] = val
    if isinstance(val, torch.Tensor):
        # Whether symbolic strides are those of contiguous tensors is not asked: the answer fixes sizes of the graph.
        node.meta["tensor_meta"] = _extract_tensor_metadata(val, include_contiguity=not has_free_symbols(val))


def _describe_inputs(node: Node) -> None:
    """Say with which strides an operator of ours reads its inputs, where Inductor would compute them in other ones.

    It lays out in order what it generates code for, whatever the strides are that the graph was traced with.
    """
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "flashmla":

        def strict(n: Node) -> Any:
            if not isinstance(n.meta["val"], torch.Tensor):
                return n.meta["val"]  # a symbolic size
            source = memory_of(n)
            return None if source.op != "call_function" or in_order(source.meta["val"]) else n.meta["val"]

        node.meta["eager_input_vals"] = pytree.tree_map_only(Node, strict, (node.args, node.kwargs))


#: Keys of a node's metadata that say where it comes from in the user's program.
PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")
