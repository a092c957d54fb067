"""`compress`: attention layers of GQA as MLA of a chosen rank, from calibration data. Not exact: it says what it costs.

The cache of a GQA layer holds g keys and g values of d elements a token. Here it holds a latent of ``rank`` elements,
from which every head's key and value are expanded, and ``rotary * d`` elements of shared rotary keys:

1. *The rotary part.* A rotary embedding turns each pair of elements of a key by an angle that all heads share, so the
   g heads' pairs of one frequency may be mixed before or after they are turned. For each frequency the ``rotary``
   directions among the heads in which keys matter most to the queries are kept as shared rotary keys (TransMLA, Meng
   et al., arXiv:2502.07864; a principal component analysis, here weighted by the energy of the queries).
2. *The rest of each key* has no position of its own in MLA. In place of each pair's turn stands its mean over the
   distances at which the layer attends (MHA2MLA, Ji et al., arXiv:2502.14837, leaves the turn out).
3. *The latent* is the joint low-rank of those keys and of the values (both papers; a singular value decomposition). A
   key's error counts by the queries that meet it, a value's by the output projection, and both in all alike.

All of it needs the second moments of a layer's input and its distances alone. With ``rotary`` = g and ``rank`` = g * d
nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError, UnsupportedModelError
from flashmla_ops.integrations.transformers.hook import nothing_served, served_modules
from flashmla_ops.nn.calibration import Calibration, calibrate, output_errors, perplexity
from flashmla_ops.nn.fresh import fresh_attention
from flashmla_ops.nn.layer import FlashMLALayer, why_unconvertible

OP = "compress"
#: Types whose queries, keys and values are linear in the layer's input, and whose rotary embedding turns whole heads.
COMPRESSIBLE = ("llama", "mistral", "qwen2")
#: How much a direction counts that the calibration data lack, against one of average strength in them.
UNSEEN = 1e-6


@dataclass(frozen=True)
class Compression:
    """What `compress` did."""

    rank: int
    rotary: int
    errors: list[float]  # of each layer's output for the inputs that it had before, relative, on the first sequence
    bytes_before: int  # a token, in all layers
    bytes_after: int
    perplexity_before: float | None = None  # on the evaluation data
    perplexity_after: float | None = None


def compress(
    model: nn.Module,
    rank: int,
    calibration: Tensor,  # [n, s] int64 token ids
    *,
    rotary: int = 1,
    evaluation: Tensor | None = None,  # [n, s] int64
) -> Compression:
    """Put an MLA `FlashMLALayer` of ``rank`` in the place of every attention of ``model``; `restore` undoes it.

    ``calibration`` are sequences of tokens like those that the model will see: the more, the better the latent's
    directions. ``evaluation`` are others, on which perplexity is measured before and after. The caches of generation
    then hold latents; the model's configuration stays what it was, so that ``from_pretrained`` of what is saved from
    it knows nothing of the latents.

    Raises, leaving the model unchanged, `UnsupportedModelError` for a model whose attention is not one of
    `COMPRESSIBLE`, and `ArgumentError` for a rank or a number of rotary keys that it has no use for.
    """
    layers = _layers(model, rank, rotary)
    before = None if evaluation is None else perplexity(model, evaluation)
    seen = calibrate(model, [layer for _, layer in layers], calibration)
    made = [_Factors(layer, each, rank, rotary).layer(layer) for (_, layer), each in zip(layers, seen, strict=True)]
    errors = output_errors(model, [layer for _, layer in layers], made, calibration[:1])
    for (name, _), layer in zip(layers, made, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    first: Any = layers[0][1]
    size = first.o_proj.weight.element_size() * len(layers)
    heads = first.config.num_key_value_heads
    return Compression(
        rank=rank,
        rotary=rotary,
        errors=errors,
        bytes_before=2 * heads * first.head_dim * size,
        bytes_after=(rank + rotary * first.head_dim) * size,
        perplexity_before=before,
        perplexity_after=None if evaluation is None else perplexity(model, evaluation),
    )


def _layers(model: nn.Module, rank: int, rotary: int) -> list[tuple[str, nn.Module]]:
    layers = served_modules(model)
    if not layers:
        raise UnsupportedModelError(nothing_served(model))
    for name, layer in layers:
        if reason := why_unconvertible(layer):
            raise UnsupportedModelError(f"{name}{reason}")
        if layer.config.model_type not in COMPRESSIBLE:
            raise UnsupportedModelError(
                f"{name}: model type '{layer.config.model_type}' has queries or keys that are not linear in the input,"
                f" or another rotary embedding; known: {', '.join(COMPRESSIBLE)}"
            )
        heads, d = layer.config.num_key_value_heads, layer.head_dim
        if not 1 <= rotary <= heads:
            raise ArgumentError(OP, "rotary", f"1 to {heads}, the KV heads", rotary)
        most = (2 * heads - rotary) * d
        if not 1 <= rank <= most:
            raise ArgumentError(OP, "rank", f"1 to {most}, with which all of {heads} keys and values fit", rank)
    return layers


class _Factors:
    """The weights of one layer of MLA, in float64. ``x`` is the layer's input with a 1 behind it, [e + 1]."""

    def __init__(self, layer: Any, seen: Calibration, rank: int, rotary: int) -> None:
        self.rank, self.rotary, self.d = rank, rotary, layer.head_dim
        self.h_q, self.g = layer.config.num_attention_heads, layer.config.num_key_value_heads
        q, k, v = (_affine(each) for each in (layer.q_proj, layer.k_proj, layer.v_proj))
        self.queries = q.view(self.h_q, self.d, -1)
        # Directions that the calibration data lack count a little, so that they are left out last among equals.
        n = len(seen.moments)
        moments = seen.moments + torch.eye(n, dtype=torch.float64) * seen.moments.trace() / n * UNSEEN
        query_moments = self._group_moments(self.queries, moments)  # [g, d, d]
        shared, rest = self._rotary_part(k, query_moments, moments)
        self.shared = shared  # [rotary, d, e + 1]
        self.mix: Tensor  # [g, rotary, d / 2]
        rest = _turn(rest, *seen.mean_turn(self.d))  # [g, d, e + 1]
        key_metric = _root(query_moments)  # [g, d, d]: a key's error e counts |metric e|^2
        output = layer.o_proj.weight.detach().double().view(-1, self.g, self.h_q // self.g, self.d)
        value_metric = _root(torch.einsum("ogid,ogie->gde", output, output))
        values = v.view(self.g, self.d, -1)
        self._joint(rest, key_metric, values, value_metric, moments)

    def _group_moments(self, queries: Tensor, moments: Tensor) -> Tensor:
        """E[q q^T] of the heads of each group, with pairs made alike: a turn mixes the two elements of a pair."""
        each = torch.einsum("hdx,xy,hey->hde", queries, moments, queries).view(self.g, -1, self.d, self.d).sum(1)
        half = self.d // 2
        real = each[:, :half, :half] + each[:, half:, half:]
        imaginary = each[:, half:, :half] - each[:, :half, half:]
        top = torch.cat([real, -imaginary], dim=2)
        return torch.cat([top, torch.cat([imaginary, real], dim=2)], dim=1) / 2

    def _rotary_part(self, k: Tensor, query_moments: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """The shared rotary keys ``[rotary, d, e + 1]`` and what is left of each head's ``[g, d, e + 1]``.

        Sets ``mix``: how much of shared key c is in head j's pair at frequency l.
        """
        half = self.d // 2
        pairs = k.view(self.g, 2, half, -1)
        strength = query_moments.diagonal(dim1=1, dim2=2)[:, :half].sqrt().clamp(min=1e-12)  # [g, d / 2]
        weighted = pairs * strength[:, None, :, None]
        covariance = torch.einsum("gplx,xy,hply->lgh", weighted, moments, weighted)
        directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[..., : self.rotary]  # [d / 2, g, rotary]
        shared = torch.einsum("lgc,gplx->cplx", directions, weighted)
        self.mix = (directions / strength.T[..., None]).permute(1, 2, 0)
        rest = pairs - torch.einsum("gcl,cplx->gplx", self.mix, shared)
        return shared.flatten(1, 2), rest.flatten(1, 2)

    def _joint(self, keys: Tensor, key_metric: Tensor, values: Tensor, value_metric: Tensor, moments: Tensor) -> None:
        """The latent's projection ``down [rank, e + 1]`` and expansions ``up_k``, ``up_v [g, d, rank]``."""
        seen_keys, seen_values = key_metric @ keys, value_metric @ values
        energies = _energy(seen_keys, moments), _energy(seen_values, moments)
        # Half of all that counts is keys, half values. Where no keys are left, all is values.
        scales = [
            energy.clamp(min=1e-300) ** -0.5 if energy > 1e-20 * energies[1] else energy * 0 for energy in energies
        ]
        both = torch.cat([seen_keys.flatten(0, 1) * scales[0], seen_values.flatten(0, 1) * scales[1]])
        basis = torch.linalg.eigh(both @ moments @ both.T).eigenvectors.flip(-1)[:, : self.rank]
        self.down = basis.T @ both
        parts = basis.view(2, self.g, self.d, self.rank)
        inverse = [torch.linalg.pinv(metric, hermitian=True) for metric in (key_metric, value_metric)]
        self.up_k = inverse[0] @ parts[0] / scales[0] if scales[0] else torch.zeros_like(parts[0])
        self.up_v = inverse[1] @ parts[1] / scales[1]

    def layer(self, replaced: Any) -> FlashMLALayer:
        """The layer of MLA that stands where ``replaced`` stood, in its dtype, on its device."""
        sizes = {
            "embed_dim": replaced.o_proj.out_features,
            "num_heads": self.h_q,
            "kv_lora_rank": self.rank,
            "q_lora_rank": None,
            "qk_nope_head_dim": self.d,
            "qk_rope_head_dim": self.rotary * self.d,
            "v_head_dim": self.d,
        }
        attention: Any = fresh_attention(sizes, False, replaced.layer_idx)
        attention.config.rope_interleave = False
        attention.scaling, attention.attention_dropout = replaced.scaling, replaced.attention_dropout
        weight = replaced.o_proj.weight
        attention.q_proj = _linear(self._query_rows(), weight)
        attention.kv_a_proj_with_mqa = _linear(torch.cat([self.down, _halves(self.shared)]), weight)
        attention.kv_a_layernorm = nn.Identity()
        group = torch.arange(self.h_q) // (self.h_q // self.g)
        expansion = torch.cat([self.up_k[group], self.up_v[group]], dim=1).flatten(0, 1)
        attention.kv_b_proj = _linear(expansion, weight, bias=False)
        attention.o_proj = replaced.o_proj
        if self.rotary > 1:
            attention.register_forward_pre_hook(_repeat_turns, with_kwargs=True)
        layer = FlashMLALayer.from_attention(attention.train(replaced.training))
        layer.replaced = (replaced,)
        return layer

    def _query_rows(self) -> Tensor:
        """Each head's query as it is, for the key without position; then its pairs as the shared keys have them."""
        group = torch.arange(self.h_q) // (self.h_q // self.g)
        pairs = self.queries.view(self.h_q, 1, 2, self.d // 2, -1) * self.mix[group][:, :, None, :, None]
        rotary = torch.stack([_halves(each.flatten(1, 2)) for each in pairs])  # [h_q, rotary * d, e + 1]
        return torch.cat([self.queries, rotary], dim=1).flatten(0, 1)


def _affine(linear: Any) -> Tensor:
    """``[out, in + 1]`` float64: the weight, and the bias behind it."""
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return torch.cat([linear.weight, bias[:, None]], dim=1).detach().double()


def _linear(rows: Tensor, like: Tensor, bias: bool = True) -> nn.Linear:
    """A layer of ``rows [out, in + 1]``, whose last column is the bias, or of ``[out, in]`` without one."""
    weight, offsets = (rows[:, :-1], rows[:, -1]) if bias else (rows, None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=offsets is not None and bool(offsets.any()))
    linear.to(like)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None and offsets is not None:
            linear.bias.copy_(offsets)
    return linear


def _halves(keys: Tensor) -> Tensor:
    """``[c, d, n]`` to ``[c * d, n]``: the first elements of all pairs, then the second, as rotary embedding wants."""
    c, d, n = keys.shape
    return keys.view(c, 2, d // 2, n).transpose(0, 1).reshape(c * d, n)


def _turn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``keys [g, d, n]`` turned: pair l by the angle with cos[l] and sin[l]."""
    first, second = keys.chunk(2, dim=1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)


def _root(metric: Tensor) -> Tensor:
    """The symmetric root of ``[g, d, d]``."""
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = vectors @ (values.clamp(min=0.0).sqrt()[..., None] * vectors.mT)
    return root


def _energy(rows: Tensor, moments: Tensor) -> Tensor:
    """E |rows x|^2."""
    flat = rows.flatten(0, -2)
    return torch.einsum("rx,xy,ry->", flat, moments, flat)


def _repeat_turns(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a layer with several shared rotary keys: the host's turns, which are for one, once for each."""
    repeats = module.qk_rope_head_dim // kwargs["position_embeddings"][0].shape[-1]
    turns = tuple(each.repeat(1, 1, repeats) for each in kwargs["position_embeddings"])
    return args, kwargs | {"position_embeddings": turns}
