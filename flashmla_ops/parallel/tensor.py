"""Models of transformers whose heads are spread over ranks: each rank has its heads' weights, and caches for them.

Projections to heads are cut by rows of their weights, the one from heads by columns; what it computes is added over
ranks. The latents of MLA are every rank's, and so are their caches; keys and values of GQA are cut with the heads. An
MLP whose width divides is cut alike. The projection to logits is cut by words, and every rank gathers the logits of
all. All other layers, experts among them, are whole on every rank. Weights stay plain tensors, so that
`flashmla_ops.integrations.transformers.enable` serves the model as any other.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashmla_ops.errors import ArgumentError, NotDifferentiableError, UnsupportedModelError
from flashmla_ops.parallel.collectives import added, gathered

OP = "tensor_parallel"
#: Model types whose attention computes each head from these projections alone: to heads, and from heads.
LATENT, GROUPED = ("q_proj", "q_b_proj", "kv_b_proj"), ("q_proj", "k_proj", "v_proj")
TO_HEADS = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
}
FROM_HEADS = "o_proj"
HEAD = "lm_head"
TO_WIDTH, FROM_WIDTH = ("gate_proj", "up_proj"), "down_proj"


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> int:
    """Keep of ``model``, in place, the heads of this rank of ``mesh``, which has one dimension.

    Every rank calls it with the same model, before or after `enable`, and then calls the model with the same inputs;
    each gets the whole result. Returns how many attention layers were cut. Raises, leaving the model as it was,
    `ArgumentError` for a mesh of several dimensions or heads that its ranks do not divide, and `UnsupportedModelError`
    for a model of another type, or one whose projections are more than ``nn.Linear``. In a forward raises
    `NotDifferentiableError` where a gradient is required, and `RankError` if a rank does not answer.
    """
    config = checked_config(OP, model, mesh, TO_HEADS, "heads")
    ranks = mesh.size()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % ranks:
            raise ArgumentError(OP, f"model.config.{name}", f"a multiple of {ranks} ranks", getattr(config, name))
    modules: list[Any] = list(model.modules())
    attention = [m for m in modules if hasattr(m, "layer_idx") and hasattr(m, FROM_HEADS)]
    columns = [getattr(m, name) for m in attention for name in TO_HEADS[config.model_type] if getattr(m, name, None)]
    rows = [getattr(m, FROM_HEADS) for m in attention]
    for module in modules:
        if _is_wide(module) and module.gate_proj.out_features % ranks == 0:
            columns += [getattr(module, name) for name in TO_WIDTH]
            rows.append(getattr(module, FROM_WIDTH))
    head = getattr(model, HEAD, None)
    head = head if isinstance(head, nn.Linear) and head.out_features % ranks == 0 else None
    for layer in (*columns, *rows):
        if not isinstance(layer, nn.Linear) or layer._forward_hooks:
            raise UnsupportedModelError(f"expected a plain nn.Linear that was not cut before, got {layer}")
    for layer in columns:
        _keep(layer, 0, mesh)
    for layer in rows:
        _keep(layer, 1, mesh)
        layer.register_forward_hook(partial(_add, mesh.get_group()))
    if head is not None:
        _keep(head, 0, mesh)
        # Before what sends the logits to others.
        head.register_forward_hook(partial(_join, mesh.get_group()), prepend=True)
    return len(attention)


def checked_config(op: str, model: nn.Module, mesh: DeviceMesh, known: Collection[str], cut: str) -> Any:
    """The model's configuration. Raises for a mesh of several dimensions, and for a model type that is not known."""
    if mesh.ndim != 1:
        raise ArgumentError(op, "mesh", "a mesh of 1 dimension", f"{mesh.ndim} dimensions")
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in known:
        raise UnsupportedModelError(f"model type {model_type!r} is not known to be cut by {cut}: {', '.join(known)}")
    return config


def _is_wide(module: Any) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in (*TO_WIDTH, FROM_WIDTH))


def _keep(layer: nn.Linear, dim: int, mesh: DeviceMesh) -> None:
    """This rank's rows (0) or columns (1) of the weight. The bias of what is added is rank 0's alone."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    layer.weight = _part(layer.weight, dim, rank, ranks)
    layer.out_features, layer.in_features = layer.weight.shape
    if layer.bias is not None and dim == 0:
        layer.bias = _part(layer.bias, 0, rank, ranks)
    elif rank > 0:
        layer.register_parameter("bias", None)


def _part(parameter: Tensor, dim: int, rank: int, ranks: int) -> nn.Parameter:
    part = parameter.detach().chunk(ranks, dim)[rank].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _add(group: dist.ProcessGroup, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    if torch.is_grad_enabled() and out.requires_grad:
        raise NotDifferentiableError(OP, "model")
    return added(out, group)


def _join(group: dist.ProcessGroup, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    if torch.is_grad_enabled() and out.requires_grad:
        raise NotDifferentiableError(OP, "model")
    return torch.cat(gathered(out, group), dim=-1)
