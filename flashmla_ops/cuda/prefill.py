"""``flashmla::prefill`` on CUDA: torch's own flash attention, which is FlashAttention 2 for sequences of any lengths.

It is a well-kept library's kernel, so there is none of ours. What it does not take runs as the float64 definition,
which waits for the device. Boundaries that do not rise from 0 to the number of tokens, for which the CPU raises, are
bent until they do: the device is not waited for, and nothing is read beyond the tensors.

The first call on a device proves on a small problem that torch's results are those of the definition: their alignment
under a causal mask, the layout of lse, queries that see nothing. Where they are not, the definition runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.cuda.engine import Engine, Unserved
from flashmla_ops.cuda.served import served
from flashmla_ops.ops.check import dtype_name
from flashmla_ops.ops.prefill import PREFILL, Prefill

#: Elements of a head at most, and what they are a multiple of: the kernel's.
MOST_ELEMENTS, UNIT = 256, 8


def prefill(engine: Engine, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``flashmla::prefill``."""
    a: Prefill = PREFILL.bind(*args, **kwargs)
    d_qk, d_v = a.q.size(2), a.v.size(2)

    def launch(results: list[Tensor]) -> str:
        check(a, max(d_qk, d_v))
        out, lse = results
        if out.numel() and a.k.size(0) and a.cu_seqlens_q.size(0) > 1:
            found, logs = attend(a, -(-max(d_qk, d_v) // UNIT) * UNIT)
            results[:] = found[..., :d_v].contiguous(), logs
        else:
            out.zero_()
            lse.fill_(torch.inf)
        return "torch's flash attention"

    call = f"prefill {dtype_name(a.q.dtype)} h_q {a.q.size(1)} h_kv {a.k.size(1)} d_qk {d_qk} d_v {d_v}"
    out, lse = served(engine, PREFILL, a, call, a.q, launch)
    return out, lse


def check(a: Prefill, d: int) -> None:
    """Raises `Unserved`."""
    if a.q.dtype not in (torch.bfloat16, torch.float16):
        raise Unserved(f"torch's flash attention computes in bfloat16 and float16, q is {a.q.dtype}")
    if d > MOST_ELEMENTS:
        raise Unserved(f"torch's flash attention takes heads of {MOST_ELEMENTS} elements at most, these have {d}")
    if a.softmax_scale is not None and a.softmax_scale <= 0:
        raise Unserved(f"torch's flash attention needs a scale above 0, got {a.softmax_scale}")
    if a.window or a.softcap or a.attn_sink is not None:
        raise Unserved("torch's flash attention is called without window, softcap and attn_sink")
    if not proven(a.q.device):
        raise Unserved("torch's flash attention is not what the definition is, on this device")


@cache
def proven(device: torch.device) -> bool:
    """Whether torch's flash attention agrees with the definition on this device. It waits for the device, once."""
    generator = torch.Generator().manual_seed(0)
    shapes = (9, 4, 24), (12, 2, 24), (12, 2, 16)
    q, k, v = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(ends, device=device) for ends in ([0, 3, 3, 9], [0, 1, 5, 12]))
    problem = Prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True)
    out, lse = attend(problem, 24)
    expected, expected_lse = reference.prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, True)
    if lse.shape != expected_lse.shape or not torch.equal(lse == torch.inf, expected_lse == torch.inf):
        return False
    seen = expected_lse != torch.inf
    logs = (lse.double() - expected_lse)[seen].abs().max() < 1e-3
    return bool(logs and ((out[..., :16].double() - expected).abs().max() < 2e-2))


def attend(a: Prefill, d: int) -> tuple[Tensor, Tensor]:
    """All heads widened to ``d`` elements, of which zeros change nothing; out [t_q, h_q, d] and lse [h_q, t_q]."""
    q, k, v = (torch.nn.functional.pad(x, (0, d - x.size(2))) if x.size(2) < d else x for x in (a.q, a.k, a.v))
    q = q if q.stride(-1) == 1 else q.contiguous()
    t_q, t_k = q.size(0), k.size(0)
    scale = a.q.size(2) ** -0.5 if a.softmax_scale is None else a.softmax_scale
    bounds = (boundaries(a.cu_seqlens_q, t_q), boundaries(a.cu_seqlens_k, t_k))
    # The longest sequence is not known without a wait: blocks of queries beyond a sequence's end leave at once.
    found = torch.ops.aten._flash_attention_forward(q, k, v, *bounds, t_q, t_k, 0.0, a.causal, False, scale=scale)
    return found[0], found[1]


def boundaries(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """As int32, rising, from 0 to the number of tokens."""
    rising = cu_seqlens.clamp(0, tokens).cummax(0).values.to(torch.int32)
    ends = torch.zeros_like(rising)
    ends[-1:] = tokens
    inner = torch.arange(rising.numel(), device=rising.device).remainder(max(rising.numel() - 1, 1)) != 0
    return torch.where(inner, rising, ends)
