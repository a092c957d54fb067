"""Memory that attention uses besides its inputs and outputs, by level of the kernels' hierarchy.

The kernels are a hierarchy: a sequence is cut into parts that run in parallel, a part is blocks of tokens that stay in
cache, a block is register tiles. ``levels`` (of ``flashmla::decode`` and ``flashmla::prefill``) says how much of it is
used; the figures here are what the C++ kernels reserve for a call, not an estimate.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64
from dataclasses import dataclass
from typing import Any

import torch

from flashmla_ops import cpu
from flashmla_ops.cpu import structs
from flashmla_ops.errors import ArgumentError, FlashMLAError


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a call, all threads together."""

    scores: int  #: scores, which become weights (probabilities) in the same place
    copies: int  #: packed queries and staged rows
    outputs: int  #: outputs in float32 that are not finished, or not merged

    @property
    def total(self) -> int:
        return self.scores + self.copies + self.outputs


def decode_footprint(
    b: int,
    h_q: int,
    s_kv: int,
    *,
    s_q: int = 1,
    h_kv: int = 1,
    d_qk: int = 576,
    d_v: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    levels: int = 3,
    threads: int | None = None,
) -> Footprint:
    """The footprint of ``flashmla::decode`` over ``b`` sequences of ``s_kv`` tokens.

    One KV head: MLA rows whose first ``d_v`` elements are the value. More: V and K in two tensors. Raises
    `FlashMLAError` where no C++ kernels run.
    """
    mla = h_kv == 1
    length = c_int32(s_kv)
    call = structs.Decode(
        dtype=_dtype("decode", dtype),
        b=b,
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        d_qk=d_qk,
        d_v=d_v,
        qk_start=0 if mla else d_v,
        levels=_levels("decode", levels),
        kv=structs.Cache(d=d_qk if mla else d_v),
        k=structs.Cache(d=0 if mla else d_qk),
        cache_seqlens=ctypes.addressof(length),
        cache_seqlens_stride=0,
    )
    return _ask("flashmla_decode_footprint", call, threads)


def prefill_footprint(
    tokens: int,
    h_q: int,
    *,
    h_kv: int | None = None,
    d_qk: int = 192,
    d_v: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    levels: int = 3,
    threads: int | None = None,
) -> Footprint:
    """The footprint of ``flashmla::prefill`` over one sequence of ``tokens``.

    Raises `FlashMLAError` where no C++ kernels run.
    """
    bounds = (c_int32 * 2)(0, tokens)
    call = structs.Prefill(
        dtype=_dtype("prefill", dtype),
        causal=causal,
        b=1,
        h_q=h_q,
        h_kv=h_kv or h_q,
        d_qk=d_qk,
        d_v=d_v,
        t_q=tokens,
        t_k=tokens,
        levels=_levels("prefill", levels),
        cu_seqlens_q=ctypes.addressof(bounds),
        cu_seqlens_k=ctypes.addressof(bounds),
        cu_seqlens_q_stride=1,
        cu_seqlens_k_stride=1,
    )
    return _ask("flashmla_prefill_footprint", call, threads)


def _dtype(op: str, dtype: torch.dtype) -> int:
    if dtype not in structs.DTYPES:
        raise ArgumentError(op, "dtype", "float32, bfloat16 or float16", dtype)
    return structs.DTYPES[dtype]


def _levels(op: str, levels: int) -> int:
    if levels not in (1, 2, 3):
        raise ArgumentError(op, "levels", "1, 2 or 3", levels)
    return levels


def _ask(function: str, call: Any, threads: int | None) -> Footprint:
    if not cpu.STATE.path:
        raise FlashMLAError(f"footprints are those of the C++ kernels, which do not run here: {cpu.STATE.reason}")
    answer = structs.Footprint()
    library = ctypes.CDLL(str(cpu.STATE.path))
    getattr(library, function)(ctypes.byref(call), c_int64(threads or torch.get_num_threads()), ctypes.byref(answer))
    return Footprint(answer.scores, answer.copies, answer.outputs)
