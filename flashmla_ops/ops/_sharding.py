"""The sharding rules that DTensor gets for our operators, from what each says of itself by names.

A rule returns the ways in which an operator's work can be cut: for each way, the dimension in which each argument and
each result is cut, by name. What a way does not name is the same on every rank; a result may be `SUM`, of which every
rank has a part. For `decode`, whose heads are independent over one latent cache:

    {"q": 2, "attn_sink": 0, "out": 2, "lse": 1}

To have everything on every rank is a way of every operator. DTensor takes the way that moves the fewest bytes from
where its arguments lie, and moves them; an argument that is written to is never moved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError

#: A result of which every rank has a part; the parts are to be added.
SUM = "sum"
#: The dimension in which an argument or a result is cut, or `SUM`; what has no name here is the same on every rank.
Way = Mapping[str, int | str]

#: From the arguments of a call to the ways in which it may be cut, the first of which is not at all.
Cuts = Callable[..., Sequence["Cut"]]


@dataclass(frozen=True)
class Cut:
    """A `Way` with an entry for each result and for each tensor among the arguments, in order."""

    results: Sequence[int | str | None]
    arguments: Sequence[int | str | None]
    sizes: frozenset[int]  # of the dimensions that are cut

    def fits(self, shards: int) -> bool:
        """Whether every rank gets the same part of all that is cut.

        Equal sizes are cut alike, evenly or not. Of different sizes (query heads and KV heads) the parts belong
        together only where each is a multiple.
        """
        if len(self.sizes) == 1:
            return all(size >= shards for size in self.sizes)
        return all(size % shards == 0 for size in self.sizes)


@dataclass(frozen=True)
class Rule:
    """How an operator may be cut. ``written``: how many of its tensors, the first ones, stay where they are."""

    op: torch._ops.OpOverload
    cuts: Cuts
    written: int


def bind(rules: Sequence[Rule]) -> None:
    """Register the rules with DTensor, if this torch has it. Whatever imports `torch._dynamo` has imported it."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    for rule in rules:
        # Decisions are kept for arguments that are equal: all of them, since d_v is part of a result's shape.
        info = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(rule.op, _strategy(rule), info)


def _strategy(rule: Rule) -> Callable[[Any], Any]:
    from torch.distributed.tensor._op_schema import OpSpec, OpStrategy
    from torch.distributed.tensor._ops.utils import generate_redistribute_costs

    def strategy(schema: Any) -> Any:
        given = (*schema.args_strategy, *schema.kwargs_strategy)
        mesh = given[0].mesh
        _require_one_mesh(rule, [each.mesh for each in given])
        cuts = rule.cuts(*(_without_data(arg) for arg in schema.args_schema))
        specs = []
        for ways in itertools.product(cuts, repeat=mesh.ndim):
            if not _together(ways, mesh):
                continue
            wanted = [_placed(mesh, [way.arguments[i] for way in ways], tensor) for i, tensor in enumerate(given)]
            if any(wanted[i].placements != given[i].strategies[0].output_spec.placements for i in range(rule.written)):
                continue
            results = [_placed(mesh, [way.results[i] for way in ways]) for i in range(len(cuts[0].results))]
            costs = [generate_redistribute_costs(each, spec) for each, spec in zip(given, wanted, strict=True)]
            found = None if not results else results[0] if len(results) == 1 else tuple(results)
            specs.append(OpSpec(output_specs=found, input_specs=wanted, redistribute_cost=costs))
        if not specs:
            lies = [given[i].strategies[0].output_spec.placements for i in range(rule.written)]
            raise _refusal(rule, f"one whole, or cut by heads that {mesh.shape} ranks divide", lies)
        return OpStrategy(specs)

    return strategy


def _require_one_mesh(rule: Rule, meshes: Sequence[Any]) -> None:
    for mesh in meshes:
        if mesh != meshes[0]:
            raise _refusal(rule, f"tensors of one mesh, {meshes[0]}", mesh)


def _refusal(rule: Rule, expected: str, actual: object) -> ArgumentError:
    name = rule.op._schema.name.partition("::")[2]
    return ArgumentError(name, rule.op._schema.arguments[0].name, expected, actual)


def _without_data(arg: Any) -> Any:
    """An argument as a rule sees it: a tensor on the meta device in place of what DTensor knows of one."""
    if hasattr(arg, "children"):
        return [_without_data(child) for child in arg.children]
    if not hasattr(arg, "strategies"):
        return arg
    meta = arg.tensor_meta
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")


def _together(ways: Sequence[Cut], mesh: Any) -> bool:
    """Whether every dimension of the mesh can have its way."""
    shards = {id(way): math.prod(mesh.size(i) for i, each in enumerate(ways) if each is way) for way in ways}
    if not all(way.fits(shards[id(way)]) for way in ways if way.sizes):
        return False
    different = {id(way): way for way in ways}.values()
    for entries in zip(*((*way.results, *way.arguments) for way in different), strict=True):
        dims = [dim for dim in entries if isinstance(dim, int)]
        if len(dims) != len(set(dims)):  # two ways would cut one dimension, unevenly perhaps
            return False
    return True


def _placed(mesh: Any, cuts: Sequence[int | str | None], like: Any = None) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    placements = tuple(
        Replicate() if cut is None else Shard(cut) if isinstance(cut, int) else Partial(cut) for cut in cuts
    )
    return DTensorSpec(mesh, placements, tensor_meta=None if like is None else like.tensor_meta)


def cuts(ways: Sequence[Way], arguments: Mapping[str, Any], results: Mapping[str, Sequence[int]]) -> list[Cut]:
    """Each way with the tensors of a call, from the arguments and the shapes of results by name."""
    tensors = [
        (name, tensor)
        for name, value in arguments.items()
        for tensor in (value if isinstance(value, list | tuple) else [value])
        if isinstance(tensor, Tensor)
    ]
    found = []
    for way in ({}, *ways):
        # A result that was not asked for is empty, without the dimension.
        into = [_entry(way, name, len(shape)) for name, shape in results.items()]
        of = [_entry(way, name, tensor.dim()) for name, tensor in tensors]
        sizes = {shape[dim] for shape, dim in zip(results.values(), into, strict=True) if isinstance(dim, int)}
        sizes |= {tensor.size(dim) for (_, tensor), dim in zip(tensors, of, strict=True) if isinstance(dim, int)}
        found.append(Cut(into, of, frozenset(sizes)))
    return found


def _entry(way: Way, name: str, dims: int) -> int | str | None:
    entry = way.get(name)
    return None if isinstance(entry, int) and entry >= dims else entry
