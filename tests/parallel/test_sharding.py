"""Operators take DTensors, however they lie, and compute what one process computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from flashmla_ops.errors import ArgumentError, typed
from flashmla_ops.ops._library import DEFINED, operator
from flashmla_ops.parallel.local import LocalRanks
from tests.support.calls import CALLS, run

OPERATORS = [name for name in CALLS if not name.endswith(".out")]
WRITE = [name for name in OPERATORS if CALLS[name].mutated]


def several_heads(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    return CALLS[name].arguments()


def one_head(name: str) -> dict[str, Any]:
    """The same with one KV head, which every rank reads."""
    named = several_heads(name)
    if name in WRITE:
        return named
    for key, dim in {"kv_cache": 2, "k_cache": 2, "extra_kv_cache": 2, "k": 1, "v": 1, "kv": 1, "summaries": 1}.items():
        if key in named:
            named[key] = named[key].narrow(dim, 0, 1)
    if name.startswith("sparse_prefill"):
        named["indices"] = named["indices"][:, :1]
    if name.endswith("_backward"):
        given = {key: value for key, value in named.items() if key not in ("dout", "dlse", "out", "lse")}
        out, *_, lse = operator(name.removesuffix("_backward"))(**given)
        named |= {key: x for key, x in {"out": out, "lse": lse}.items() if key in named}
    return named | ({"h_kv": 1} if "h_kv" in named else {})


def ways(name: str, named: dict[str, Any]) -> list[dict[str, int]]:
    """The ways of an operator's rule: the dimension in which each argument is cut, by name."""
    cuts = DEFINED[name].sharding
    assert cuts is not None
    order = [a.name for a in operator(name)._schema.arguments for _ in tensors_of(named.get(a.name))]
    found = [zip(order, cut.arguments, strict=True) for cut in cuts(**named)]
    return [{key: dim for key, dim in entries if isinstance(dim, int)} for entries in found]


def tensors_of(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, Tensor)]


def spread(value: Any, mesh: Any, placements: list[Placement]) -> Any:
    if isinstance(value, list):
        return [spread(x, mesh, placements) for x in value]
    return distribute_tensor(value, mesh, placements) if isinstance(value, Tensor) else value


def along(mesh: Any, dim: int, cut: int | None) -> list[Placement]:
    """Cut along one dimension of the mesh."""
    return [Shard(cut) if i == dim and cut is not None else Replicate() for i in range(mesh.ndim)]


def as_in_one_process(name: str, named: dict[str, Any], placed: dict[str, Any], where: str) -> list[DTensor]:
    expected = run(name, named)
    results = run(name, placed)
    for result, wanted in zip(results, expected, strict=True):
        assert isinstance(result, DTensor), where
        torch.testing.assert_close(result.full_tensor(), wanted, atol=2e-6, rtol=2e-6, msg=lambda m: f"{where}: {m}")
    return results


def try_ways(mesh_shape: tuple[int, ...]) -> set[str]:
    """Every operator in every way of its rule, along each dimension of the mesh. Returns those that were cut."""
    mesh = init_device_mesh("cpu", mesh_shape)
    cut = set()
    for name, make, dim in itertools.product(OPERATORS, (several_heads, one_head), range(mesh.ndim)):
        for way in ways(name, make(name)):
            named = make(name)
            ranks = mesh.size(dim)
            if name in WRITE and any(tensors_of(named[key])[0].size(at) % ranks for key, at in way.items()):
                continue
            placed = {key: spread(value, mesh, along(mesh, dim, way.get(key))) for key, value in named.items()}
            results = as_in_one_process(name, named, placed, f"{name}, {way} along {dim} of {mesh_shape}")
            if not all(placement.is_replicate() for result in results for placement in result.placements):
                cut.add(name)
    return cut


def try_placements(mesh_shape: tuple[int, ...]) -> None:
    """Each tensor alone cut in each of its dimensions, the others whole: whatever has no way is moved, or refused."""
    mesh = init_device_mesh("cpu", mesh_shape)
    for name, make in itertools.product(OPERATORS, (several_heads, one_head)):
        for key, value in make(name).items():
            for at in range(tensors_of(value)[0].dim() if tensors_of(value) else 0):
                named = make(name)
                cuts = dict.fromkeys(named) | {key: at}
                placed = {k: spread(v, mesh, along(mesh, 0, cuts[k])) for k, v in named.items()}
                # What is written to stays where it lies, and two caches that are written to lie alike.
                written = CALLS[name].mutated
                divides = tensors_of(value)[0].size(at) % mesh.size(0) == 0
                served = len(written) == 1 and divides and any(w.get(key) == at for w in ways(name, named))
                if key in written and not served:
                    with pytest.raises(ArgumentError, match=f"{name.partition('.')[0]}: argument"), typed():
                        run(name, placed)
                else:
                    as_in_one_process(name, named, placed, f"{name}, {key} cut in {at}")


def test_every_way_of_every_operator(two: LocalRanks) -> None:
    for cut in two.run(try_ways, (2,)):
        assert cut == set(OPERATORS) - {"decode_schedule"}


def test_every_placement_of_every_argument(two: LocalRanks) -> None:
    two.run(try_placements, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)])
def test_on_four_ranks(four: LocalRanks, mesh_shape: tuple[int, ...]) -> None:
    four.run(try_ways, mesh_shape)
    four.run(try_placements, mesh_shape)
