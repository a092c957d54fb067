"""The same kernels without torch's C++ headers: Python implementations that fill the C interface's structs.

Slower to call than the stable-ABI binding by a few microseconds; used where that could not be compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.cpu import structs
from flashmla_ops.errors import FlashMLAError, from_message
from flashmla_ops.formats import NAMES, NATIVE, QUANTIZED
from flashmla_ops.ops._library import DEFINED, LIBRARY
from flashmla_ops.ops.append import APPEND, APPEND_TWO
from flashmla_ops.ops.decode import DECODE, Decode
from flashmla_ops.ops.decode_up import DECODE_UP
from flashmla_ops.ops.merge import MERGE_STATES
from flashmla_ops.ops.ragged import check_bounds
from flashmla_ops.ops.schedule import DECODE_SCHEDULE
from flashmla_ops.ops.sparse import SPARSE_DECODE, SPARSE_PREFILL, SparseDecode, SparsePrefill

_BODY = ctypes.CFUNCTYPE(None, c_int64, c_int64, c_void_p)
_PARALLEL = ctypes.CFUNCTYPE(None, c_int64, c_void_p, c_void_p)


class Binding:
    """Calls into one loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._message = 512
        torch_cpu = ctypes.CDLL(None)
        self._torch_parallel_for: Any = getattr(torch_cpu, "torch_parallel_for", None)
        self._parallel = _PARALLEL(self._run_parallel)

    def _run_parallel(self, n: int, body: int, context: int) -> None:
        if self._torch_parallel_for is None:
            _BODY(body)(0, n, context)
        else:
            self._torch_parallel_for(c_int64(0), c_int64(n), c_int64(1), c_void_p(body), c_void_p(context))

    def _runtime(self) -> structs.Runtime:
        return structs.Runtime(torch.get_num_threads(), ctypes.cast(self._parallel, c_void_p))

    def _call(self, function: Callable[..., int], *arguments: Any) -> None:
        message = ctypes.create_string_buffer(self._message)
        if function(*arguments, message):
            text = message.value.decode()
            raise from_message(text) or FlashMLAError(text)

    def decode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = DECODE.fake(*args, **kwargs)
        self._decode(DECODE.bind(*args, **kwargs), out, lse)
        return out, lse

    def decode_out(self, *args: Any, out: Tensor, lse: Tensor, **kwargs: Any) -> None:
        DEFINED["decode.out"].fake(*args, out=out, lse=lse, **kwargs)
        self._decode(DECODE.bind(*args, **kwargs), out, lse)

    def _decode(self, a: Decode, out: Tensor, lse: Tensor) -> None:
        bounds = _boundaries("decode", a)
        call, plan = _decode_call("decode", a, lse, bounds)
        call.out, call.out_stride = out.data_ptr(), _padded(out.stride()[:-1], 3)
        self._call(self._library.flashmla_decode, byref(call), *_schedule(plan), byref(self._runtime()))

    def decode_up(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = DECODE_UP.fake(*args, **kwargs)
        a = DECODE_UP.bind(*args, **kwargs)
        bounds = _boundaries("decode_up", a)
        call, plan = _decode_call("decode_up", a, lse, bounds)
        weight, along_k = a.weight, a.weight.stride(2) != 1 and a.weight.size(2) != 1
        up = structs.Up(weight.data_ptr(), weight.stride(), along_k, weight.size(2), out.data_ptr())
        function = self._library.flashmla_decode_up
        self._call(function, byref(call), byref(up), *_schedule(plan), byref(self._runtime()))
        return out, lse

    def decode_schedule(self, cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int, num_parts: int) -> Tensor:
        plan: Tensor = DECODE_SCHEDULE.fake(cache_seqlens, s_q, h_q, h_kv, num_parts)
        sizes = map(c_int64, (cache_seqlens.stride(0), cache_seqlens.size(0), s_q, h_q, h_kv, num_parts))
        lengths = c_void_p(cache_seqlens.data_ptr())
        self._call(self._library.flashmla_decode_schedule, lengths, *sizes, c_void_p(plan.data_ptr()))
        return plan

    def append(self, kv_cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str = "native") -> None:
        if row_format == NATIVE:
            APPEND.fake(kv_cache, rows, slot_mapping, row_format)
            self._append([(kv_cache, rows)], slot_mapping)
        else:
            APPEND.reference(kv_cache, rows, slot_mapping, row_format)

    def append_two(self, kv_cache: Tensor, k_cache: Tensor, rows: Tensor, k_rows: Tensor, slot_mapping: Tensor) -> None:
        APPEND_TWO.fake(kv_cache, k_cache, rows, k_rows, slot_mapping)
        self._append([(kv_cache, rows), (k_cache, k_rows)], slot_mapping)

    def _append(self, tensors: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> None:
        calls = (structs.Append * len(tensors))()
        for call, (cache, rows) in zip(calls, tensors, strict=True):
            size = cache.element_size()
            call.cache, call.rows, call.element_size = cache.data_ptr(), rows.data_ptr(), size
            call.page_bytes, call.token_bytes, call.head_bytes = (stride * size for stride in cache.stride()[:3])
            call.row_bytes, call.row_head_bytes, call.element_bytes = (stride * size for stride in rows.stride())
            call.n_pages, call.page_size, call.h_kv, call.d = cache.shape
        sizes = (c_int64(slots.stride(0)), c_int64(slots.size(0)))
        function = self._library.flashmla_append
        self._call(function, calls, c_int64(len(calls)), c_void_p(slots.data_ptr()), *sizes, byref(self._runtime()))

    def sparse_decode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = SPARSE_DECODE.fake(*args, **kwargs)
        a = SPARSE_DECODE.bind(*args, **kwargs)
        call = _sparse_call("sparse_decode", a, a.kv_cache.size(2), a.qk_start, out)
        call.attention.lse, call.attention.lse_stride = lse.data_ptr(), lse.stride()
        call.batch_invariant = a.batch_invariant

        def source(cache: Tensor, k: Tensor | None, chosen: Tensor, lengths: Tensor | None, row: str) -> structs.Source:
            made = _source(cache, chosen, lengths, row)
            made.k = structs.Cache() if k is None else _cache(k)
            made.indices_stride = (chosen.stride(0), chosen.stride(1), 0, chosen.stride(2))
            made.topk_length_stride = (0 if lengths is None else lengths.stride(0), 0)
            return made

        call.sources[0] = source(a.kv_cache, a.k_cache, a.indices, a.topk_length, a.row_format)
        call.n_sources = 1
        if a.extra_kv_cache is not None and a.extra_indices is not None:
            extra = (a.extra_indices, a.extra_topk_length, a.extra_row_format)
            call.sources[1] = source(a.extra_kv_cache, None, *extra)
            call.n_sources = 2
        self._call(self._library.flashmla_sparse, byref(call), byref(self._runtime()))
        return out, lse

    def sparse_prefill(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, max_logits, lse = SPARSE_PREFILL.fake(*args, **kwargs)
        a = SPARSE_PREFILL.bind(*args, **kwargs)
        kv, indices, lengths = a.kv[None], a.indices, a.topk_length
        call = _sparse_call("sparse_prefill", a, kv.size(2), 0, out)
        call.attention.lse, call.attention.max_logits = lse.data_ptr(), max_logits.data_ptr()
        call.attention.lse_stride = (0, 1, lse.stride(0))
        call.sources[0] = _source(kv, indices, lengths, a.row_format)
        call.sources[0].indices_stride = (0, *indices.stride())
        call.sources[0].topk_length_stride = (0, 0 if lengths is None else lengths.stride(0))
        call.n_sources = 1
        self._call(self._library.flashmla_sparse, byref(call), byref(self._runtime()))
        return out, max_logits, lse

    def merge_states(self, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        out, lse = MERGE_STATES.fake(outs, lses)
        *batch, s_q, h_q, d_v = out.shape
        n, padding = len(outs), [] if batch else [0]
        out_strides = [stride for x in outs for stride in (*padding, *x.stride())]
        lse_strides = [stride for x in lses for stride in (*padding, *x.stride())]
        call = structs.Merge(
            dtype=structs.DTYPES[out.dtype],
            parts=n,
            b=batch[0] if batch else 1,
            s_q=s_q,
            h_q=h_q,
            d_v=d_v,
            outs=ctypes.cast((c_void_p * n)(*(x.data_ptr() for x in outs)), c_void_p),
            out_strides=ctypes.cast((c_int64 * (4 * n))(*out_strides), c_void_p),
            lses=ctypes.cast((c_void_p * n)(*(x.data_ptr() for x in lses)), c_void_p),
            lse_strides=ctypes.cast((c_int64 * (3 * n))(*lse_strides), c_void_p),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
        )
        self._call(self._library.flashmla_merge_states, byref(call), byref(self._runtime()))
        return out, lse


def _boundaries(op: str, a: Decode) -> Tensor | None:
    """The call's ``cu_seqlens_q`` as int32: it must live as long as the call."""
    if a.cu_seqlens_q is None or a.cu_seqlens_q.dtype == torch.int32:
        return a.cu_seqlens_q
    check_bounds(op, "cu_seqlens_q", a.cu_seqlens_q, a.q.size(0))
    return a.cu_seqlens_q.to(torch.int32)


def _padded(strides: Sequence[int], n: int) -> tuple[int, ...]:
    """As many strides as there are with a dimension of sequences: it is 0 where they are ragged."""
    return (*[0] * (n - len(strides)), *strides)


def _decode_call(op: str, a: Decode, lse: Tensor, bounds: Tensor | None) -> tuple[structs.Decode, Tensor | None]:
    """The call, but for its out, and the schedule in one piece: it must live as long as the call."""
    q, kv_cache = a.q, a.kv_cache
    s_q, h_q, d_qk = q.shape[-3:]
    call = structs.Decode(
        op=op.encode(),
        dtype=structs.DTYPES[q.dtype],
        causal=a.causal,
        b=a.cache_seqlens.size(0),
        s_q=s_q if bounds is None else 0,
        h_q=h_q,
        h_kv=kv_cache.size(2),
        d_qk=d_qk,
        d_v=a.d_v,
        qk_start=a.qk_start,
        softmax_scale=d_qk**-0.5 if a.softmax_scale is None else a.softmax_scale,
        softcap=a.softcap,
        window=a.window,
        levels=a.levels,
        batch_invariant=a.batch_invariant,
        row_format=NAMES.index(a.row_format),
        q=q.data_ptr(),
        q_stride=_padded(q.stride(), 4),
        cu_seqlens_q=None if bounds is None else bounds.data_ptr(),
        cu_seqlens_q_stride=0 if bounds is None else bounds.stride(0),
        t_q=q.size(0),
        kv=_cache(kv_cache, a.row_format),
        k=structs.Cache() if a.k_cache is None else _cache(a.k_cache),
        n_pages=kv_cache.size(0),
        page_size=kv_cache.size(1),
        block_table=a.block_table.data_ptr(),
        block_table_stride=a.block_table.stride(),
        max_pages=a.block_table.size(1),
        cache_seqlens=a.cache_seqlens.data_ptr(),
        cache_seqlens_stride=a.cache_seqlens.stride(0),
        attn_sink=None if a.attn_sink is None else a.attn_sink.data_ptr(),
        attn_sink_stride=0 if a.attn_sink is None else a.attn_sink.stride(0),
        lse=lse.data_ptr(),
        lse_stride=_padded(lse.stride(), 3),
    )
    return call, None if a.schedule is None else a.schedule.contiguous()


def _sparse_call(op: str, a: SparseDecode | SparsePrefill, h_kv: int, qk_start: int, out: Tensor) -> structs.Sparse:
    """The part of a call that queries and results decide."""
    q, scale, sink = a.q, a.softmax_scale, a.attn_sink
    padding = [0] * (4 - q.dim())
    call = structs.Sparse()
    call.attention = structs.Decode(
        op=op.encode(),
        dtype=structs.DTYPES[q.dtype],
        b=q.size(0) if q.dim() == 4 else 1,
        s_q=q.size(-3),
        h_q=q.size(-2),
        h_kv=h_kv,
        d_qk=q.size(-1),
        d_v=a.d_v,
        qk_start=qk_start,
        softmax_scale=q.size(-1) ** -0.5 if scale is None else scale,
        q=q.data_ptr(),
        q_stride=(*padding, *q.stride()),
        attn_sink=None if sink is None else sink.data_ptr(),
        attn_sink_stride=0 if sink is None else sink.stride(0),
        out=out.data_ptr(),
        out_stride=(*padding, *out.stride()[:-1]),
    )
    return call


def _source(cache: Tensor, indices: Tensor, topk_length: Tensor | None, row_format: str) -> structs.Source:
    """A source of rows, but for the strides of what says which."""
    return structs.Source(
        kv=_cache(cache, row_format),
        row_format=NAMES.index(row_format),
        n_pages=cache.size(0),
        page_size=cache.size(1),
        indices=indices.data_ptr(),
        topk=indices.size(2),
        topk_length=None if topk_length is None else topk_length.data_ptr(),
    )


def _schedule(plan: Tensor | None) -> tuple[c_void_p, c_int64]:
    return (c_void_p(None), c_int64(0)) if plan is None else (c_void_p(plan.data_ptr()), c_int64(plan.numel()))


def _cache(tensor: Tensor, row_format: str = NATIVE) -> structs.Cache:
    cache = structs.Cache(tensor.data_ptr(), *tensor.stride()[:3], tensor.size(3))
    if row_format != NATIVE:
        row = QUANTIZED[row_format]
        cache.d = row.elements
        cache.token_stride = row.bytes - row.tail if row.tail else cache.token_stride
    return cache


def register(library: ctypes.CDLL) -> None:
    """Register the library's kernels as the CPU implementations of the operators."""
    binding = Binding(library)
    LIBRARY.impl("decode", binding.decode, "CPU")
    LIBRARY.impl("decode.out", binding.decode_out, "CPU")
    LIBRARY.impl("decode_up", binding.decode_up, "CPU")
    LIBRARY.impl("decode_schedule", binding.decode_schedule, "CPU")
    LIBRARY.impl("append_", binding.append, "CPU")
    LIBRARY.impl("append_.two", binding.append_two, "CPU")
    LIBRARY.impl("sparse_decode", binding.sparse_decode, "CPU")
    LIBRARY.impl("sparse_prefill", binding.sparse_prefill, "CPU")
    LIBRARY.impl("merge_states", binding.merge_states, "CPU")
