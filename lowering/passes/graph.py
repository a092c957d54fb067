"""Questions that passes ask a graph: a node's arguments, shape and type, and whether a gradient is required."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lowering.record import Refusal

aten, prims, flashmla = torch.ops.aten, torch.ops.prims, torch.ops.flashmla

#: An int or a torch.SymInt, whose operators have no types.
Size: TypeAlias = Any

#: Types of the operators.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CONVERSIONS = (prims.convert_element_type.default, aten._to_copy.default)
VIEWS = (aten.view.default, aten._unsafe_view.default)

GRADIENT = "a gradient is required, and graphs are rewritten for inference: compile under torch.no_grad()"


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds for every size the graph accepts. Adds no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def value(argument: Any) -> Any:
    """The value of an argument while tracing: a node's fake tensor or symbolic size, or the argument itself."""
    return argument.meta.get("val") if isinstance(argument, Node) else argument


def inputs(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a call."""
    return node.args


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call to an operator by name, with the defaults of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = {}
    for position, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        given = node.args[position] if position < len(node.args) else default
        bound[argument.name] = node.kwargs.get(argument.name, given)
    return bound


def shape(node: Node) -> list[Size]:
    return list(node.meta["val"].shape)


def sources(node: Node) -> list[Node]:
    """The tensors, inputs and constants of the graph, that a node is computed from."""
    seen, frontier = {node}, [node]
    while frontier:
        new = [source for source in frontier.pop().all_input_nodes if source not in seen]
        seen.update(new)
        frontier.extend(new)
    return [x for x in seen if x.op != "call_function" and isinstance(x.meta.get("val"), torch.Tensor)]


def is_call(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target == target


def is_float(node: Node) -> bool:
    tensor = node.meta.get("val")
    return isinstance(tensor, torch.Tensor) and tensor.dtype.is_floating_point


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_gradient(graph: torch.fx.Graph) -> None:
    """Raise `Refusal` if the graph computes gradients or its inputs require them."""
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        tracked = isinstance(x := node.meta.get("val"), torch.Tensor) and x.requires_grad
        if node.name.startswith("tangents") or (tracked and torch.is_grad_enabled()):
            raise Refusal(GRADIENT)
