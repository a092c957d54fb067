"""zentorch: AMD's attention for CPUs. Its matmul operators are left out: the results of some calls were wrong."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from bench.dense import PrefillInputs
from bench.paged import PagedInputs
from bench.peers import torch_paged, torch_prefill
from bench.suite import Bound, Peer

NAME = "zentorch"


@functools.cache
def missing() -> str | None:
    """Importing it defines ``torch.ops.zentorch``."""
    try:
        importlib.import_module("zentorch")
    except (ImportError, OSError, RuntimeError) as error:
        return f"not importable ({error}): `make bench-peers` sets it up"
    return None


def sdpa(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool = False) -> Tensor:
    """[b, h, s, d] as everywhere. Values must be as wide as keys."""
    out: Tensor = torch.ops.zentorch.zentorch_sdpa(q, keys, values, 0.0, causal, scale=scale)[0]
    return out


def rows_of_groups(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The key of an MLA row is wider than the value, which is its first part: the whole row is given as the value too,
    and the result is cut."""
    if keys.size(-1) == values.size(-1):
        return sdpa(q, keys, values, scale)
    return sdpa(q, keys, keys, scale)[..., : values.size(-1)].contiguous()


def bind_prefill(inputs: PrefillInputs) -> Bound:
    case = inputs.case
    pad = case.d_qk - case.d_v

    def attend(sequence: slice) -> Tensor:
        values = torch.nn.functional.pad(inputs.v, (0, pad)) if pad else inputs.v
        q, k, v = (torch_prefill.batched(tensor, sequence) for tensor in (inputs.q, inputs.k, values))
        return sdpa(q, k, v, inputs.softmax_scale, case.causal)[0, ..., : case.d_v].transpose(0, 1)

    return torch_prefill.by_sequence(inputs, attend)


def unsupported(inputs: PagedInputs) -> str | None:
    if inputs.case.dtype == "fp16":
        return "bf16 and fp32 only"
    return torch_paged.unmasked(inputs)


PAGED: Peer[PagedInputs] = Peer(
    NAME,
    "gather the pages, then zentorch_sdpa with query heads as rows",
    torch_paged.rows_of_groups(rows_of_groups),
    missing,
    unsupported,
)
PREFILL: Peer[PrefillInputs] = Peer(
    NAME,
    "zentorch_sdpa, sequence by sequence; narrow values padded in the call",
    bind_prefill,
    missing,
)
