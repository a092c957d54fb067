"""A small valid call of every operator, for the tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.ops._library import operator
from flashmla_ops.sparsity.summaries import summary_bytes

INT = torch.int32


@dataclass(frozen=True)
class Call:
    """``with_gradient``: the inputs that have a gradient, and ``differentiable``: those of which one is refused. (But a
    backward refuses a gradient only when it is taken.) ``mutated``: what is written.
    """

    arguments: Callable[[], dict[str, Any]]
    differentiable: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    with_gradient: tuple[str, ...] = ()


def _decode() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 3, 6, 48),  # [b, s_q, h_q, d_qk]
        "kv_cache": torch.randn(5, 4, 2, 40),  # [n_pages, page_size, h_kv, d]
        "k_cache": torch.randn(5, 4, 2, 8),  # [n_pages, page_size, h_kv, d_k]
        "block_table": torch.tensor([[0, 3], [2, 1]], dtype=INT),
        "cache_seqlens": torch.tensor([7, 4], dtype=INT),
        "d_v": 32,
        "attn_sink": torch.randn(6),
    }


def _decode_up() -> dict[str, Any]:
    named = _decode()
    return {name: named[name] for name in list(named)[:5]} | {"weight": torch.randn(6, 32, 16)} | named


def _attend_masked() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 3, 6, 48),  # [b, s_q, h_q, d_qk]
        "kv_cache": torch.randn(2, 9, 2, 40),  # [b, s_kv, h_kv, d]
        "k_cache": torch.randn(2, 9, 2, 8),  # [b, s_kv, h_kv, d_k]
        "mask": torch.randn(1, 6, 3, 9),  # [b, h_q, s_q, s_kv]
        "d_v": 32,
    }


def _sparse_decode() -> dict[str, Any]:
    named = _decode()
    named = {name: named[name] for name in ("q", "kv_cache", "k_cache", "d_v", "attn_sink")}
    lengths = {"topk_length": torch.tensor([2, 3], dtype=INT), "extra_topk_length": torch.tensor([0, 2], dtype=INT)}
    indices = torch.tensor([0, 7, 19, -1, 20, 3] * 3, dtype=INT).view(2, 3, 3)
    extra = {"extra_kv_cache": torch.randn(3, 2, 2, 48), "extra_indices": indices[..., :2] % 7}
    return named | {"indices": indices} | lengths | extra


def _sparse_prefill() -> dict[str, Any]:
    indices = torch.tensor([0, 7, -1, 8, 9, 3] * 3, dtype=INT).view(3, 2, 3)
    named = {"q": torch.randn(3, 6, 48), "kv": torch.randn(9, 2, 48), "indices": indices, "d_v": 32}
    return named | {"attn_sink": torch.randn(6), "topk_length": torch.tensor([3, 1, 2], dtype=INT)}


def _prefill() -> dict[str, Any]:
    bounds = torch.tensor([0, 3, 7], dtype=INT)
    q, k, v = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 8)
    sequences = {"q": q, "k": k, "v": v, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    return sequences | {"causal": True, "attn_sink": torch.randn(4)}


def fields_of(name: str) -> set[str]:
    """The arguments of an operator."""
    return {argument.name for argument in operator(name)._schema.arguments}


def _backward_of(name: str, arguments: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        named = arguments()
        out, *_, lse = operator(name)(**named)
        results = {"dout": torch.randn(out.shape), "dlse": torch.randn(lse.shape), "out": out, "lse": lse}
        return named | {key: x for key, x in results.items() if key in fields_of(f"{name}_backward")}

    return made


def _append() -> dict[str, Any]:
    slots = torch.tensor([0, -1, 11])
    return {"kv_cache": torch.zeros(3, 4, 2, 40), "rows": torch.randn(3, 2, 40), "slot_mapping": slots}


def _append_two() -> dict[str, Any]:
    latent, rotary = {"kv_cache": torch.zeros(3, 4, 2, 40), "k_cache": torch.zeros(3, 4, 2, 8)}, torch.randn(3, 2, 8)
    return latent | {"rows": torch.randn(3, 2, 40), "k_rows": rotary, "slot_mapping": torch.tensor([0, -1, 11])}


def _merge() -> dict[str, Any]:
    return {"outs": list(torch.randn(2, 2, 3, 6, 32)), "lses": list(torch.randn(2, 2, 6, 3))}


def _gemm() -> dict[str, Any]:
    named = {"a": torch.randn(2, 3, 8), "weight": torch.randn(16, 8), "bias": torch.randn(16)}
    return named | {"residual": torch.randn(2, 3, 16), "weight_scale": torch.rand(16)}


def _bmm() -> dict[str, Any]:
    return {"a": torch.randn(3, 4, 8), "weight": torch.randn(3, 8, 16)}


def _grouped_gemm() -> dict[str, Any]:
    offsets = torch.tensor([0, 2, 2, 7], dtype=INT)
    return {"a": torch.randn(7, 8), "weight": torch.randn(3, 16, 8), "offsets": offsets}


def _summarize() -> dict[str, Any]:
    cache = {"kv_cache": torch.randn(3, 4, 2, 40), "k_cache": torch.randn(3, 4, 2, 8)}
    summaries = torch.zeros(3, 2, summary_bytes("codes", 4, 16), dtype=torch.uint8)
    return {"summaries": summaries, **cache, "slot_mapping": torch.tensor([3, -1, 11]), "kind": "codes", "qk_start": 32}


def _page_mass() -> dict[str, Any]:
    named = _decode()
    cached = {name: named[name] for name in ("kv_cache", "k_cache", "block_table", "cache_seqlens")}
    summaries = torch.zeros(5, 2, summary_bytes("codes", 4, 48), dtype=torch.uint8)
    return {"q": named["q"], **cached, "summaries": summaries, "kind": "codes", "sink_pages": 0, "local_pages": 1}


def _choose_pages() -> dict[str, Any]:
    tables = {
        "block_table": torch.tensor([[0, 3, 4], [2, 1, 0]], dtype=INT),
        "cache_seqlens": torch.tensor([11, 4], dtype=INT),
    }
    masses = {"mass": torch.randn(2, 6, 1, 3), "slack": torch.zeros(2, 6, 1, 3)}
    steps = {"page_size": 4, "h_kv": 2, "page_step": 2, "head_step": 1, "sink_pages": 0, "local_pages": 1}
    return masses | tables | {"rule": "certified", "limit": 0.9} | steps


def _with_out(arguments: Callable[[], dict[str, Any]], *shapes: tuple[str, tuple[int, ...]]) -> Callable[[], Any]:
    return lambda: arguments() | {name: torch.zeros(shape) for name, shape in shapes}


_GEMM = ("a", "weight", "bias", "residual", "weight_scale")
_DECODE = ("q", "kv_cache", "k_cache", "attn_sink")
_DECODE_OUT = _with_out(_decode, ("out", (2, 3, 6, 32)), ("lse", (2, 6, 3)))

CALLS = {
    "attend_masked": Call(_attend_masked, ("q", "kv_cache", "k_cache", "mask")),
    "decode": Call(_decode, with_gradient=_DECODE),
    "decode.out": Call(_DECODE_OUT, (*_DECODE, "out", "lse"), ("out", "lse")),
    "decode_up": Call(_decode_up, with_gradient=(*_DECODE, "weight")),
    "decode_schedule": Call(
        lambda: {"cache_seqlens": torch.tensor([7, 4], dtype=INT), "s_q": 3, "h_q": 6, "h_kv": 2, "num_parts": 2}
    ),
    "sparse_decode": Call(_sparse_decode, with_gradient=(*_DECODE, "extra_kv_cache")),
    "sparse_prefill": Call(_sparse_prefill, with_gradient=("q", "kv", "attn_sink")),
    "prefill": Call(_prefill, with_gradient=("q", "k", "v", "attn_sink")),
    "decode_backward": Call(_backward_of("decode", _decode)),
    "prefill_backward": Call(_backward_of("prefill", _prefill)),
    "decode_up_backward": Call(_backward_of("decode_up", _decode_up)),
    "sparse_decode_backward": Call(_backward_of("sparse_decode", _sparse_decode)),
    "sparse_prefill_backward": Call(_backward_of("sparse_prefill", _sparse_prefill)),
    "append_": Call(_append, ("kv_cache", "rows"), ("kv_cache",)),
    "append_.two": Call(_append_two, ("kv_cache", "k_cache", "rows", "k_rows"), ("kv_cache", "k_cache")),
    "merge_states": Call(_merge, ("outs[1]", "lses[0]")),
    "gemm": Call(_gemm, _GEMM),
    "gemm.out": Call(_with_out(_gemm, ("out", (2, 3, 16))), (*_GEMM, "out"), ("out",)),
    "bmm": Call(_bmm, ("a", "weight")),
    "bmm.out": Call(_with_out(_bmm, ("out", (3, 4, 16))), ("a", "weight", "out"), ("out",)),
    "grouped_gemm": Call(_grouped_gemm, ("a", "weight")),
    "grouped_gemm.out": Call(_with_out(_grouped_gemm, ("out", (7, 16))), ("a", "weight", "out"), ("out",)),
    "summarize_": Call(_summarize, ("kv_cache", "k_cache"), ("summaries",)),
    "page_mass": Call(_page_mass, ("q", "kv_cache", "k_cache")),
    "choose_pages": Call(_choose_pages, ("mass", "slack")),
    "quantize_rows": Call(lambda: {"rows": torch.randn(2, 576)}, ("rows",)),
    "dequantize_rows": Call(lambda: {"rows": torch.zeros(2, 656, dtype=torch.uint8)}),
}

#: Every operator with each of its arguments that have a gradient, and with each of which one is refused.
WITH_GRADIENT = [(name, argument) for name, call in CALLS.items() for argument in call.with_gradient]
DIFFERENTIABLE = [(name, argument) for name, call in CALLS.items() for argument in call.differentiable]
#: Every operator with each argument that it writes.
MUTATED = [(name, argument) for name, call in CALLS.items() for argument in call.mutated]


def run(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Call the operator; its results, and after them what it wrote."""
    result = operator(name)(**arguments)
    results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return [*results, *(arguments[written] for written in CALLS[name].mutated)]


def get(arguments: dict[str, Any], argument: str) -> Tensor:
    """The tensor that ``argument`` names: ``q``, or ``outs[1]``."""
    name, _, index = argument.rstrip("]").partition("[")
    return arguments[name][int(index)] if index else arguments[name]


def replaced(arguments: dict[str, Any], argument: str, tensor: Tensor) -> dict[str, Any]:
    name, _, index = argument.rstrip("]").partition("[")
    if not index:
        return arguments | {name: tensor}
    return arguments | {name: [tensor if i == int(index) else x for i, x in enumerate(arguments[name])]}
