"""The structures of csrc/flashmla/interface.h, for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Cache(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("page_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("d", c_int64),
    )


class Decode(ctypes.Structure):
    _fields_ = (
        ("op", c_char_p),
        ("dtype", c_int32),
        ("causal", c_int32),
        *((name, c_int64) for name in ("b", "s_q", "h_q", "h_kv", "d_qk", "d_v", "qk_start")),
        ("softmax_scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("levels", c_int32),
        ("batch_invariant", c_int32),
        ("row_format", c_int32),
        ("q", c_void_p),
        ("q_stride", c_int64 * 4),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_q_stride", c_int64),
        ("t_q", c_int64),
        ("kv", Cache),
        ("k", Cache),
        ("n_pages", c_int64),
        ("page_size", c_int64),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64 * 2),
        ("max_pages", c_int64),
        ("cache_seqlens", c_void_p),
        ("cache_seqlens_stride", c_int64),
        ("attn_sink", c_void_p),
        ("attn_sink_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64 * 3),
        ("lse", c_void_p),
        ("lse_stride", c_int64 * 3),
        ("max_logits", c_void_p),
    )


class Source(ctypes.Structure):
    _fields_ = (
        ("kv", Cache),
        ("k", Cache),
        ("row_format", c_int32),
        ("n_pages", c_int64),
        ("page_size", c_int64),
        ("indices", c_void_p),
        ("indices_stride", c_int64 * 4),
        ("topk", c_int64),
        ("topk_length", c_void_p),
        ("topk_length_stride", c_int64 * 2),
    )


class Sparse(ctypes.Structure):
    _fields_ = (
        ("attention", Decode),
        ("sources", Source * 2),
        ("n_sources", c_int32),
        ("batch_invariant", c_int32),
    )


class Up(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("weight_stride", c_int64 * 3),
        ("weight_along_k", c_int32),
        ("d_up", c_int64),
        ("out", c_void_p),
    )


class Prefill(ctypes.Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("causal", c_int32),
        *((name, c_int64) for name in ("b", "h_q", "h_kv", "d_qk", "d_v", "t_q", "t_k")),
        ("softmax_scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("levels", c_int32),
        ("q", c_void_p),
        ("q_stride", c_int64 * 3),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_stride", c_int64 * 2),
        ("v_stride", c_int64 * 2),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("cu_seqlens_q_stride", c_int64),
        ("cu_seqlens_k_stride", c_int64),
        ("attn_sink", c_void_p),
        ("attn_sink_stride", c_int64),
        ("out", c_void_p),
        ("lse", c_void_p),
    )


class Footprint(ctypes.Structure):
    _fields_ = (("scores", c_int64), ("copies", c_int64), ("outputs", c_int64))


class Append(ctypes.Structure):
    _fields_ = (
        ("cache", c_void_p),
        ("rows", c_void_p),
        *(
            (name, c_int64)
            for name in (
                *("page_bytes", "token_bytes", "head_bytes", "row_bytes", "row_head_bytes", "element_bytes"),
                *("h_kv", "d", "element_size", "n_pages", "page_size"),
            )
        ),
    )


class Merge(ctypes.Structure):
    _fields_ = (
        ("dtype", c_int32),
        *((name, c_int64) for name in ("parts", "b", "s_q", "h_q", "d_v")),
        *((name, c_void_p) for name in ("outs", "out_strides", "lses", "lse_strides", "out", "lse")),
    )


class Runtime(ctypes.Structure):
    _fields_ = (("num_threads", c_int64), ("parallel", c_void_p))
