"""What the decode operator is compared with: other ways to attend over the same paged cache.

A peer is a plugin: its name, why it may be absent, and a function that binds it to a case. Peers read the same pages
through the same block table. They may assume what their authors would: here that all sequences are equally long, so
none of them spends time on a mask.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeInputs:
    """The tensors of one decode case. ``caches`` hold equal rows; each call takes the next, so that none is cached."""

    q: Tensor  # [b, 1, h_q, d_qk]
    caches: tuple[Tensor, ...]  # each [n_pages, page_size, 1, d_qk]
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32, all equal
    d_v: int
    softmax_scale: float


#: An implementation bound to a case: kv_cache -> out [b, 1, h_q, d_v].
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    name: str
    description: str
    bind: Callable[[DecodeInputs], Decode]
    #: Why this machine cannot run it, or None.
    missing: Callable[[], str | None] = lambda: None


def gather(kv_cache: Tensor, block_table: Tensor) -> Tensor:
    """[n_pages, page_size, 1, d], [b, max_pages] -> [b, s_kv, d]: a dense copy of every sequence's rows."""
    return kv_cache[block_table].flatten(1, 3)


def gather_and_softmax(q: Tensor, kv_cache: Tensor, block_table: Tensor, d_v: int, scale: float) -> Tensor:
    """Absorbed MLA attention in plain torch: [b, 1, h_q, d_qk] -> [b, 1, h_q, d_v]."""
    rows = gather(kv_cache, block_table)
    scores = q.squeeze(1) @ rows.transpose(1, 2) * scale
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ rows[..., :d_v]).unsqueeze(1)


def gather_and_sdpa(q: Tensor, kv_cache: Tensor, block_table: Tensor, d_v: int, scale: float) -> Tensor:
    """As `gather_and_softmax`, through scaled_dot_product_attention with the query heads as the rows of one head."""
    rows = gather(kv_cache, block_table).unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(q, rows, rows[..., :d_v], scale=scale)


def bind_torch(function: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]) -> Callable[[DecodeInputs], Decode]:
    def bind(inputs: DecodeInputs) -> Decode:
        return lambda cache: function(inputs.q, cache, inputs.block_table, inputs.d_v, inputs.softmax_scale)

    return bind


def bind_compiled(inputs: DecodeInputs) -> Decode:
    torch.compiler.reset()  # each case has the compiler to itself: no recompile limit, no dynamic shapes from the last
    return bind_torch(torch.compile(gather_and_softmax, fullgraph=True, dynamic=False))(inputs)


def no_compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and {compiler!r} is not there"


PEERS = (
    Peer("torch eager", "gather the pages, two matmuls and a softmax", bind_torch(gather_and_softmax)),
    Peer("torch.compile", "the same, compiled with static shapes by Inductor", bind_compiled, no_compiler),
    Peer("torch SDPA", "gather the pages, then SDPA with query heads as rows", bind_torch(gather_and_sdpa)),
)


def select(names: list[str] | None) -> tuple[Peer, ...]:
    """The peers with these names; all of them for None."""
    known = {peer.name: peer for peer in PEERS}
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return PEERS if names is None else tuple(known[name] for name in names)
