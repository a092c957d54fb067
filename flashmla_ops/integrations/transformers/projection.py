"""Whether ``kv_b_proj`` computes what its weight says. Absorbed attention reads the weight alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flashmla_ops.nn.fast_linear import FastLinear

PLAIN = "a plain nn.Linear without bias, hooks or adapters"


def obstacle(projection: nn.Module) -> str:
    """The reason why a projection is more than its weight; empty if there is none.

    Quantised, adapted (LoRA), parametrized, offloaded and hooked layers are more than their weight.
    """
    # By identity: the class of FastLinear says that it equals nn.Linear, and so do those derived from it.
    if not any(type(projection) is known for known in (nn.Linear, FastLinear)):
        return _other_class(projection)
    if projection.bias is not None:
        return "it has a bias"
    if _is_cut_by_rows(projection):
        return ""
    if "forward" in vars(projection):
        return "its forward was replaced, as offloading to another device does"
    if torch.compiler.is_exporting():  # which makes every weight a fake tensor and hooks every module
        return ""
    if type(projection.weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {_name(type(projection.weight))}, as quantisation makes it"
    if projection.weight.is_meta:
        return "its weight is on the meta device: it was offloaded, or not loaded"
    if projection._forward_hooks or projection._forward_pre_hooks:
        return "it has forward hooks"
    return ""


def weight_of(projection: nn.Module) -> Tensor:
    """The weight of a projection without `obstacle`: this rank's rows, if transformers cut it over ranks."""
    weight: Any = projection.weight
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local


def _is_cut_by_rows(projection: nn.Module) -> bool:
    """Whether a tensor-parallel plan of transformers gave each rank some rows, which make some of the outputs."""
    placements = getattr(projection.weight, "placements", ())
    wrapped = getattr(vars(projection).get("forward"), "__qualname__", "")
    return [each.is_shard(0) for each in placements] == [True] and wrapped.startswith("TensorParallelLayer.")


def _other_class(projection: nn.Module) -> str:
    if is_parametrized(projection):
        return "it is parametrized by torch.nn.utils.parametrize"
    name = _name(type(projection))
    if isinstance(projection, nn.Linear):
        return f"it is a {name}, a subclass of nn.Linear"
    return f"it is a {name}, and no nn.Linear"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
