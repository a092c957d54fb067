"""Models of transformers whose layers are spread over ranks: each rank has some of them, with caches for those alone.

The first rank embeds tokens, each sends what its layers made to the next, and the last computes the logits and sends
them to all. A single batch passes one rank after another, so that ranks wait for each other; `generate_in_turns` keeps
as many batches in flight as there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashmla_ops.errors import ArgumentError, UnsupportedModelError
from flashmla_ops.parallel.line import OP, Line
from flashmla_ops.parallel.tensor import checked_config

#: Model types whose layers need nothing but the states of the layer before.
MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "gemma2", "llama", "minicpm3", "mistral", "qwen2", "qwen3")


def pipeline_parallel(model: nn.Module, mesh: DeviceMesh, layers: Sequence[int] | None = None) -> range:
    """Keep of ``model``, in place, the layers of this rank of ``mesh``, which has one dimension.

    Every rank calls it with the same model, before or after `enable` and `tensor_parallel` over another dimension of a
    larger mesh, and then calls the model with the same inputs; each gets the logits of the whole. ``layers`` says how
    many each rank has; without it they have equally many, the first ones one more where there is a rest.
    ``model.config`` then describes this rank's layers. Returns which they were. Raises, leaving the model as it was,
    `ArgumentError` for a mesh of several dimensions or ``layers`` that are not one positive number for each rank with
    the sum of all, and `UnsupportedModelError` for a model of another type or one that was cut before. In a forward
    raises `NotDifferentiableError` where a gradient is required, and `RankError` if a rank does not answer.
    """
    config = checked_config(OP, model, mesh, MODEL_TYPES, "layers")
    causal: Any = model
    body = causal.model
    if hasattr(body, "line"):
        raise UnsupportedModelError("the model's layers were spread over ranks before")
    first, last = _span(len(body.layers), mesh, layers)
    line = Line(mesh.get_group())
    body.line = line
    width = (config.hidden_size, config.vocab_size)
    body.layers = body.layers[first:last]
    for module in body.layers.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx -= first
    config.num_hidden_layers = last - first
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types)[first:last]
    if not line.is_first:
        body.embed_tokens = _Shaped(width[0], body.embed_tokens.weight)
        body.layers[0].register_forward_pre_hook(line.receive_states)
    if line.is_last:
        causal.lm_head.register_forward_hook(line.send_logits)
    else:
        body.layers[-1].register_forward_hook(line.send_states)
        body.norm = nn.Identity()
        causal.lm_head = _Received(width[1], line)
    return range(first, last)


def _span(count: int, mesh: DeviceMesh, layers: Sequence[int] | None) -> tuple[int, int]:
    rank, ranks = mesh.get_local_rank(), mesh.size()
    if layers is None:
        layers = [count // ranks + (i < count % ranks) for i in range(ranks)]
    if len(layers) != ranks or sum(layers) != count or min(layers) < 1:
        raise ArgumentError(OP, "layers", f"{ranks} positive numbers whose sum is {count}", list(layers))
    ends = [0, *accumulate(layers)]
    return ends[rank], ends[rank + 1]


class _Shaped(nn.Module):
    """In place of an embedding: states without values, of the shape and type that come from the rank before."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("like", like.new_empty(0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        like: Any = self.like
        states: Tensor = like.new_zeros(*tokens.shape, self.width)
        return states


class _Received(nn.Module):
    """In place of the projection to logits: those of the last rank."""

    def __init__(self, width: int, line: Line) -> None:
        super().__init__()
        self.width, self.line = width, line

    def forward(self, states: Tensor) -> Tensor:
        return self.line.take(states.new_empty(*states.shape[:-1], self.width))


@torch.no_grad()
def generate_in_turns(
    model: nn.Module,
    batches: Sequence[Tensor],  # each [b, s] integers, without padding; b and s may differ
    max_new_tokens: int,
    *,
    eos_token_id: int | None = None,
) -> list[Tensor]:
    """Greedy tokens [b, s + n] for each batch, n <= ``max_new_tokens``, by a model that `pipeline_parallel` cut.

    While one rank computes a batch, the others compute others: with as many batches as ranks, none waits for long.
    Every rank calls it with the same batches and gets the same tokens, which are those that ``model.generate`` gives
    for each batch. A batch ends where all its sequences have ``eos_token_id``, which also fills those that had it
    before. Raises `UnsupportedModelError` for a model that was not cut, and `RankError` if a rank does not answer.
    """
    from transformers import DynamicCache

    from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT

    causal: Any = model
    line: Line | None = getattr(causal.model, "line", None)
    if line is None:
        raise UnsupportedModelError("expected a model that pipeline_parallel cut")
    tokens = list(batches)
    unread = list(batches)
    caches = [DynamicCache(config=causal.config) for _ in batches]
    ended = [torch.zeros(len(batch), dtype=torch.bool) for batch in batches]
    for step in range(max_new_tokens + 1):
        for i, cache in enumerate(caches):
            if step > 0 and not ended[i].all():
                unread[i] = line.take(unread[i][:, 0])[:, None]
                if eos_token_id is not None:
                    unread[i] = unread[i].masked_fill(ended[i][:, None], eos_token_id)
                    ended[i] |= unread[i][:, 0] == eos_token_id
                tokens[i] = torch.cat([tokens[i], unread[i]], dim=1)
            if step < max_new_tokens and not ended[i].all():
                states = causal.model(unread[i], use_cache=True, **{CACHE_ARGUMENT: cache}).last_hidden_state
                if line.is_last:
                    with line.keeping_logits():
                        line.give(causal.lm_head(states[:, -1]).argmax(-1))
    line.wait()
    return tokens
